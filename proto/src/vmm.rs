//! How `bulkhead-vmm` is configured, driven and heard from.
//!
//! The VMM is started with an empty environment, no arguments, and exactly these descriptors:
//!
//! | fd | what |
//! |---|---|
//! | 0, 1 | /dev/null |
//! | 2 | the VMM's own log (lines of text; a file or pipe of the parent's) |
//! | 3 ([`CONFIG_FD`]) | a file or pipe to read one [`VmConfig`] from, as JSON, up to end of file |
//! | others | those that the configuration names by number |
//!
//! Everything privileged (opening files, binding sockets, mounting the share) has been done by the
//! parent before, so the VMM opens nothing by path but what the file-system server needs below the
//! share's root.

use serde::{Deserialize, Serialize};
use std::os::fd::RawFd;

/// Descriptor from which the VMM reads its configuration.
pub const CONFIG_FD: RawFd = 3;

/// Longest JSON line accepted on the control socket, in bytes, newline included.
pub const MAX_CONTROL_LINE: usize = 64 * 1024;

/// Most descriptors that are taken with one request.
pub const MAX_REQUEST_DESCRIPTORS: usize = 16;

/// Most pairs of queues of a network card: each has up to two descriptors.
pub const MAX_QUEUE_PAIRS: usize = MAX_REQUEST_DESCRIPTORS / 2;

/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = 32;

/// Memory is plugged and unplugged in blocks of so many MiB: what Linux can take from its page
/// allocator as a whole (a page block on x86-64).
pub const HOTPLUG_BLOCK_MIB: u32 = 2;

/// Largest [`VmConfig::hotplug_mib`]: 1 TiB.
pub const MAX_HOTPLUG_MIB: u32 = 1024 * 1024;

/// Number of the first spare slot; those before it are for the devices that the machine starts with.
pub const FIRST_SPARE_SLOT: u32 = 32;

/// How many spare slots a machine has: device windows that are empty until a device is plugged in.
/// An empty one costs guest and VMM nothing.
pub const SPARE_SLOTS: u32 = 128;

/// How a name in [`crate::guest::SHARE_MOUNTS`] begins if an overlay's upper layer and its work folder
/// are in the folder that it names. The VMM's file server lets the guest make, rename and remove
/// nothing in there but below these two: the host's daemons use them by their names.
pub const SHARE_UPPER: &str = "upper";

/// The machine to build. All descriptors are owned by the VMM from the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// For log lines and the process title; already validated by the sandbox library.
    pub sandbox_id: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB, at least 32.
    pub memory_mib: u32,
    /// How much memory in MiB can be plugged beyond that while the guest runs: a multiple of
    /// [`HOTPLUG_BLOCK_MIB`] up to [`MAX_HOTPLUG_MIB`]. Nothing is plugged before
    /// [`Request::SetHotplug`]. 0 leaves the virtio-mem device out.
    #[serde(default)]
    pub hotplug_mib: u32,
    /// /dev/kvm, opened read-write.
    pub kvm_fd: RawFd,
    /// The guest kernel, an uncompressed ELF vmlinux, read-only.
    pub kernel_fd: RawFd,
    /// Appended to the command line that the VMM builds.
    #[serde(default)]
    pub kernel_params: Vec<String>,
    /// Block devices in the order in which the guest sees them: the first is /dev/vda, the
    /// guest's root image.
    pub block: Vec<BlockConfig>,
    /// Listening Unix stream socket. A client writes `CONNECT <port>\n`; once the guest has
    /// accepted, the VMM answers `OK <host port>\n` and from there on copies bytes both ways. It
    /// closes the connection instead when the guest refuses. Requests that come before the guest
    /// is ready wait for it.
    pub vsock_fd: RawFd,
    /// The folder served over virtio-fs with tag [`crate::guest::SHARE_TAG`], an O_PATH or
    /// O_DIRECTORY descriptor; none leaves the device out.
    pub share_fd: Option<RawFd>,
    /// Where console output goes, at most [`ConsoleConfig::limit_bytes`] of it.
    pub console: ConsoleConfig,
    /// Listening Unix stream socket for [`Request`]s.
    pub control_fd: RawFd,
    /// Pipe or file to which the VMM writes [`Event`]s, one JSON line each.
    pub events_fd: RawFd,
    /// A saved machine to continue instead of booting the kernel. Its shape (vCPUs, memory, devices
    /// in their order, kernel parameters) must equal this configuration's.
    #[serde(default)]
    pub template: Option<TemplateConfig>,
}

/// A machine saved by [`Request::SaveTemplate`]. Both files are read only; the memory file is mapped
/// privately, so that any number of VMs can run from it at once. Nobody may change it while one
/// does: pages that a VM has not touched yet are read from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateConfig {
    /// Guest memory: the pages that are not all zeros, one after the other.
    pub memory_fd: RawFd,
    /// Device and vCPU state, versioned and checksummed; also holds the memory file's length and
    /// checksum.
    pub state_fd: RawFd,
}

