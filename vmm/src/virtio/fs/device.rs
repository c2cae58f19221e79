//! The file-system device as its transport sees it, and its worker.

use super::super::buffers::Buffers;
use super::super::queue::{Chain, RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{
    Activation, DeviceError, DeviceState, DeviceType, F_EVENT_IDX, SuspendError, VirtioDevice,
    mismatch,
};
use super::guard::{Guard, MAX_IO};
use super::sync::{SYNCFS, sync_all};
use crate::event_loop::EventLoopHandle;
use bulkhead_proto::guest::SHARE_TAG;
use event_manager::{EventOps, Events, MutEventSubscriber};
use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::filesystem::{FileSystem, FsOptions};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// High-priority queue (FORGET and INTERRUPT), then the request queue. The size of the second
/// bounds Linux's requests: 1 MiB is 256 pages, with four more descriptors at most.
const QUEUE_SIZES: [u16; 2] = [32, 512];
/// Request queues in the configuration space.
const REQUEST_QUEUES: u32 = 1;
/// Longest chain.
const MAX_DESCRIPTORS: usize = 512;
/// Requests of each queue for each wake-up, after which the guest hears of them.
const REQUESTS_PER_WAKE_UP: usize = 16;
/// Most bytes of a request or reply: [`MAX_IO`] and room for all headers and names.
const MAX_MESSAGE: usize = MAX_IO as usize + (64 << 10);
/// Fewer descriptors than this are soon used up by a container.
const FILES_EXPECTED: u64 = 1 << 16;
/// How long the guest may use what it knows of names and attributes. The share is the pod's own;
/// what the host changes under it (volumes that it updates) shows up within this time.
const CACHE_TIME: Duration = Duration::from_secs(10);

/// Why a file-system device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The limit on open files could not be raised.
    #[error("raising the limit on open files to {hard} failed: {source}")]
    Limit {
        /// The hard limit.
        hard: u64,
        /// Why it failed.
        source: nix::Error,
    },
    /// The server could not be set up.
    #[error(
        "preparing the file server of the share failed: {0}; the share must be a folder and /proc \
         be mounted"
    )]
    Server(#[source] io::Error),
    /// The folder could not be opened.
    #[error(
        "opening the share through {path} failed: {source}; it must be a folder's descriptor and \
         /proc be mounted"
    )]
    Share {
        /// As opened.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// The virtio-fs device.
pub struct FsDevice {
    file_system: Arc<Guard>,
    worker: WorkerSlot<FsWorker>,
    /// Named by the server's root path, so it stays open as long as the server.
    share: Arc<OwnedFd>,
}

impl FsDevice {
    /// Serves the folder `share`, of which an O_PATH descriptor does. `events` is a loop of this
    /// device alone. Sets the process's umask to 0 and raises its soft limit on open files to the
    /// hard one: the server holds a descriptor for every file that the guest knows, which is
    /// thousands for an ordinary container.
    ///
    /// Needs /proc here, and later for extended attributes and when the guest mounts.
    pub fn new(share: OwnedFd, events: EventLoopHandle) -> Result<Self, FsError> {
        raise_open_files()?;
        // With "/.", the link in /proc is followed although the server opens with O_NOFOLLOW.
        let path = format!("/proc/self/fd/{}/.", share.as_raw_fd());
        let config = Config {
            root_dir: path.clone(),
            entry_timeout: CACHE_TIME,
            attr_timeout: CACHE_TIME,
            cache_policy: CachePolicy::Auto,
            writeback: false,
            xattr: true,
            // Has the server open the root and check names by itself.
            do_import: true,
            killpriv_v2: true,
            // File handles would need CAP_DAC_READ_SEARCH, with which any file of the host's file
            // system can be opened.
            inode_file_handles: false,
            use_host_ino: false,
            ..Config::default()
        };
        let file_system = PassthroughFs::new(config).map_err(FsError::Server)?;
        file_system
            .import()
            .map_err(|source| FsError::Share { path, source })?;
        Ok(FsDevice {
            file_system: Arc::new(Guard::new(file_system)),
            worker: WorkerSlot::new(DeviceType::Fs, events),
            share: Arc::new(share),
        })
    }
}

fn raise_open_files() -> Result<(), FsError> {
    let failed = |hard| move |source| FsError::Limit { hard, source };
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed(0))?;
    if hard < FILES_EXPECTED {
        tracing::warn!(
            "only {hard} files can be open (the hard limit of RLIMIT_NOFILE): the guest will get \
             EMFILE when it uses more; raise it to {FILES_EXPECTED} or more"
        );
    }
    if soft == hard {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed(hard))
}

