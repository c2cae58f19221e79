//! The way into the guest: connections to its vsock ports and calls to its agent.
//!
//! The agent is in the guest's hands. Its answers are bounded (ttrpc's 4 MiB frames), waited for
//! with a limit, and nothing in them is used as a path or a pid on the host.

use crate::Kind;
use crate::folder::short_path;
use crate::ids::{ContainerId, ExecId, ProcessId};
use crate::pace::Pace;
use crate::process::ExitStatus;
use crate::template::identify;
use crate::vmm::{SharedVmm, VmEnd};
use bulkhead_proto::agent::{self, AgentClient, Streams};
use bulkhead_proto::guest::{
    AGENT_PORT, FORWARD_OPEN, FORWARD_PORT, RESOLVER, RESOLVER_ADDRESS, STREAM_PORT,
};
use bulkhead_proto::vmm::PluggedSlot;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use ttrpc::context::{self, Context};

/// Longest answer to CONNECT: "OK ", a port, a newline.
const MAX_ANSWER: usize = 32;

/// How long the VMM's end may come after the connection's.
const END_AFTER_BREAK: Duration = Duration::from_secs(3);

/// How far the guest's clock may be from the host's before the host's is taken instead.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// A call to the agent that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// The agent refused.
    #[error("{message}")]
    Refused {
        /// What kind of refusal.
        kind: Kind,
        /// The agent's message.
        message: String,
    },
    /// No answer in time.
    #[error("the agent in the guest did not answer `{call}` within {limit:?}")]
    TimedOut {
        /// The call.
        call: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The VM ended during the call.
    #[error("the virtual machine ended during `{call}`: {end}")]
    VmEnded {
        /// The call.
        call: &'static str,
        /// Why it ended.
        end: VmEnd,
    },
    /// The connection broke, or the answer made no sense.
    #[error("the call `{call}` to the agent in the guest failed: {cause}")]
    Broken {
        /// The call.
        call: &'static str,
        /// What happened.
        cause: String,
    },
}

impl AgentError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            AgentError::Refused { kind, .. } => *kind,
            AgentError::TimedOut { .. } => Kind::DeadlineExceeded,
            AgentError::VmEnded { .. } | AgentError::Broken { .. } => Kind::Unknown,
        }
    }
}

type AgentResult<T> = Result<T, AgentError>;

/// A booted guest whose agent has answered.
pub(crate) struct Guest {
    agent: AgentClient,
    vsock: VsockSocket,
    next_token: AtomicU64,
    pub vmm: SharedVmm,
    pub pace: Pace,
}

/// A standard stream's connection, and the token that names it to the agent.
pub(crate) struct Stream {
    pub token: u64,
    pub socket: UnixStream,
}

