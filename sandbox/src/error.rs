//! What a caller of the library gets when a call fails.

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::disks::DiskError;
use crate::folder::FolderError;
use crate::guest::AgentError;
use crate::hooks::HookError;
use crate::hotplug::HotplugError;
use crate::ids::IdError;
use crate::images::ImageError;
use crate::mounts::MountError;
use crate::network::NetworkError;
use crate::sizing::SizeError;
use crate::spec::SpecError;
use crate::stdio::StdioError;
use crate::vmm::VmEnd;
use std::sync::Arc;

/// Result of a call to the library.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// An id breaks the rules for ids.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The configuration can't be read or used.
    #[error(transparent)]
    Config(Arc<ConfigError>),
    /// The bundle's spec can't be read or honoured.
    #[error(transparent)]
    Spec(Arc<SpecError>),
    /// The machine that was asked for doesn't fit.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The guest kernel, the guest root image or /dev/kvm can't be used.
    #[error(transparent)]
    Image(Arc<ImageError>),
    /// The VM could not be brought up.
    #[error(transparent)]
    Boot(Arc<BootError>),
    /// The sandbox's runtime folder could not be made or removed.
    #[error(transparent)]
    Folder(Arc<FolderError>),
    /// The container's root file system or one of its bind mounts could not be mounted.
    #[error(transparent)]
    Mount(Arc<MountError>),
    /// A standard stream can't be opened.
    #[error(transparent)]
    Stdio(Arc<StdioError>),
    /// A hook failed.
    #[error(transparent)]
    Hook(Arc<HookError>),
    /// The agent refused a call or didn't answer.
    #[error(transparent)]
    Agent(Arc<AgentError>),
    /// The agent could not set up a container or an exec.
    #[error("OCI runtime {verb} failed: {cause}")]
    Runtime {
        /// `create` or `exec`.
        verb: &'static str,
        /// What the agent said; a missing executable is named there.
        cause: Arc<AgentError>,
    },
    /// A disk can't be attached.
    #[error(transparent)]
    Disk(Arc<DiskError>),
    /// The VM can't have the memory that its containers' limits need.
    #[error(transparent)]
    Hotplug(#[from] HotplugError),
    /// The pod's network could not be made the guest's.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The VM ended.
    #[error("the sandbox's virtual machine has ended: {0}")]
    VmEnded(VmEnd),
    /// There is no such container or exec.
    #[error("{0} not found in this sandbox")]
    NotFound(String),
    /// The id is taken.
    #[error("{0} already exists in this sandbox")]
    AlreadyExists(String),
    /// The process was signalled after its end.
    #[error("process already finished")]
    AlreadyFinished,
    /// The call doesn't fit the process's state.
    #[error("cannot {verb} {process}: it is {state}")]
    WrongState {
        /// What was asked for.
        verb: &'static str,
        /// The container or exec.
        process: String,
        /// What it is instead.
        state: &'static str,
    },
    /// A request that makes no sense whatever the state.
    #[error("{0}")]
    Invalid(String),
    /// The sandbox's task has ended; only at the shim's exit.
    #[error("the sandbox is shutting down")]
    ShuttingDown,
}

/// The kinds of failure that callers act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No such object, or it is already gone.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Right call, wrong moment.
    FailedPrecondition,
    /// Wrong call.
    InvalidArgument,
    /// The guest didn't answer in time.
    DeadlineExceeded,
    /// The sandbox can't serve any call any more.
    Unavailable,
    /// Asked for something that exists but isn't supported.
    Unimplemented,
    /// Any other failure.
    Unknown,
}

impl Error {
    /// What kind of failure this is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Id(_) | Error::Config(_) | Error::Invalid(_) => Kind::InvalidArgument,
            Error::Spec(error) => error.kind(),
            Error::Size(_) => Kind::InvalidArgument,
            Error::Stdio(error) => error.kind(),
            Error::Agent(error) => error.kind(),
            Error::Hotplug(error) => error.kind(),
            Error::Disk(error) => error.kind(),
            // What isn't found then is the executable or the root, not the container: daemons take
            // NotFound for the latter.
            Error::Runtime { cause, .. } => match cause.kind() {
                Kind::NotFound => Kind::Unknown,
                kind => kind,
            },
            Error::NotFound(_) | Error::AlreadyFinished => Kind::NotFound,
            Error::AlreadyExists(_) => Kind::AlreadyExists,
            Error::WrongState { .. } => Kind::FailedPrecondition,
            Error::VmEnded(_) | Error::ShuttingDown => Kind::Unavailable,
            Error::Image(_)
            | Error::Boot(_)
            | Error::Folder(_)
            | Error::Mount(_)
            | Error::Network(_)
            | Error::Hook(_) => Kind::Unknown,
        }
    }
}

macro_rules! shared_cause {
    ($($variant:ident($cause:ty)),* $(,)?) => {$(
        impl From<$cause> for Error {
            fn from(cause: $cause) -> Self {
                Error::$variant(Arc::new(cause))
            }
        }
    )*};
}

shared_cause!(
    Config(ConfigError),
    Spec(SpecError),
    Image(ImageError),
    Boot(BootError),
    Folder(FolderError),
    Mount(MountError),
    Stdio(StdioError),
    Hook(HookError),
    Agent(AgentError),
    Disk(DiskError),
);
