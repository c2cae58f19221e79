//! The agent's side of its contract, with processes that are tasks: `echo WORDS`, `cat`,
//! `sleep` (until a signal), `exit CODE`; `missing` is no program, and creating `hang` never ends.

use async_trait::async_trait;
use bulkhead_proto::agent::{self, Agent, create_agent};
use bulkhead_proto::guest::{AGENT_PORT, STREAM_PORT};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::r#async::{Server, TtrpcContext};

type Key = (String, String);

/// See the module.
#[derive(Default)]
pub struct FakeAgent {
    processes: Mutex<HashMap<Key, Arc<Process>>>,
    streams: Mutex<HashMap<u64, UnixStream>>,
    calls: Mutex<Vec<String>>,
    server: Mutex<Option<Server>>,
    pids: AtomicU32,
    /// Where the double waits for the guest's power-off.
    power: PathBuf,
    /// Generation ids that clones were given.
    generations: Mutex<Vec<Vec<u8>>>,
    /// Answers to `Identify` with another id than it was given.
    pub misidentifies: AtomicBool,
    /// Doesn't let go of devices.
    pub clings: AtomicBool,
}

struct Process {
    pid: u32,
    args: Vec<String>,
    stdin: Mutex<Option<UnixStream>>,
    stdout: Mutex<Option<UnixStream>>,
    exit: watch::Sender<Option<u32>>,
}