impl Guest {
    /// Connects to the agent of a VM that has reported ready. The report is the agent's own knock,
    /// so no call is spent on asking it again.
    pub async fn connect(folder: File, vmm: SharedVmm, pace: Pace) -> AgentResult<Self> {
        let vsock = VsockSocket { folder };
        let socket = dial(&vsock, AGENT_PORT, "connect", &vmm, pace).await?;
        let socket = ttrpc::r#async::transport::Socket::from(socket);
        let agent = AgentClient::new(ttrpc::r#async::Client::new(socket));
        Ok(Self {
            agent,
            vsock,
            next_token: AtomicU64::new(1),
            vmm,
            pace,
        })
    }

    /// Has the agent make ahead what every container needs, before the machine is saved.
    pub async fn prepare(&self) -> AgentResult<()> {
        let limit = self.pace.create();
        let request = agent::PrepareRequest::new();
        self.call(
            "prepare",
            limit,
            self.agent.prepare(within(limit), &request),
        )
        .await
        .map(drop)
    }

    /// Gives a clone an identity of its own, and makes sure that it has taken it on.
    pub async fn identify(&self, hostname: Option<&str>) -> AgentResult<()> {
        let call = "identify";
        let limit = self.pace.call();
        let broken = |cause: String| AgentError::Broken { call, cause };
        let request =
            identify::request(hostname).map_err(|error| broken(format!("no entropy: {error}")))?;
        let answer = self
            .call(call, limit, self.agent.identify(within(limit), &request))
            .await?;
        if answer.generation_id != request.generation_id {
            return Err(broken("it answered with another generation id".into()));
        }
        Ok(())
    }

    /// Has the guest take a device into use that was plugged in; its name there.
    pub async fn attach_device(&self, slot: PluggedSlot) -> AgentResult<String> {
        Ok(self.attach(slot).await?.name)
    }

    /// The same with a disk; its node's major and minor number there.
    pub async fn attach_disk(&self, slot: PluggedSlot) -> AgentResult<(u32, u32)> {
        let disk = self.attach(slot).await?;
        Ok((disk.major, disk.minor))
    }

    async fn attach(&self, slot: PluggedSlot) -> AgentResult<agent::AttachDeviceResponse> {
        let limit = self.pace.call();
        let request = agent::AttachDeviceRequest {
            slot: protobuf::MessageField::some(describe(slot)),
            ..Default::default()
        };
        let answer = self.agent.attach_device(within(limit), &request);
        self.call("attach device", limit, answer).await
    }

    /// Has the guest let go of a device, before it is unplugged.
    pub async fn detach_device(&self, slot: PluggedSlot) -> AgentResult<()> {
        let limit = self.pace.call();
        let request = agent::DetachDeviceRequest {
            slot: protobuf::MessageField::some(describe(slot)),
            ..Default::default()
        };
        let answer = self.agent.detach_device(within(limit), &request);
        self.call("detach device", limit, answer).await.map(drop)
    }

    /// Opens a stream to the guest.
    pub async fn open_stream(&self) -> AgentResult<Stream> {
        let call = "open stream";
        let mut socket = dial(&self.vsock, STREAM_PORT, call, &self.vmm, self.pace).await?;
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let broken = |cause: io::Error| AgentError::Broken {
            call,
            cause: cause.to_string(),
        };
        socket
            .write_all(&token.to_le_bytes())
            .await
            .map_err(broken)?;
        Ok(Stream { token, socket })
    }

    /// Opens a connection to a TCP port of the guest's loopback.
    pub async fn open_forward(&self, port: u16) -> AgentResult<UnixStream> {
        let nobody = format!("nobody listens on port {port} of the guest's loopback");
        self.open(port, nobody).await
    }

    /// Has the agent be a name server in the guest as long as the connection lasts.
    pub async fn open_resolver(&self) -> AgentResult<UnixStream> {
        let taken = format!("the guest has no room for a name server at {RESOLVER_ADDRESS}");
        self.open(RESOLVER, taken).await
    }

    async fn open(&self, port: u16, refusal: String) -> AgentResult<UnixStream> {
        let call = "connect to the guest's loopback";
        let mut socket = dial(&self.vsock, FORWARD_PORT, call, &self.vmm, self.pace).await?;
        let limit = self.pace.call();
        let asked = timeout(limit, async {
            socket.write_all(&port.to_le_bytes()).await?;
            socket.read_u8().await
        });
        match asked.await {
            Ok(Ok(FORWARD_OPEN)) => Ok(socket),
            Ok(Ok(_)) => Err(AgentError::Refused {
                kind: Kind::NotFound,
                message: refusal,
            }),
            Ok(Err(cause)) => Err(AgentError::Broken {
                call,
                cause: cause.to_string(),
            }),
            Err(_) => Err(AgentError::TimedOut { call, limit }),
        }
    }

    /// Gives the guest its network, or what has changed of it.
    pub async fn set_network(&self, request: &agent::SetNetworkRequest) -> AgentResult<()> {
        let limit = self.pace.call();
        self.call(
            "set network",
            limit,
            self.agent.set_network(within(limit), request),
        )
        .await
        .map(drop)
    }

    /// Sets a container up.
    pub async fn create(&self, request: &agent::CreateRequest) -> AgentResult<()> {
        let limit = self.pace.create();
        self.call("create", limit, self.agent.create(within(limit), request))
            .await
            .map(drop)
    }

    /// Lets a created container run.
    pub async fn start(&self, id: &ContainerId) -> AgentResult<()> {
        let limit = self.pace.create();
        let request = agent::StartRequest {
            container_id: id.to_string(),
            ..Default::default()
        };
        self.call("start", limit, self.agent.start(within(limit), &request))
            .await
            .map(drop)
    }

    /// Starts a further process; returns its pid in the guest.
    pub async fn exec(&self, request: &agent::ExecRequest) -> AgentResult<u32> {
        let limit = self.pace.create();
        self.call("exec", limit, self.agent.exec(within(limit), request))
            .await
            .map(|answer| answer.guest_pid)
    }

    /// Sends a signal.
    pub async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> AgentResult<()> {
        let limit = self.pace.call();
        let request = agent::SignalRequest {
            process: name(process),
            signal,
            all,
            ..Default::default()
        };
        self.call("signal", limit, self.agent.signal(within(limit), &request))
            .await
            .map(drop)
    }

    /// Waits for a process's end, however long that takes. The second value says that the kernel
    /// killed a process of the container for want of memory.
    pub async fn wait(&self, process: &ProcessId) -> AgentResult<(ExitStatus, bool)> {
        let request = agent::WaitRequest {
            process: name(process),
            ..Default::default()
        };
        let answer = self.agent.wait(Context::default(), &request).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Err(self.explain("wait", Duration::ZERO, error).await),
        };
        let guest_time = u64::try_from(answer.exited_at_seconds)
            .ok()
            .and_then(|seconds| {
                let since = Duration::new(seconds, answer.exited_at_nanos.min(999_999_999));
                SystemTime::UNIX_EPOCH.checked_add(since)
            });
        let status = ExitStatus {
            // A wait status has 8 bits; anything else is nonsense that must look like a failure.
            code: if answer.exit_status <= 255 {
                answer.exit_status
            } else {
                255
            },
            at: plausible(guest_time, SystemTime::now()),
        };
        Ok((status, answer.oom_killed))
    }

