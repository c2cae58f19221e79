//! Run in a container by the end-to-end tests: prints what a guest's network draws at random, which
//! clones of one machine must not have in common.
//!
//! `tcp N`, once for each of three connections: the initial sequence number less the clock that is
//! part of it (RFC 6528), so what comes from the guest's secret and the connection's ports.
//! `vsock N`: the port that the guest chooses for a socket that names none.
//!
//! Needs CAP_NET_ADMIN, as sequence numbers are only shown to who may set them (TCP_REPAIR).

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, VsockAddr, bind, connect, getsockname,
    listen, socket,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// `TCP_SEND_QUEUE` of linux/tcp.h.
const SEND_QUEUE: libc::c_int = 2;
/// Ports of the listener, and the first of the connections.
const LISTENER: u16 = 40_000;
const FIRST: u16 = 40_001;

fn main() -> io::Result<()> {
    let listener = tcp_socket(LISTENER)?;
    listen(&listener, Backlog::new(3)?)?;
    for port in FIRST..FIRST + 3 {
        println!("tcp {}", secret_of_connection(port)?);
    }
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )?;
    let any = VsockAddr::new(libc::VMADDR_CID_ANY, libc::VMADDR_PORT_ANY);
    bind(socket.as_raw_fd(), &any)?;
    println!(
        "vsock {}",
        getsockname::<VsockAddr>(socket.as_raw_fd())?.port()
    );
    Ok(())
}

fn tcp_socket(port: u16) -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port))?;
    Ok(socket)
}

fn secret_of_connection(port: u16) -> io::Result<u32> {
    let socket = tcp_socket(port)?;
    let before = clock();
    connect(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, LISTENER))?;
    let after = clock();
    option(&socket, libc::TCP_REPAIR, &mut 1, true)?;
    option(&socket, libc::TCP_REPAIR_QUEUE, &mut { SEND_QUEUE }, true)?;
    let mut next = 0;
    option(&socket, libc::TCP_QUEUE_SEQ, &mut next, false)?;
    // SYN takes one number; the clock ticks in units of 64 ns.
    let initial = (next as u32).wrapping_sub(1);
    let middle = (before + (after - before) / 2) >> 6;
    Ok(initial.wrapping_sub(middle as u32))
}

/// Nanoseconds since the epoch.
fn clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

fn option(
    socket: &OwnedFd,
    name: libc::c_int,
    value: &mut libc::c_int,
    set: bool,
) -> io::Result<()> {
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let value = std::ptr::from_mut(value).cast::<libc::c_void>();
    let descriptor = socket.as_raw_fd();
    // SAFETY: value and length are those of an int, which both calls take.
    let result = unsafe {
        if set {
            libc::setsockopt(descriptor, libc::IPPROTO_TCP, name, value, length)
        } else {
            libc::getsockopt(descriptor, libc::IPPROTO_TCP, name, value, &raw mut length)
        }
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
