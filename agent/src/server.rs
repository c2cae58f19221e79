//! The `Agent` service: decodes requests, calls [`Containers`], encodes answers.

use crate::container::Containers;
use crate::error::{Context, Failure, Kind};
use crate::init::{self, Guest, Surroundings};
use crate::log;
use crate::network::{Network, forward};
use crate::process::Spawner;
use crate::reaper::Reaper;
use crate::streams::PendingStreams;
use crate::transport::{Listener, knock, listen_unix, listen_vsock};
use async_trait::async_trait;
use bulkhead_proto::agent::{
    Agent, AttachDeviceRequest, AttachDeviceResponse, CreateRequest, CreateResponse, DeleteRequest,
    DeleteResponse, DetachDeviceRequest, DetachDeviceResponse, ExecRequest, ExecResponse,
    IdentifyRequest, IdentifyResponse, InfoRequest, InfoResponse, PauseRequest, PauseResponse,
    PidsRequest, PidsResponse, PrepareRequest, PrepareResponse, ResizeRequest, ResizeResponse,
    ResumeRequest, ResumeResponse, SetNetworkRequest, SetNetworkResponse, ShutdownRequest,
    ShutdownResponse, SignalRequest, SignalResponse, StartRequest, StartResponse, StatsRequest,
    StatsResponse, UpdateRequest, UpdateResponse, WaitRequest, WaitResponse, create_agent,
};
use bulkhead_proto::guest::{AGENT_PORT, FORWARD_PORT, READY_PORT, STREAM_PORT};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use ttrpc::asynchronous::TtrpcContext;

/// The sockets that the host knows.
pub struct Doors {
    requests: OwnedFd,
    streams: OwnedFd,
    /// Kept open, since closing it could take the knock back before it has been heard.
    _knock: Option<OwnedFd>,
}

/// Listens, and tells the host so. This is all that comes before the agent counts as ready: what
/// arrives from now on waits in the kernel until [`serve`] takes it.
pub fn listen(surroundings: &Surroundings) -> Result<Doors, Failure> {
    let (requests, streams) = match surroundings {
        Surroundings::Guest => (listen_vsock(AGENT_PORT), listen_vsock(STREAM_PORT)),
        Surroundings::Outside { sockets, .. } => (
            listen_unix(&sockets.join("agent.sock")),
            listen_unix(&sockets.join("stream.sock")),
        ),
    };
    let requests = requests.context(|| "listen for the host's requests")?;
    let streams = streams.context(|| "listen for the host's streams")?;
    let knock = match surroundings {
        Surroundings::Guest => {
            Some(knock(READY_PORT).context(|| "tell the host that the agent is ready")?)
        }
        Surroundings::Outside { .. } => None,
    };
    Ok(Doors {
        requests,
        streams,
        _knock: knock,
    })
}

/// Serves for ever. Must run on the runtime's only thread.
pub async fn serve(surroundings: Surroundings, doors: Doors, null: OwnedFd) -> Result<(), Failure> {
    if matches!(surroundings, Surroundings::Outside { .. }) {
        init::take_default_signals();
        init::adopt_orphans().context(|| "become the parent of orphans")?;
    }
    if matches!(surroundings, Surroundings::Guest) {
        // A kernel without a log only keeps what goes wrong to itself.
        let _ = log::to_kernel();
    }
    init::raise_descriptor_limit(&surroundings)
        .context(|| "raise the agent's limit of descriptors")?;
    // Nobody connects there before the guest has a network, so it isn't among the doors.
    let forwards = match &surroundings {
        Surroundings::Guest => listen_vsock(FORWARD_PORT),
        Surroundings::Outside { sockets, .. } => listen_unix(&sockets.join("forward.sock")),
    };
    let forwards = forwards
        .and_then(Listener::new)
        .context(|| "listen for connections to the guest's loopback")?;
    let guest = Arc::new(Guest::new(surroundings));
    if let Err(failure) = guest.prepare() {
        // Tried again by the first Create, which then reports it.
        log::error(failure);
    }
    let reaper = Reaper::default();
    let streams = PendingStreams::default();
    let containers = Containers::new(
        guest.clone(),
        Spawner::new(reaper.clone(), null),
        streams.clone(),
    );
    let requests = Listener::new(doors.requests).context(|| "accept the host's requests")?;
    let connections = Listener::new(doors.streams).context(|| "accept the host's streams")?;
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(ttrpc::asynchronous::transport::Listener::new(requests))
        .register_service(create_agent(Arc::new(Service {
            containers,
            guest,
            network: Network::default(),
        })));
    server
        .start()
        .await
        .context(|| "serve the host's requests")?;
    tokio::spawn(streams.accept(connections));
    tokio::spawn(forward::serve(forwards));
    reaper
        .run()
        .await
        .context(|| "watch for exited processes")?;
    Ok(())
}