    /// Forgets an ended process.
    pub async fn delete(&self, process: &ProcessId) -> AgentResult<()> {
        let limit = self.pace.create();
        let request = agent::DeleteRequest {
            process: name(process),
            ..Default::default()
        };
        self.call("delete", limit, self.agent.delete(within(limit), &request))
            .await
            .map(drop)
    }

    /// Sets a terminal's size.
    pub async fn resize(&self, process: &ProcessId, rows: u32, columns: u32) -> AgentResult<()> {
        let limit = self.pace.call();
        let request = agent::ResizeRequest {
            process: name(process),
            rows,
            columns,
            ..Default::default()
        };
        self.call("resize", limit, self.agent.resize(within(limit), &request))
            .await
            .map(drop)
    }

    /// The guest's pids of a container's processes.
    pub async fn pids(&self, id: &ContainerId) -> AgentResult<Vec<u32>> {
        let limit = self.pace.call();
        let request = agent::PidsRequest {
            container_id: id.to_string(),
            ..Default::default()
        };
        let answer = self.call("pids", limit, self.agent.pids(within(limit), &request));
        Ok(answer.await?.guest_pids)
    }

    /// What a container uses.
    pub async fn stats(&self, id: &ContainerId) -> AgentResult<agent::StatsResponse> {
        let limit = self.pace.call();
        let request = agent::StatsRequest {
            container_id: id.to_string(),
            ..Default::default()
        };
        self.call("stats", limit, self.agent.stats(within(limit), &request))
            .await
    }

    /// Changes a container's limits.
    pub async fn update(&self, id: &ContainerId, resources_json: Vec<u8>) -> AgentResult<()> {
        let limit = self.pace.call();
        let request = agent::UpdateRequest {
            container_id: id.to_string(),
            resources_json,
            ..Default::default()
        };
        self.call("update", limit, self.agent.update(within(limit), &request))
            .await
            .map(drop)
    }

    /// Freezes a container's processes, or lets them go on.
    pub async fn freeze(&self, id: &ContainerId, frozen: bool) -> AgentResult<()> {
        let limit = self.pace.call();
        let container_id = id.to_string();
        if frozen {
            let request = agent::PauseRequest {
                container_id,
                ..Default::default()
            };
            let answer = self.agent.pause(within(limit), &request);
            self.call("pause", limit, answer).await.map(drop)
        } else {
            let request = agent::ResumeRequest {
                container_id,
                ..Default::default()
            };
            let answer = self.agent.resume(within(limit), &request);
            self.call("resume", limit, answer).await.map(drop)
        }
    }