impl FakeAgent {
    /// Serves both ports below `dir`.
    pub async fn serve(dir: &Path) -> Arc<Self> {
        let power = dir.join("power");
        let this = Arc::new(Self {
            power,
            ..Self::default()
        });
        let address = format!("unix://{}/{AGENT_PORT}", dir.display());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_agent(Arc::new(Handle(this.clone()))));
        server.start().await.unwrap();
        *this.server.lock().unwrap() = Some(server);
        let listener = UnixListener::bind(dir.join(STREAM_PORT.to_string())).unwrap();
        let streams = this.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let token = stream.read_u64_le().await.unwrap();
                assert!(
                    streams
                        .streams
                        .lock()
                        .unwrap()
                        .insert(token, stream)
                        .is_none()
                );
            }
        });
        this
    }

    /// The calls so far, in short words.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    /// The generation ids of all clones so far.
    pub fn generations(&self) -> Vec<Vec<u8>> {
        self.generations.lock().unwrap().clone()
    }

    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    async fn stream(&self, token: u64) -> Option<UnixStream> {
        if token == 0 {
            return None;
        }
        loop {
            if let Some(stream) = self.streams.lock().unwrap().remove(&token) {
                return Some(stream);
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    async fn add(
        &self,
        key: Key,
        args: Vec<String>,
        streams: &agent::Streams,
    ) -> ttrpc::Result<u32> {
        match args[0].as_str() {
            "missing" => {
                let message = r#"exec: "missing": executable file not found in $PATH"#;
                return Err(status(ttrpc::Code::NOT_FOUND, message));
            }
            "hang" => std::future::pending().await,
            _ => {}
        }
        let pid = 100 + self.pids.fetch_add(1, Ordering::Relaxed);
        let process = Process {
            pid,
            args,
            stdin: Mutex::new(self.stream(streams.stdin_token).await),
            stdout: Mutex::new(self.stream(streams.stdout_token).await),
            exit: watch::channel(None).0,
        };
        self.processes
            .lock()
            .unwrap()
            .insert(key, Arc::new(process));
        Ok(pid)
    }

    fn find(&self, key: &Key) -> ttrpc::Result<Arc<Process>> {
        let found = self.processes.lock().unwrap().get(key).cloned();
        found.ok_or_else(|| status(ttrpc::Code::NOT_FOUND, "no such process"))
    }

    fn go(&self, key: &Key) -> ttrpc::Result<()> {
        let process = self.find(key)?;
        tokio::spawn(async move {
            let (stdin, stdout) = (
                process.stdin.lock().unwrap().take(),
                process.stdout.lock().unwrap().take(),
            );
            let code = match process.args[0].as_str() {
                "echo" => {
                    if let Some(mut stdout) = stdout {
                        stdout
                            .write_all(process.args[1..].join(" ").as_bytes())
                            .await
                            .unwrap();
                    }
                    0
                }
                "cat" => {
                    let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
                    tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
                    0
                }
                "exit" => process.args[1].parse().unwrap(),
                _ => return,
            };
            process.exit.send_replace(Some(code));
        });
        Ok(())
    }

    fn kill(&self, key: &Key, signal: u32) -> ttrpc::Result<()> {
        let process = self.find(key)?;
        if process.exit.borrow().is_some() {
            return Err(status(ttrpc::Code::NOT_FOUND, "process already finished"));
        }
        process.stdout.lock().unwrap().take();
        process.exit.send_replace(Some(128 + signal));
        Ok(())
    }
}

fn status(code: ttrpc::Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

fn key(process: &agent::Process) -> Key {
    (process.container_id.clone(), process.exec_id.clone())
}

fn args(json: &[u8], pointer: &str) -> Vec<String> {
    let value: serde_json::Value = serde_json::from_slice(json).unwrap();
    serde_json::from_value(value.pointer(pointer).unwrap().clone()).unwrap()
}

/// What the ttrpc server calls.
struct Handle(Arc<FakeAgent>);

#[async_trait]
impl Agent for Handle {
    async fn prepare(
        &self,
        _: &TtrpcContext,
        _: agent::PrepareRequest,
    ) -> ttrpc::Result<agent::PrepareResponse> {
        self.0.note("prepare".into());
        Ok(agent::PrepareResponse::new())
    }

    async fn identify(
        &self,
        _: &TtrpcContext,
        request: agent::IdentifyRequest,
    ) -> ttrpc::Result<agent::IdentifyResponse> {
        self.0.note(format!("identify {}", request.hostname));
        assert!((32..=256).contains(&request.entropy.len()));
        let mut generation_id = request.generation_id;
        self.0
            .generations
            .lock()
            .unwrap()
            .push(generation_id.clone());
        if self.0.misidentifies.load(Ordering::Relaxed) {
            generation_id[0] ^= 1;
        }
        Ok(agent::IdentifyResponse {
            generation_id,
            ..Default::default()
        })
    }

    async fn attach_device(
        &self,
        _: &TtrpcContext,
        request: agent::AttachDeviceRequest,
    ) -> ttrpc::Result<agent::AttachDeviceResponse> {
        let number = request.slot.number;
        self.0.note(format!("attach {number}"));
        Ok(agent::AttachDeviceResponse {
            name: format!("card{number}"),
            ..Default::default()
        })
    }

    async fn detach_device(
        &self,
        _: &TtrpcContext,
        request: agent::DetachDeviceRequest,
    ) -> ttrpc::Result<agent::DetachDeviceResponse> {
        self.0.note(format!("detach {}", request.slot.number));
        if self.0.clings.load(Ordering::Relaxed) {
            return Err(status(ttrpc::Code::INTERNAL, "its driver hangs"));
        }
        Ok(agent::DetachDeviceResponse::new())
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: agent::SetNetworkRequest,
    ) -> ttrpc::Result<agent::SetNetworkResponse> {
        let devices = request.interfaces.iter().map(|one| one.device.as_str());
        let devices: Vec<_> = devices.collect();
        self.0.note(format!("network {}", devices.join(" ")));
        Ok(agent::SetNetworkResponse::new())
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: agent::CreateRequest,
    ) -> ttrpc::Result<agent::CreateResponse> {
        let args = args(&request.spec_json, "/process/args");
        self.0
            .note(format!("create {} {}", request.container_id, args[0]));
        self.0
            .add(
                (request.container_id, String::new()),
                args,
                &request.streams,
            )
            .await?;
        Ok(agent::CreateResponse::new())
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: agent::StartRequest,
    ) -> ttrpc::Result<agent::StartResponse> {
        self.0.note(format!("start {}", request.container_id));
        self.0.go(&(request.container_id, String::new()))?;
        Ok(agent::StartResponse::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: agent::ExecRequest,
    ) -> ttrpc::Result<agent::ExecResponse> {
        let key = (request.container_id, request.exec_id);
        let guest_pid = self
            .0
            .add(
                key.clone(),
                args(&request.process_json, "/args"),
                &request.streams,
            )
            .await?;
        self.0.go(&key)?;
        Ok(agent::ExecResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: agent::SignalRequest,
    ) -> ttrpc::Result<agent::SignalResponse> {
        let key = key(&request.process);
        self.0.note(format!(
            "signal {} {} {}",
            key.0, request.signal, request.all
        ));
        if request.all {
            let all: Vec<Key> = self
                .0
                .processes
                .lock()
                .unwrap()
                .keys()
                .filter(|one| one.0 == key.0)
                .cloned()
                .collect();
            for one in all {
                let _ = self.0.kill(&one, request.signal);
            }
            return Ok(agent::SignalResponse::new());
        }
        self.0.kill(&key, request.signal)?;
        Ok(agent::SignalResponse::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: agent::WaitRequest,
    ) -> ttrpc::Result<agent::WaitResponse> {
        let process = self.0.find(&key(&request.process))?;
        let mut exit = process.exit.subscribe();
        let code = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(agent::WaitResponse {
            exit_status: code,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: agent::DeleteRequest,
    ) -> ttrpc::Result<agent::DeleteResponse> {
        let key = key(&request.process);
        self.0.note(format!("delete {}", key.0));
        self.0.processes.lock().unwrap().remove(&key);
        Ok(agent::DeleteResponse::new())
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: agent::PidsRequest,
    ) -> ttrpc::Result<agent::PidsResponse> {
        let processes = self.0.processes.lock().unwrap();
        let running = processes
            .iter()
            .filter(|(key, one)| key.0 == request.container_id && one.exit.borrow().is_none());
        Ok(agent::PidsResponse {
            guest_pids: running.map(|(_, one)| one.pid).collect(),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: agent::StatsRequest,
    ) -> ttrpc::Result<agent::StatsResponse> {
        self.0.find(&(request.container_id, String::new()))?;
        Ok(agent::StatsResponse {
            pids_current: 7,
            io: vec![agent::IoStats::default(); 5000],
            ..Default::default()
        })
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateRequest,
    ) -> ttrpc::Result<agent::UpdateResponse> {
        let resources = String::from_utf8(request.resources_json).unwrap();
        self.0
            .note(format!("update {} {resources}", request.container_id));
        Ok(agent::UpdateResponse::new())
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: agent::PauseRequest,
    ) -> ttrpc::Result<agent::PauseResponse> {
        self.0.note(format!("pause {}", request.container_id));
        Ok(agent::PauseResponse::new())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: agent::ResumeRequest,
    ) -> ttrpc::Result<agent::ResumeResponse> {
        self.0.note(format!("resume {}", request.container_id));
        Ok(agent::ResumeResponse::new())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: agent::ShutdownRequest,
    ) -> ttrpc::Result<agent::ShutdownResponse> {
        self.0.note("shutdown".into());
        let _ = UnixStream::connect(&self.0.power).await;
        std::future::pending().await
    }
}