struct Service {
    containers: Containers,
    guest: Arc<Guest>,
    network: Network,
}

impl Service {
    /// Runs a verb that changes something to its end, even when the request is cancelled because
    /// its time is up or the host has closed the connection.
    async fn complete<T, F>(&self, verb: impl FnOnce(Containers) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        match tokio::spawn(verb(self.containers.clone())).await {
            Ok(result) => result.map_err(to_status),
            Err(ended) => Err(to_status(Failure::internal("carry the request out", ended))),
        }
    }
}

/// The one place where failures become ttrpc status codes.
fn to_status(failure: Failure) -> ttrpc::Error {
    let code = match failure.kind {
        Kind::NotFound => ttrpc::Code::NOT_FOUND,
        Kind::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Kind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Kind::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Kind::Internal => ttrpc::Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, failure.message))
}

#[async_trait]
impl Agent for Service {
    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        let memory = rustix::system::sysinfo();
        let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count());
        Ok(InfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            online_cpus: cpus,
            memory_total_bytes: memory.totalram.saturating_mul(u64::from(memory.mem_unit)),
            ..Default::default()
        })
    }

    async fn prepare(&self, _: &TtrpcContext, _: PrepareRequest) -> ttrpc::Result<PrepareResponse> {
        self.complete(|containers| async move { containers.prepare().await })
            .await?;
        Ok(PrepareResponse::default())
    }

    async fn identify(
        &self,
        _: &TtrpcContext,
        request: IdentifyRequest,
    ) -> ttrpc::Result<IdentifyResponse> {
        let identified = self.containers.identify(&request).map_err(to_status)?;
        Ok(IdentifyResponse {
            generation_id: identified.to_vec(),
            ..Default::default()
        })
    }

    async fn attach_device(
        &self,
        _: &TtrpcContext,
        request: AttachDeviceRequest,
    ) -> ttrpc::Result<AttachDeviceResponse> {
        let device = self
            .guest
            .slots()
            .and_then(|slots| slots.attach(&request.slot));
        let device = device.map_err(to_status)?;
        let (major, minor) = device.number().map_err(to_status)?;
        Ok(AttachDeviceResponse {
            name: device.name().to_owned(),
            major,
            minor,
            ..Default::default()
        })
    }

    async fn detach_device(
        &self,
        _: &TtrpcContext,
        request: DetachDeviceRequest,
    ) -> ttrpc::Result<DetachDeviceResponse> {
        let detached = self
            .guest
            .slots()
            .and_then(|slots| slots.detach(&request.slot));
        detached.map_err(to_status)?;
        Ok(DetachDeviceResponse::default())
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateRequest,
    ) -> ttrpc::Result<CreateResponse> {
        let guest_pid = self
            .complete(|containers| async move { containers.create(request).await })
            .await?;
        Ok(CreateResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.complete(|containers| async move { containers.start(&request.container_id).await })
            .await?;
        Ok(StartResponse::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        let guest_pid = self
            .complete(|containers| async move { containers.exec(request).await })
            .await?;
        Ok(ExecResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: SignalRequest,
    ) -> ttrpc::Result<SignalResponse> {
        self.containers.signal(&request).map_err(to_status)?;
        Ok(SignalResponse::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self
            .containers
            .wait(&request.process)
            .await
            .map_err(to_status)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at_seconds: exit.seconds,
            exited_at_nanos: exit.nanos,
            oom_killed: exit.oom_killed,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        self.complete(|containers| async move { containers.delete(&request.process).await })
            .await?;
        Ok(DeleteResponse::default())
    }

    async fn resize(
        &self,
        _: &TtrpcContext,
        request: ResizeRequest,
    ) -> ttrpc::Result<ResizeResponse> {
        self.containers.resize(&request).map_err(to_status)?;
        Ok(ResizeResponse::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let guest_pids = self
            .containers
            .pids(&request.container_id)
            .map_err(to_status)?;
        Ok(PidsResponse {
            guest_pids,
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.containers.stats(&request.container_id);
        stats.map_err(to_status)
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: UpdateRequest,
    ) -> ttrpc::Result<UpdateResponse> {
        self.containers.update(&request).map_err(to_status)?;
        Ok(UpdateResponse::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<PauseResponse> {
        self.complete(|containers| async move { containers.pause(&request.container_id).await })
            .await?;
        Ok(PauseResponse::default())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: ResumeRequest,
    ) -> ttrpc::Result<ResumeResponse> {
        self.complete(|containers| async move { containers.resume(&request.container_id).await })
            .await?;
        Ok(ResumeResponse::default())
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> ttrpc::Result<SetNetworkResponse> {
        self.network.set(&request).map_err(to_status)?;
        Ok(SetNetworkResponse::default())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        self.complete(|containers| async move { containers.shutdown().await })
            .await?;
        Ok(ShutdownResponse::default())
    }
}