    /// Ends the guest: by its own shutdown if it does that in time, by killing the VMM otherwise.
    pub async fn shut_down(&self) -> VmEnd {
        let limit = self.pace.shutdown();
        let request = agent::ShutdownRequest::new();
        let ended = timeout(limit, async {
            // The connection breaks when the guest is off; only the VMM's end counts.
            if let Err(error) = self.agent.shutdown(within(limit), &request).await {
                tracing::debug!(%error, "shutdown call ended");
            }
            self.vmm.wait().await
        });
        match ended.await {
            Ok(end) => end,
            Err(_) => {
                tracing::warn!(
                    ?limit,
                    "the guest did not shut down in time; killing the VMM"
                );
                self.vmm.kill();
                self.vmm.wait().await
            }
        }
    }

    /// Waits for an answer, with a limit of our own beside the transport's.
    async fn call<T>(
        &self,
        call: &'static str,
        limit: Duration,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> AgentResult<T> {
        let begin = Instant::now();
        match timeout(limit + Duration::from_secs(1), answer).await {
            Ok(Ok(answer)) => Ok(answer),
            // The transport has no kind of its own for its own limit.
            Ok(Err(ttrpc::Error::Others(_))) if begin.elapsed() >= limit => {
                Err(AgentError::TimedOut { call, limit })
            }
            Ok(Err(error)) => Err(self.explain(call, limit, error).await),
            Err(_) => Err(AgentError::TimedOut { call, limit }),
        }
    }

    async fn explain(
        &self,
        call: &'static str,
        limit: Duration,
        error: ttrpc::Error,
    ) -> AgentError {
        if let ttrpc::Error::RpcStatus(status) = &error {
            let code = status.code.enum_value_or_default();
            if code == ttrpc::Code::DEADLINE_EXCEEDED {
                return AgentError::TimedOut { call, limit };
            }
            return AgentError::Refused {
                kind: kind_of(code),
                message: status.message.clone(),
            };
        }
        match timeout(END_AFTER_BREAK, self.vmm.wait()).await {
            Ok(end) => AgentError::VmEnded { call, end },
            Err(_) => AgentError::Broken {
                call,
                cause: error.to_string(),
            },
        }
    }
}

fn kind_of(code: ttrpc::Code) -> Kind {
    match code {
        ttrpc::Code::NOT_FOUND => Kind::NotFound,
        ttrpc::Code::ALREADY_EXISTS => Kind::AlreadyExists,
        ttrpc::Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
        ttrpc::Code::INVALID_ARGUMENT => Kind::InvalidArgument,
        ttrpc::Code::UNIMPLEMENTED => Kind::Unimplemented,
        ttrpc::Code::UNAVAILABLE => Kind::Unavailable,
        _ => Kind::Unknown,
    }
}

/// A slot as the agent is told of it.
fn describe(slot: PluggedSlot) -> agent::Slot {
    agent::Slot {
        address: slot.address,
        irq: slot.irq,
        number: slot.slot,
        ..Default::default()
    }
}

fn within(limit: Duration) -> Context {
    context::with_duration(limit)
}

fn name(process: &ProcessId) -> protobuf::MessageField<agent::Process> {
    protobuf::MessageField::some(agent::Process {
        container_id: process.container.to_string(),
        exec_id: process
            .exec
            .as_ref()
            .map(ExecId::to_string)
            .unwrap_or_default(),
        ..Default::default()
    })
}

/// Streams by their tokens; 0 where there is none.
pub(crate) fn streams(tokens: [Option<u64>; 3]) -> protobuf::MessageField<Streams> {
    let [stdin, stdout, stderr] = tokens.map(Option::unwrap_or_default);
    protobuf::MessageField::some(Streams {
        stdin_token: stdin,
        stdout_token: stdout,
        stderr_token: stderr,
        ..Default::default()
    })
}

/// The guest's time if it's near the host's, else the host's.
fn plausible(guest: Option<SystemTime>, host: SystemTime) -> SystemTime {
    let near = |time: SystemTime| {
        let apart = time
            .duration_since(host)
            .or_else(|_| host.duration_since(time));
        apart.is_ok_and(|apart| apart <= CLOCK_TOLERANCE)
    };
    guest
        .filter(|time| near(*time))
        .map_or(host, |time| time.min(host))
}

/// The Unix socket that stands for the guest's vsock ports.
struct VsockSocket {
    folder: File,
}

async fn dial(
    vsock: &VsockSocket,
    port: u32,
    call: &'static str,
    vmm: &Arc<crate::vmm::Vmm>,
    pace: Pace,
) -> AgentResult<UnixStream> {
    let limit = pace.dial();
    let dialled = async {
        let mut socket = UnixStream::connect(short_path(&vsock.folder, "vsock.sock")).await?;
        handshake(&mut socket, port).await?;
        Ok(socket)
    };
    let ended = |end| AgentError::VmEnded { call, end };
    let error: io::Error = tokio::select! {
        biased;
        end = vmm.wait() => return Err(ended(end)),
        dialled = timeout(limit, dialled) => match dialled {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => error,
            Err(_) => return Err(AgentError::TimedOut { call, limit }),
        },
    };
    // A guest that has just ended refuses too; its end is the better explanation.
    match timeout(END_AFTER_BREAK, vmm.wait()).await {
        Ok(end) => Err(ended(end)),
        Err(_) => Err(AgentError::Broken {
            call,
            cause: format!("vsock port {port}: {error}"),
        }),
    }
}

/// The VMM's line protocol: `CONNECT <port>`, answered by `OK <port>`. Reads not one byte more,
/// for what follows is the guest's.
async fn handshake(
    socket: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    port: u32,
) -> io::Result<()> {
    socket
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    loop {
        match socket.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if answer.len() < MAX_ANSWER => answer.push(byte),
            Ok(_) => return Err(io::Error::other("the VMM's answer to CONNECT has no end")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the guest refused the connection",
                ));
            }
            Err(error) => return Err(error),
        }
    }
    let accepted = answer
        .strip_prefix(b"OK ")
        .and_then(|port| std::str::from_utf8(port).ok())
        .is_some_and(|port| port.parse::<u32>().is_ok());
    if accepted {
        return Ok(());
    }
    let answer = String::from_utf8_lossy(&answer).escape_debug().to_string();
    Err(io::Error::other(format!(
        "the VMM answered CONNECT by {answer:?}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn talk(answer: &[u8]) -> (io::Result<()>, Vec<u8>, Vec<u8>) {
        let (mut near, mut far) = tokio::io::duplex(4096);
        far.write_all(answer).await.unwrap();
        far.shutdown().await.unwrap();
        let result = handshake(&mut near, 1024).await;
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).await.unwrap();
        drop(near);
        let mut asked = Vec::new();
        far.read_to_end(&mut asked).await.unwrap();
        (result, rest, asked)
    }

    #[tokio::test]
    async fn the_guests_first_bytes_are_left_alone() {
        let (result, rest, asked) = talk(b"OK 1073741824\nhello").await;
        result.unwrap();
        assert_eq!(rest, b"hello");
        assert_eq!(asked, b"CONNECT 1024\n");
    }

    #[tokio::test]
    async fn a_refusal_is_told_from_nonsense() {
        let (result, ..) = talk(b"").await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        for nonsense in [&b"NO\n"[..], b"OK x\n", b"OK \n", &[b'x'; 100]] {
            let (result, ..) = talk(nonsense).await;
            assert!(result.is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn a_guests_clock_is_not_trusted_far() {
        let host = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let (near, far) = (
            host - Duration::from_secs(5),
            host - Duration::from_secs(500),
        );
        assert_eq!(plausible(Some(near), host), near);
        assert_eq!(plausible(Some(far), host), host);
        assert_eq!(plausible(Some(host + Duration::from_secs(5)), host), host);
        assert_eq!(plausible(None, host), host);
    }

    proptest! {
        #[test]
        fn any_answer_ends_in_a_verdict(answer in proptest::collection::vec(any::<u8>(), 0..80)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (result, ..) = runtime.block_on(talk(&answer));
            if result.is_ok() {
                prop_assert!(answer.starts_with(b"OK "));
            }
        }
    }
}
