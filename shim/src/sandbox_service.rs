//! The sandbox API of containerd 2.x, beside the Task service: a pod without a task of its own.
//! Each method decodes the request, makes a call or two to the sandbox, and encodes the answer.

use crate::metrics;
use crate::options::{self, config_source, pod_sandbox};
use crate::publisher::{self, timestamp};
use crate::status::RequestError;
use async_trait::async_trait;
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::ids::{ContainerId, ProcessId};
use bulkhead_sandbox::{CreateContainer, Error, ProcessState, Sandbox, Status, StdioPaths};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxApi, create_sandbox};
use containerd_shim_protos::types::platform;
use protobuf::MessageField;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

/// States by the names of CRI's PodSandboxState, which containerd passes on to kubelet.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// One shim's sandbox service.
pub struct SandboxService {
    /// The only sandbox that this shim has.
    id: String,
    sandbox: Sandbox,
    leave: Arc<Notify>,
}

type Answer<T> = ttrpc::Result<T>;

impl SandboxService {
    /// A service for `sandbox`, whose id is `id`; rings `leave` when the shim should end.
    pub fn new(id: String, sandbox: Sandbox, leave: Arc<Notify>) -> Self {
        Self { id, sandbox, leave }
    }

    /// The service under its name.
    pub fn into_services(self) -> HashMap<String, Service> {
        create_sandbox(Arc::new(self))
    }

    /// The pod's own container, which stands for the sandbox.
    fn pod(&self, id: &str) -> Result<ContainerId, RequestError> {
        let pod = ContainerId::try_from(id)?;
        if id != self.id {
            return Err(Error::NotFound(format!("sandbox {id}")).into());
        }
        Ok(pod)
    }

    async fn state(&self, id: &str) -> Result<ProcessState, RequestError> {
        let pod = self.pod(id)?;
        Ok(self.sandbox.state(ProcessId::init(pod)).await?)
    }

    async fn create(&self, request: CreateSandboxRequest) -> Result<(), RequestError> {
        let id = self.pod(&request.sandbox_id)?;
        let bundle = PathBuf::from(&request.bundle_path);
        if !bundle.is_absolute() {
            let problem = format!("bundle_path {bundle:?} is not an absolute path");
            return Err(RequestError::Invalid(problem));
        }
        let mut pod = pod_sandbox(request.options.as_ref())?;
        pod.netns =
            Some(PathBuf::from(&request.netns_path)).filter(|path| !path.as_os_str().is_empty());
        let options = options::left_in(&bundle)?;
        let config = Config::find(&config_source(options.as_ref())?)?;
        let container = CreateContainer {
            id,
            bundle,
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            config: Arc::new(config),
            pod: Some(pod),
        };
        self.sandbox.create(container).await?;
        Ok(())
    }

    async fn metrics(&self, id: &str) -> Result<SandboxMetricsResponse, RequestError> {
        let stats = self.sandbox.stats(self.pod(id)?).await?;
        let mut answer = SandboxMetricsResponse::new();
        let metric = answer.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metric.id = id.to_owned();
        metric.data = MessageField::some(publisher::any(&metrics::of(stats)));
        Ok(answer)
    }

    /// Ends what there is of the sandbox; there may be nothing.
    async fn end(&self, id: &str) -> Result<(), RequestError> {
        match self.sandbox.end_pod(self.pod(id)?).await {
            Ok(()) | Err(Error::NotFound(_)) => {}
            // What can't be ended kindly is ended all the same.
            Err(error) => tracing::warn!(%error, "ending the sandbox"),
        }
        Ok(self.sandbox.stop().await?)
    }
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Answer<CreateSandboxResponse> {
        self.create(request).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Answer<StartSandboxResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let started = self.sandbox.start(ProcessId::init(pod)).await;
        let pid = started.map_err(RequestError::from)?;
        let state = self.state(&request.sandbox_id).await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: MessageField::some(timestamp(state.created_at)),
            ..Default::default()
        })
    }

    /// By Go's names, as containerd has them.
    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> Answer<PlatformResponse> {
        self.pod(&request.sandbox_id)?;
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform = platform::Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            ..Default::default()
        };
        Ok(PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    /// The guest's own shutdown has a limit of its own, so the request's isn't needed.
    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Answer<StopSandboxResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        self.sandbox
            .end_pod(pod)
            .await
            .map_err(RequestError::from)?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Answer<WaitSandboxResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let exit = self.sandbox.wait(ProcessId::init(pod)).await;
        let exit = exit.map_err(RequestError::from)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Answer<SandboxStatusResponse> {
        let state = self.state(&request.sandbox_id).await?;
        let exited_at = match state.status {
            Status::Stopped(exit) => MessageField::some(timestamp(exit.at)),
            _ => MessageField::none(),
        };
        let name = match state.status {
            Status::Running | Status::Paused => READY,
            Status::Created | Status::Stopped(_) => NOT_READY,
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: state.pid,
            state: name.into(),
            created_at: MessageField::some(timestamp(state.created_at)),
            exited_at,
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Answer<PingResponse> {
        let alive = self.sandbox.alive(self.pod(&request.sandbox_id)?).await;
        alive.map_err(RequestError::from)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Answer<ShutdownSandboxResponse> {
        self.end(&request.sandbox_id).await?;
        self.leave.notify_one();
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Answer<SandboxMetricsResponse> {
        Ok(self.metrics(&request.sandbox_id).await?)
    }
}
