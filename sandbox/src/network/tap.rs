//! Tap devices: what a guest's network device is joined to. They live in the pod's namespace as long
//! as a descriptor of theirs does, which are the VMM's.

use bulkhead_netlink::route::RouteNetlinkMessage;
use bulkhead_netlink::route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use bulkhead_netlink::{Netlink, NetlinkError, allow};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Whole frames, each behind a virtio-net header and nothing else.
const FRAMES: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Names of these devices begin so.
const PREFIX: &str = "bulkhead";

/// A tap device.
#[derive(Debug)]
pub(super) struct Tap {
    /// Its number in the namespace.
    pub index: u32,
    /// One for each pair of queues.
    pub queues: Vec<File>,
}

impl Tap {
    /// Makes one with `queues` pairs of queues in the calling thread's namespace, which stands
    /// beside the interface with number `beside`. It's up.
    pub fn new(
        beside: u32,
        queues: usize,
        mtu: u32,
        netlink: &mut Netlink,
    ) -> Result<Self, NetlinkError> {
        let name = format!("{PREFIX}{beside}");
        let flags = FRAMES | if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        // One of that name is another VM's, which would get only half of its frames from then on.
        let first = |queue| if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
        let queues: io::Result<Vec<File>> = (0..queues)
            .map(|queue| attach(&name, flags | first(queue)))
            .collect();
        let queues = queues?;
        let c_name = CString::new(name).map_err(io::Error::other)?;
        // SAFETY: the name is a C string that lives across the call.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error().into());
        }
        let mut quiet = LinkMessage::default();
        quiet.header.index = index;
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let spec = AfSpecUnspec::Inet6(vec![mode]);
        quiet.attributes = vec![LinkAttribute::AfSpecUnspec(vec![spec])];
        // The host's own IPv6 must not speak to the guest; where there is none it can't.
        let done = netlink.change(RouteNetlinkMessage::SetLink(quiet), 0);
        allow(done, &[libc::EAFNOSUPPORT, libc::EOPNOTSUPP])?;
        let tap = Self { index, queues };
        tap.set_mtu(mtu, netlink)?;
        Ok(tap)
    }

    /// Sets the largest packet that gets through, in bytes, and sees to it that the device is up.
    pub fn set_mtu(&self, mtu: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        set_mtu(self.index, mtu, netlink)
    }
}

/// As [`Tap::set_mtu`], for one whose descriptors are with the VMM.
pub(super) fn set_mtu(index: u32, mtu: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
    let mut up = LinkMessage::default();
    up.header.index = index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    up.attributes = vec![LinkAttribute::Mtu(mtu)];
    netlink.change(RouteNetlinkMessage::SetLink(up), 0)
}

/// Has nothing get through one whose descriptors are with the VMM.
pub(super) fn set_down(index: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
    let mut down = LinkMessage::default();
    down.header.index = index;
    down.header.change_mask = LinkFlags::Up;
    netlink.change(RouteNetlinkMessage::SetLink(down), 0)
}

/// One queue of the device `name`, which the first one makes.
fn attach(name: &str, flags: libc::c_int) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives across the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
