//! Ports and paths that the host and the guest must agree on.

/// vsock context id of the guest. Each VMM has its own vsock device mapped to its own Unix socket,
/// so every guest can have the same one (3 is the first that is not reserved, virtio 1.3 §5.10.4).
pub const GUEST_CID: u64 = 3;

/// vsock port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;

/// vsock port on which the agent accepts process streams; each begins with an 8-byte
/// little-endian token (see `Streams` in `agent.proto`).
pub const STREAM_PORT: u32 = 1025;

/// Host vsock port that the agent knocks at once it listens on [`AGENT_PORT`] and
/// [`STREAM_PORT`]: it sends a connection request, which the VMM always refuses and takes as the
/// sign that the guest is ready. The guest can open no conversation with the host.
pub const READY_PORT: u32 = 1026;

/// vsock port on which the agent takes connections to TCP ports of the guest's loopback; each
/// begins with the port's number (16 bits, little-endian), is answered by one byte,
/// [`FORWARD_OPEN`] or another when nobody listens there, and carries the connection's bytes then.
pub const FORWARD_PORT: u32 = 1027;

/// See [`FORWARD_PORT`].
pub const FORWARD_OPEN: u8 = 0;

/// In place of a port's number on [`FORWARD_PORT`], for a name server on [`RESOLVER_ADDRESS`] that
/// the agent is until the connection's end. It sends queries: a number (32 bits), [`RESOLVER_UDP`] or
/// [`RESOLVER_TCP`], a length (16 bits) and so many bytes. The host sends answers: a query's number, a
/// length, and so many bytes, none for an answer that it couldn't get. Numbers are little-endian.
pub const RESOLVER: u16 = 0;

/// Where Docker has its name server in a container's network namespace, and where its
/// configuration has containers ask.
pub const RESOLVER_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 11);

/// The port of name servers.
pub const RESOLVER_PORT: u16 = 53;

/// A query that came by UDP; see [`RESOLVER`].
pub const RESOLVER_UDP: u8 = 0;

/// A query that came by TCP; see [`RESOLVER`].
pub const RESOLVER_TCP: u8 = 1;

/// Bytes before a query; see [`RESOLVER`].
pub const RESOLVER_QUERY_HEADER: usize = 7;

/// Bytes before an answer; see [`RESOLVER`].
pub const RESOLVER_ANSWER_HEADER: usize = 6;

/// Tag of the virtio-fs device that serves the sandbox's shared folder.
pub const SHARE_TAG: &str = "bulkhead";

/// Where the agent mounts that share in the guest.
pub const SHARE_MOUNT: &str = "/run/bulkhead/shared";

/// Folder of a container's folder in the share in which the sources of its bind mounts are.
pub const SHARE_MOUNTS: &str = "mounts";

/// Folder of the share in which, as in a container's, the volumes are that several containers of a
/// pod have in common. No container's id has this character.
pub const SHARE_VOLUMES: &str = "@volumes";

/// How the names of an overlay's marks (`trusted.overlay.*`) begin on the host, where the file server
/// keeps them for the guest: it may set no trusted attributes.
pub const KEPT_OVERLAY_XATTRS: &str = "user.bulkhead.overlay.";

/// Folder of the guest below which the agent mounts what `CreateRequest.storage` lists.
pub const STORAGE_MOUNT: &str = "/run/bulkhead/storage";

/// Folder in the guest of links from serial numbers of disks that were plugged in to their nodes.
pub const DISKS: &str = "/run/bulkhead/disks";

/// The agent in the guest's root image; PID 1.
pub const AGENT_PATH: &str = "/sbin/bulkhead-agent";

/// As the path of a pid namespace in a guest's spec: the pod's own, which its containers share.
/// There is no such file; the agent knows the name.
pub const POD_PID_NAMESPACE: &str = "/run/bulkhead/pod/pid";

/// Word on the kernel's command line that says that guest kernel mode is emulated
/// (`guest-kernel/README.md`).
pub const EMULATED_SWITCH: &str = "bulkhead.emulated_ring0";

/// Word on the kernel's command line that says at which port the VMM saves and loads extended
/// registers for it (`guest-kernel/README.md`, What programs see of the CPU).
pub const XSTATE_SWITCH: &str = "bulkhead.xstate_port";

/// Where kernel mode is emulated: the least number of TCP segments that are left to the device in one
/// frame, and the file of the network namespace that takes it. Linux sizes frames by what a connection
/// sends in a millisecond, or by a round trip of less than some milliseconds; there a frame alone
/// takes ten, and two segments, the default, become the rule. With 16 a MiB costs 2.7 M guest kernel
/// instructions instead of 6.4 M.
pub const TCP_SEGMENTS: (&str, &str) = ("/proc/sys/net/ipv4/tcp_min_tso_segs", "16");