impl VirtioDevice for FsDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn device_features(&self) -> u64 {
        F_EVENT_IDX
    }

    /// struct virtio_fs_config (§5.11.4) up to what VIRTIO_FS_F_NOTIFICATION would add.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 36];
        for (to, from) in config.iter_mut().zip(SHARE_TAG.bytes()) {
            *to = from;
        }
        config.extend(REQUEST_QUEUES.to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.worker.start(FsWorker {
            server: Server::new(self.file_system.clone()),
            share: Arc::clone(&self.share),
            context: WorkerContext::new(DeviceType::Fs, activation.mem, activation.interrupt),
            queues: activation.queues,
        })
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        // The next driver knows none of this one's files. Forgetting them opens the share's root
        // anew, which is only allowed on the worker's thread.
        let file_system = Arc::clone(&self.file_system);
        self.worker.with(move |_| file_system.destroy())?;
        let worker = self.worker.stop()?;
        Ok(worker.map_or_else(Vec::new, |worker| worker.queues))
    }

    /// Entries and handles name files that only this server has open, so the client must hold
    /// none.
    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        let Some(worker) = self.worker.stop()? else {
            return Ok((Vec::new(), DeviceState::None));
        };
        let (entries, handles) = self.file_system.held().counts();
        if (entries, handles) != (0, 0) {
            worker.queues.iter().for_each(Virtqueue::rearm);
            self.worker.start(worker)?;
            return Err(SuspendError::InUse {
                device: DeviceType::Fs,
                what: format!("the guest knows {entries} files and has {handles} open"),
            });
        }
        let state = DeviceState::Fs {
            capable: self.file_system.negotiated().map(|options| options.bits()),
        };
        Ok((worker.queues, state))
    }

    /// A new server negotiates once more what the client believes to be negotiated. It opens the
    /// share for that, so this thread must still be allowed to.
    fn resume(&mut self, activation: Activation, state: DeviceState) -> Result<(), SuspendError> {
        let DeviceState::Fs { capable } = state else {
            return Err(mismatch(DeviceType::Fs, state));
        };
        let capable = capable.map(FsOptions::from_bits_truncate);
        if let Some(capable) = capable
            && self.file_system.negotiated() != Some(capable)
        {
            self.file_system
                .init(capable)
                .map_err(|error| SuspendError::Mismatch {
                    device: DeviceType::Fs,
                    what: format!("its file server could not be initialised: {error}"),
                })?;
        }
        Ok(self.activate(activation)?)
    }
}

/// Serves both queues on the event loop's thread.
struct FsWorker {
    server: Server<Arc<Guard>>,
    share: Arc<OwnedFd>,
    context: WorkerContext,
    queues: Vec<Virtqueue>,
}

impl FsWorker {
    fn serve(&mut self) -> Result<(), RingError> {
        let WorkerContext { mem, interrupt, .. } = &self.context;
        let (server, share) = (&self.server, self.share.as_fd());
        for queue in &mut self.queues {
            queue.serve(mem, interrupt, REQUESTS_PER_WAKE_UP, |chain| {
                // Refuses broken chains, which the server's own walk would take for short ones.
                Buffers::collect(chain.clone(), mem, MAX_DESCRIPTORS)?;
                Ok(answer(server, share, chain, mem).unwrap_or(0))
            })?;
        }
        Ok(())
    }
}

/// Has the server answer one request; gives the length of its answer, none if it gave none. Its
/// reasons are not logged: a guest could fill the log with them.
fn answer(
    server: &Server<Arc<Guard>>,
    share: BorrowedFd<'_>,
    chain: Chain,
    mem: &GuestMemoryMmap,
) -> Option<u32> {
    // From here on, descriptors are not looked at again: what is measured is what is used.
    let reader = Reader::from_descriptor_chain(mem, chain.clone()).ok()?;
    let writer = VirtioFsWriter::new(mem, chain).ok()?;
    if reader.available_bytes() > MAX_MESSAGE || writer.available_bytes() > MAX_MESSAGE {
        return None;
    }
    let (again, refusal) = (reader.clone(), writer.clone());
    let header: Option<InHeader> = reader.clone().read_obj().ok();
    if let Some(header) = header.filter(|header| header.opcode == SYNCFS) {
        let failed = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let error = sync_all(share).map_or_else(failed, |()| 0);
        return reply(refusal, &header, error);
    }
    match server.handle_message(reader, writer.into(), None, None) {
        Ok(len) => u32::try_from(len).ok(),
        // What the server can't parse it mostly doesn't answer, so that a client would wait.
        Err(_) => refuse(again, refusal),
    }
}

/// Answers EINVAL to a request that wants an answer.
fn refuse(mut request: Reader, answer: VirtioFsWriter) -> Option<u32> {
    let header: InHeader = request.read_obj().ok()?;
    if [Opcode::Forget, Opcode::BatchForget]
        .iter()
        .any(|opcode| *opcode as u32 == header.opcode)
    {
        return None;
    }
    reply(answer, &header, libc::EINVAL)
}

/// Answers with an error's number, or 0, alone.
fn reply(mut answer: VirtioFsWriter, header: &InHeader, error: i32) -> Option<u32> {
    let len = size_of::<OutHeader>() as u32;
    let error = error.checked_neg()?;
    let unique = header.unique;
    answer.write_obj(OutHeader { len, error, unique }).ok()?;
    Some(len)
}

impl MutEventSubscriber for FsWorker {
    fn init(&mut self, ops: &mut EventOps) {
        for queue in &self.queues {
            queue.watch(ops, 0);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if !self.context.broken() {
            let result = self.serve();
            self.context.check(result);
        }
    }
}
