//! A CRI client as kubelet is one: gRPC over containerd's socket, one call at a time.

use super::stream::Stream;
use bulkhead_tests::containerd::{Containerd, IMAGE, SANDBOX_IMAGE};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AttachRequest, ContainerConfig, ContainerState, ContainerStats, ContainerStatsFilter,
    ContainerStatsRequest, ContainerStatus, ContainerStatusRequest, CreateContainerRequest,
    ExecRequest, ExecSyncRequest, ExecSyncResponse, ListContainerStatsRequest, PodSandboxConfig,
    PodSandboxStats, PodSandboxStatsRequest, PodSandboxStatus, PodSandboxStatusRequest,
    PortForwardRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    RuntimeHandlerFeatures, StartContainerRequest, StatusRequest, StopContainerRequest,
    StopPodSandboxRequest,
};
use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// The name of the runtime's table in docs/kubernetes, and of the RuntimeClass's handler.
const HANDLER: &str = "bulkhead";

/// Longest that a call may take: a boot, or a stop with its grace time.
const CALL_LIMIT: Duration = Duration::from_secs(120);

type Answer<T> = Result<T, Status>;

/// A connection to containerd's CRI plugin.
pub struct Client {
    runtime: Runtime,
    service: RuntimeServiceClient<Channel>,
}

impl Client {
    /// Imports the images of all pods, and connects.
    pub fn with_images(containerd: &Containerd) -> Self {
        for image in [IMAGE, SANDBOX_IMAGE] {
            containerd.import_busybox_as(image).unwrap();
        }
        Self::connect(&containerd.socket())
    }

    pub fn connect(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let address = format!("unix://{}", socket.display());
        let channel = runtime
            .block_on(Endpoint::from_shared(address).unwrap().connect())
            .unwrap();
        let service = RuntimeServiceClient::new(channel);
        Self { runtime, service }
    }

    /// Waits for the answer of a call.
    fn answer<T>(&self, call: impl Future<Output = Answer<Response<T>>>) -> Answer<T> {
        let limited = async { tokio::time::timeout(CALL_LIMIT, call).await };
        match self.runtime.block_on(limited) {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer of containerd")),
        }
    }

