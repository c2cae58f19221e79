//! The Task service, under both of its names. Each method decodes the request, makes one call to
//! the sandbox, and encodes the answer; what the answer depends on is decided there.

use crate::metrics;
use crate::options::config_source;
use crate::publisher::{self, timestamp};
use crate::status::RequestError;
use async_trait::async_trait;
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::ids::{ContainerId, ExecId, ProcessId};
use bulkhead_sandbox::{
    CreateContainer, Error, ExecProcess, GuestProcess, RootfsMount, Sandbox, Status, StdioPaths,
};
use containerd_shim_protos::api::{
    self, CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse,
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

/// The service's name from containerd 2.0 on, and before.
const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";

/// One shim's Task service.
pub struct TaskService {
    sandbox: Sandbox,
    leave: Arc<Notify>,
    /// A shutdown has come while there were containers.
    shutdown_asked: AtomicBool,
}

/// How long the daemon has to ask again for a shutdown that came too early.
const LAST_CALLS: Duration = Duration::from_secs(3);

type Answer<T> = ttrpc::Result<T>;

impl TaskService {
    /// A service for `sandbox`, which rings `leave` when the shim should end.
    pub fn new(sandbox: Sandbox, leave: Arc<Notify>) -> Self {
        Self {
            sandbox,
            leave,
            shutdown_asked: AtomicBool::new(false),
        }
    }

    /// When a machine dies, containerd 2.x may delete the pod's own container before the others, and
    /// then nobody asks for a shutdown again.
    fn leave_if_empty(&self) {
        let (sandbox, leave) = (self.sandbox.clone(), self.leave.clone());
        tokio::spawn(async move {
            tokio::time::sleep(LAST_CALLS).await;
            if sandbox.is_empty().await.unwrap_or(true) {
                leave.notify_one();
            }
        });
    }

    /// The service under both of its names: the messages are the same.
    pub fn into_services(self) -> HashMap<String, Service> {
        let service: Arc<dyn Task + Send + Sync> = Arc::new(self);
        let mut services = create_task(service.clone());
        if let Some(second) = create_task(service).remove(V3) {
            services.insert(V2.to_owned(), second);
        }
        services
    }
}

fn process(id: &str, exec: &str) -> Result<ProcessId, RequestError> {
    Ok(ProcessId::new(id, exec)?)
}

fn container(id: &str) -> Result<ContainerId, RequestError> {
    Ok(ContainerId::try_from(id)?)
}

fn process_info(process: GuestProcess) -> ProcessInfo {
    let details = process.exec.map(|exec| ProcessDetails {
        exec_id: exec.to_string(),
        ..Default::default()
    });
    ProcessInfo {
        pid: process.pid,
        info: details.map(|details| publisher::any(&details)).into(),
        ..Default::default()
    }
}

fn stdio(stdin: String, stdout: String, stderr: String, terminal: bool) -> StdioPaths {
    StdioPaths {
        stdin,
        stdout,
        stderr,
        terminal,
    }
}

fn unimplemented<T>(message: &'static str) -> Answer<T> {
    Err(RequestError::Unimplemented(message).into())
}

fn create_request(request: CreateTaskRequest) -> Result<CreateContainer, RequestError> {
    if !request.checkpoint.is_empty() {
        return Err(RequestError::Unimplemented(
            "starting from a checkpoint is not supported",
        ));
    }
    let bundle = PathBuf::from(&request.bundle);
    if !bundle.is_absolute() {
        return Err(RequestError::Invalid(format!(
            "bundle {bundle:?} is not an absolute path"
        )));
    }
    let config = Config::find(&config_source(request.options.as_ref())?)?;
    let rootfs = request.rootfs.into_iter().map(|mount| RootfsMount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    Ok(CreateContainer {
        id: ContainerId::try_from(request.id.as_str())?,
        bundle,
        rootfs: rootfs.collect(),
        stdio: stdio(
            request.stdin,
            request.stdout,
            request.stderr,
            request.terminal,
        ),
        config: Arc::new(config),
        pod: None,
    })
}

fn exec_request(request: ExecProcessRequest) -> Result<ExecProcess, RequestError> {
    Ok(ExecProcess {
        container: ContainerId::try_from(request.id.as_str())?,
        exec: ExecId::try_from(request.exec_id.as_str())?,
        process: request.spec.into_option().unwrap_or_default().value,
        stdio: stdio(
            request.stdin,
            request.stdout,
            request.stderr,
            request.terminal,
        ),
    })
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let id = process(&request.id, &request.exec_id)?;
        let state = self.sandbox.state(id).await.map_err(RequestError::from)?;
        if !state.is_task {
            // containerd asks each shim it knows, and lists those that answer as tasks.
            let error = Error::NotFound(format!("task {}", request.id));
            return Err(RequestError::from(error).into());
        }
        let mut answer = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            ..Default::default()
        };
        answer.status = match state.status {
            Status::Created => api::Status::CREATED.into(),
            Status::Running => api::Status::RUNNING.into(),
            Status::Paused => api::Status::PAUSED.into(),
            Status::Stopped(exit) => {
                answer.exit_status = exit.code;
                answer.exited_at = MessageField::some(timestamp(exit.at));
                api::Status::STOPPED.into()
            }
        };
        Ok(answer)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Answer<CreateTaskResponse> {
        let request = create_request(request)?;
        let pid = self
            .sandbox
            .create(request)
            .await
            .map_err(RequestError::from)?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let id = process(&request.id, &request.exec_id)?;
        let pid = self.sandbox.start(id).await.map_err(RequestError::from)?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let id = process(&request.id, &request.exec_id)?;
        let deleted = self.sandbox.delete(id).await.map_err(RequestError::from)?;
        if request.exec_id.is_empty() && self.shutdown_asked.load(Ordering::Relaxed) {
            self.leave_if_empty();
        }
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: MessageField::some(timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    /// The pids are the guest's, and name nothing on the host.
    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let processes = self.sandbox.pids(container(&request.id)?).await;
        let processes = processes.map_err(RequestError::from)?;
        Ok(PidsResponse {
            processes: processes.into_iter().map(process_info).collect(),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let id = process(&request.id, &request.exec_id)?;
        let sent = self.sandbox.signal(id, request.signal, request.all).await;
        sent.map_err(RequestError::from)?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        let request = exec_request(request)?;
        self.sandbox
            .exec(request)
            .await
            .map_err(RequestError::from)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let id = process(&request.id, &request.exec_id)?;
        let resized = self.sandbox.resize(id, request.height, request.width).await;
        resized.map_err(RequestError::from)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        let id = process(&request.id, &request.exec_id)?;
        if request.stdin {
            self.sandbox
                .close_stdin(id)
                .await
                .map_err(RequestError::from)?;
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let id = process(&request.id, &request.exec_id)?;
        let exit = self.sandbox.wait(id).await.map_err(RequestError::from)?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at,
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        // Answers whatever the id: containerd asks before there is a task.
        let task_pid = match ContainerId::try_from(request.id.as_str()) {
            Ok(id) => self
                .sandbox
                .task_pid(id)
                .await
                .map_err(RequestError::from)?
                .unwrap_or(0),
            Err(_) => 0,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Answer<Empty> {
        // Comes after each delete; others of the pod may still be here.
        if request.now || self.sandbox.is_empty().await.map_err(RequestError::from)? {
            self.leave.notify_one();
        } else {
            self.shutdown_asked.store(true, Ordering::Relaxed);
        }
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let paused = self.sandbox.pause(container(&request.id)?).await;
        paused.map_err(RequestError::from)?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let resumed = self.sandbox.resume(container(&request.id)?).await;
        resumed.map_err(RequestError::from)?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        unimplemented("checkpoints are not supported")
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let resources = request.resources.into_option().unwrap_or_default();
        let updated = self
            .sandbox
            .update(container(&request.id)?, resources.value);
        updated.await.map_err(RequestError::from)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let stats = self.sandbox.stats(container(&request.id)?).await;
        let metrics = metrics::of(stats.map_err(RequestError::from)?);
        Ok(StatsResponse {
            stats: MessageField::some(publisher::any(&metrics)),
            ..Default::default()
        })
    }
}
