//! The way into the guest: connections to its vsock ports and calls to its agent.
//!
//! The agent is in the guest's hands. Its answers are bounded (ttrpc's 4 MiB frames), waited for
//! with a limit, and nothing in them is used as a path or a pid on the host.

mod dial;
mod error;
mod streams;

pub use error::AgentError;
pub(crate) use streams::streams;

use crate::ids::{ContainerId, ExecId, ProcessId};
use crate::pace::Pace;
use crate::process::ExitStatus;
use crate::template::identify;
use crate::vmm::{SharedVmm, VmEnd};
use bulkhead_proto::agent::{self, AgentClient};
use bulkhead_proto::guest::AGENT_PORT;
use bulkhead_proto::vmm::PluggedSlot;
use dial::{END_AFTER_BREAK, VsockSocket, dial};
use error::{AgentResult, kind_of};
use std::fs::File;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, timeout};
use ttrpc::context::{self, Context};

/// How far the guest's clock may be from the host's before the host's is taken instead.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// A booted guest whose agent has answered.
pub(crate) struct Guest {
    agent: AgentClient,
    vsock: VsockSocket,
    next_token: AtomicU64,
    pub vmm: SharedVmm,
    pub pace: Pace,
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