/// One virtio block device over a raw file or block device. The format is declared raw, never
/// probed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// Serial number shown to the guest (VIRTIO_BLK_T_GET_ID), at most 20 bytes of ASCII.
    pub serial: String,
    /// The backing; none places an empty slot (capacity 0) to be filled by
    /// [`Request::SetBlockBacking`].
    pub fd: Option<RawFd>,
    /// Offer VIRTIO_BLK_F_RO and refuse writes, whatever the descriptor would allow.
    pub read_only: bool,
}

/// The guest's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// File that receives the output; none keeps only the tail in memory (for panic reports).
    pub log_fd: Option<RawFd>,
    /// Bytes written to the log before further output is dropped.
    pub limit_bytes: u64,
    /// Kernel messages from the first instruction on and a virtio console as /dev/hvc0. Costs boot
    /// time; without it only warnings and panics are printed.
    pub verbose: bool,
}

/// What the parent may ask on the control socket: one JSON line each, answered by one [`Response`]
/// line. Descriptors travel with their request's line as SCM_RIGHTS, at most
/// [`MAX_REQUEST_DESCRIPTORS`] of them; what is left over is closed.
///
/// Every variant is a struct, if only an empty one: serde looks for unknown keys in no others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// State, counters and devices.
    Status {},
    /// Stops all vCPUs between two instructions. Idempotent.
    Pause {},
    /// Lets them go on. Idempotent.
    Resume {},
    /// Gives an empty block slot its backing and tells the guest by a configuration change.
    SetBlockBacking {
        /// Index into [`VmConfig::block`].
        index: usize,
        /// See [`BlockConfig::read_only`]; must equal what the slot was created with.
        read_only: bool,
    },
    /// Asks the guest to have so much memory beyond that which it booted with. It takes or gives it
    /// block by block as far as it can, and goes on trying; [`Event::HotplugReached`] tells when it
    /// has exactly that, and [`Status`] how far it is. Replaces what was asked before.
    SetHotplug {
        /// MiB, a multiple of [`HOTPLUG_BLOCK_MIB`] up to [`VmConfig::hotplug_mib`].
        mib: u32,
    },
    /// Plugs a block device into a spare slot, answered by [`Response::Plugged`]. The backing travels
    /// with it: one descriptor of a raw file or block device. The guest does not notice before it is
    /// told (the agent's AttachDevice).
    PlugBlock {
        /// See [`BlockConfig::serial`].
        serial: String,
        /// See [`BlockConfig::read_only`].
        read_only: bool,
    },
    /// Plugs a network card into a spare slot, answered by [`Response::Plugged`]. With it travel
    /// descriptors of one tap device, one for each pair of queues and at most
    /// [`MAX_QUEUE_PAIRS`], opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR (and
    /// IFF_MULTI_QUEUE if there are several). Header length and offloads are set by the VMM.
    PlugNet {
        /// The card's address: a unicast one.
        mac: [u8; 6],
        /// Longest packet in bytes, at least 68.
        mtu: u16,
        /// Let the guest send frames from other addresses than `mac`; they are dropped otherwise.
        #[serde(default)]
        any_sender: bool,
        /// Limits what the guest gets.
        #[serde(default)]
        to_guest: RateLimit,
        /// Limits what the guest sends.
        #[serde(default)]
        from_guest: RateLimit,
        /// The host's kernel moves the frames: as many descriptors of /dev/vhost-net follow those of
        /// the tap. There are no limits and no counters then, and `any_sender` is not looked at.
        #[serde(default)]
        vhost: bool,
    },
    /// Takes the device out of a spare slot, which is free then. A guest that has not let go of it
    /// (the agent's DetachDevice) finds a dead device: no request to it is ever answered.
    Unplug {
        /// See [`PluggedSlot::slot`].
        slot: u32,
    },
    /// Saves the machine for [`VmConfig::template`] and ends the VM with [`ExitReason::Saved`] once
    /// that is answered. Two descriptors travel with it: an empty file for the memory and an empty
    /// file for the state, both open for writing. Refused while a vsock connection is open, while
    /// the guest knows files of the share besides its root, while memory is plugged or asked to be,
    /// while a device is in a spare slot, or before the guest is ready. After an error the machine
    /// goes on and both files are empty again.
    SaveTemplate {},
    /// Ends the VM at once, without telling the guest.
    Stop {},
}

/// Answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case", deny_unknown_fields)]
pub enum Response {
    /// Done.
    Ok,
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Answer to a request that plugs a device.
    Plugged {
        /// Where it is.
        slot: PluggedSlot,
    },
    /// Not done; nothing was changed.
    Error {
        /// What was tried, on what, why it failed and what to do next.
        message: String,
    },
}

/// Where a device was plugged in, as the guest must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluggedSlot {
    /// Its number, from [`FIRST_SPARE_SLOT`] on.
    pub slot: u32,
    /// Guest-physical address of its virtio-mmio window of 4 KiB.
    pub address: u64,
    /// Its interrupt line, a pin of the IO-APIC; edge-triggered, and shared with other slots.
    pub irq: u32,
}