    pub fn run_pod(&self, config: &PodSandboxConfig) -> Answer<String> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: HANDLER.into(),
        };
        let answer = self.answer(self.service.clone().run_pod_sandbox(request))?;
        Ok(answer.pod_sandbox_id)
    }

    pub fn pod_status(&self, pod: &str) -> Answer<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.into(),
            verbose: false,
        };
        let answer = self.answer(self.service.clone().pod_sandbox_status(request))?;
        Ok(answer.status.unwrap_or_default())
    }

    pub fn stop_pod(&self, pod: &str) -> Answer<()> {
        let pod_sandbox_id = pod.into();
        let request = StopPodSandboxRequest { pod_sandbox_id };
        self.answer(self.service.clone().stop_pod_sandbox(request))
            .map(drop)
    }

    pub fn remove_pod(&self, pod: &str) -> Answer<()> {
        let pod_sandbox_id = pod.into();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        self.answer(self.service.clone().remove_pod_sandbox(request))
            .map(drop)
    }

    pub fn create(
        &self,
        pod: &str,
        container: ContainerConfig,
        config: &PodSandboxConfig,
    ) -> Answer<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let answer = self.answer(self.service.clone().create_container(request))?;
        Ok(answer.container_id)
    }

    pub fn start(&self, container: &str) -> Answer<()> {
        let container_id = container.into();
        let request = StartContainerRequest { container_id };
        self.answer(self.service.clone().start_container(request))
            .map(drop)
    }

    pub fn stop(&self, container: &str, grace_seconds: i64) -> Answer<()> {
        let request = StopContainerRequest {
            container_id: container.into(),
            timeout: grace_seconds,
        };
        self.answer(self.service.clone().stop_container(request))
            .map(drop)
    }

    pub fn remove(&self, container: &str) -> Answer<()> {
        let container_id = container.into();
        let request = RemoveContainerRequest { container_id };
        self.answer(self.service.clone().remove_container(request))
            .map(drop)
    }

    pub fn status(&self, container: &str) -> Answer<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: container.into(),
            verbose: false,
        };
        let answer = self.answer(self.service.clone().container_status(request))?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Waits until the container has exited.
    pub fn exited(&self, container: &str) -> ContainerStatus {
        let end = Instant::now() + CALL_LIMIT;
        loop {
            let status = self.status(container).unwrap();
            if status.state() == ContainerState::ContainerExited {
                return status;
            }
            assert!(Instant::now() < end, "does not end: {status:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub fn exec(&self, container: &str, argv: &[&str]) -> Answer<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: container.into(),
            cmd: argv.iter().map(|word| (*word).into()).collect(),
            timeout: 100,
        };
        self.answer(self.service.clone().exec_sync(request))
    }

    /// What a shell script in the container prints; it must succeed.
    pub fn shell(&self, container: &str, script: &str) -> String {
        let answer = self.exec(container, &["sh", "-c", script]).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&answer.stdout), text(&answer.stderr));
        let code = answer.exit_code;
        assert!(code == 0, "{script}: {code} {stdout:?} {stderr:?}");
        stdout.trim_end().to_owned()
    }

    /// What containerd knows that the runtime can do.
    pub fn handler_features(&self) -> RuntimeHandlerFeatures {
        let status = self.answer(self.service.clone().status(StatusRequest::default()));
        let handlers = status.unwrap().runtime_handlers;
        let ours = handlers.into_iter().find(|handler| handler.name == HANDLER);
        ours.unwrap_or_default().features.unwrap_or_default()
    }

    /// The pod's own statistics.
    pub fn pod_stats(&self, pod: &str) -> Answer<PodSandboxStats> {
        let pod_sandbox_id = pod.into();
        let request = PodSandboxStatsRequest { pod_sandbox_id };
        let answer = self.answer(self.service.clone().pod_sandbox_stats(request))?;
        Ok(answer.stats.unwrap_or_default())
    }

    pub fn stats(&self, container: &str) -> Answer<ContainerStats> {
        let container_id = container.into();
        let request = ContainerStatsRequest { container_id };
        let answer = self.answer(self.service.clone().container_stats(request))?;
        Ok(answer.stats.unwrap_or_default())
    }
    /// The statistics of all containers of a pod.
    pub fn all_stats(&self, pod: &str) -> Answer<Vec<ContainerStats>> {
        let filter = ContainerStatsFilter {
            pod_sandbox_id: pod.into(),
            ..Default::default()
        };
        let request = ListContainerStatsRequest {
            filter: Some(filter),
        };
        let answer = self.answer(self.service.clone().list_container_stats(request))?;
        Ok(answer.stats)
    }

    /// Executes a command with a terminal.
    pub fn exec_terminal(&self, container: &str, argv: &[&str]) -> Answer<Stream> {
        let request = ExecRequest {
            container_id: container.into(),
            cmd: argv.iter().map(|word| (*word).into()).collect(),
            tty: true,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        let answer = self.answer(self.service.clone().exec(request))?;
        Ok(Stream::open(&answer.url))
    }

    /// The URL under which a connection to a port of a pod's can be had.
    pub fn port_forward(&self, pod: &str, port: u16) -> Answer<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.into(),
            port: vec![port.into()],
        };
        let answer = self.answer(self.service.clone().port_forward(request))?;
        Ok(answer.url)
    }

    /// Attaches to a container that has a terminal.
    pub fn attach_terminal(&self, container: &str) -> Answer<Stream> {
        let request = AttachRequest {
            container_id: container.into(),
            stdin: true,
            tty: true,
            stdout: true,
            stderr: false,
        };
        let answer = self.answer(self.service.clone().attach(request))?;
        Ok(Stream::open(&answer.url))
    }
}