/// Limits of what passes a network card in one direction; 0 is no limit. A tenth of a second's worth
/// may come at once, and 64 KiB in any case. What is beyond waits, in the tap or in the guest's queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second, link-layer headers included.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Frames a second. One whose segmentation is left to the other side counts as one.
    #[serde(default)]
    pub frames_per_second: u64,
}

/// What has passed a network card since it was plugged in. Lengths include the 12 bytes of
/// virtio's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetCounters {
    /// Frames that the guest got.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the guest sent.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames of either direction that were dropped: too long for the guest's buffers, too short to
    /// be one, or refused by the tap.
    pub lost_frames: u64,
    /// Frames of the guest's that were dropped as they came from another address than the card's.
    pub spoofed_frames: u64,
}

/// A device in a spare slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluggedDevice {
    /// See [`PluggedSlot::slot`].
    pub slot: u32,
    /// Its type's name, as in [`Status::devices`], or `net`.
    pub device: String,
    /// Of a network card whose frames pass through the VMM.
    pub net: Option<NetCounters>,
}

/// How the VM is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Running or paused.
    pub paused: bool,
    /// The guest has knocked at [`crate::guest::READY_PORT`].
    pub ready: bool,
    /// What the probe found out.
    pub kvm: KvmKind,
    /// Number of returns of KVM_RUN to user space, all vCPUs together.
    pub userspace_exits: u64,
    /// The devices in slot order, by type name (`block`, `rng`, `vsock`, `fs`, `console`,
    /// `balloon`, `mem`).
    pub devices: Vec<String>,
    /// The devices in spare slots, by slot.
    pub plugged: Vec<PluggedDevice>,
    /// Memory beyond that which the guest booted with; none if the machine has no virtio-mem device.
    pub hotplug: Option<HotplugStatus>,
}

/// Memory that can be plugged, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotplugStatus {
    /// What was asked for last; 0 at first.
    pub requested_mib: u32,
    /// What the guest has taken.
    pub plugged_mib: u32,
}

/// How this host's KVM runs guest kernel mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmKind {
    /// Intel VMX: guest kernel mode runs natively.
    Vmx,
    /// AMD SVM: guest kernel mode runs natively.
    Svm,
    /// Guest kernel mode runs natively, by means this program can't name.
    Native,
    /// A software module that emulates guest kernel mode instruction by instruction; `syscall`
    /// does not reach it by itself.
    Emulated,
}

/// What the VMM tells its parent, one JSON line each on [`VmConfig::events_fd`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The VM is built, all that could fail before the first guest instruction has succeeded, and
    /// the vCPUs are about to run.
    Running {
        /// What the probe found out.
        kvm: KvmKind,
        /// Microseconds from the VMM's first line to here.
        setup_us: u64,
    },
    /// The agent listens. Not sent by a VM that continues a template: its agent listens already.
    Ready {
        /// Microseconds from the VMM's first line to here.
        since_start_us: u64,
        /// Returns of KVM_RUN to user space so far.
        userspace_exits: u64,
    },
    /// The guest has exactly the memory that the last [`Request::SetHotplug`] asked for. At most
    /// once for each of them.
    HotplugReached {
        /// As asked for, in MiB.
        mib: u32,
    },
    /// Last line: why the VM ended.
    Exited(ExitReason),
}

/// Why a VM ended. A VMM killed by a signal writes none; its parent then reports `killed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitReason {
    /// The guest powered off or reset without a panic.
    #[error("the guest shut down")]
    GuestShutdown,
    /// The guest's kernel panicked.
    #[error("the guest kernel panicked; its last console lines:\n{}", .console_tail.join("\n"))]
    GuestPanic {
        /// The last lines of console output, control characters replaced, at most 32 lines of at
        /// most 512 bytes.
        console_tail: Vec<String>,
    },
    /// KVM could not go on.
    #[error(
        "KVM failed on vCPU {vcpu} at rip {rip:#x}, instruction bytes [{instruction}]: {detail}"
    )]
    KvmFailed {
        /// Index of the vCPU.
        vcpu: u8,
        /// Guest instruction pointer, 0 when it could not be read.
        rip: u64,
        /// Instruction bytes at rip in hex, as far as they could be read.
        instruction: String,
        /// KVM's exit reason or the failed call.
        detail: String,
    },
    /// [`Request::Stop`] was received.
    #[error("the VM was stopped on request")]
    Stopped,
    /// [`Request::SaveTemplate`] was carried out.
    #[error("the VM was saved as a template")]
    Saved,
    /// The template can't be used: of another version or machine, truncated or damaged. No guest
    /// instruction has run; the parent may boot cold.
    #[error("the template cannot be used: {message}")]
    TemplateRefused {
        /// What was checked, what was found, what was expected.
        message: String,
    },
    /// The VM could not be built or the VMM itself failed.
    #[error("the VMM failed: {message}")]
    VmmFailed {
        /// What was tried, on what, why it failed and what to do next.
        message: String,
    },
}
