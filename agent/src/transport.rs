//! Sockets, pipes and terminals as asynchronous byte streams, and the listeners they come from.
//!
//! One type serves vsock and Unix sockets, pipes and pty masters alike: the calls are the same, and
//! a stream that waits holds no buffer.

use futures_core::Stream;
use rustix::io::Errno;
use rustix::net::Shutdown;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// The host's vsock context id, VMADDR_CID_HOST (virtio 1.3 §5.10.4).
const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// A byte stream over a descriptor in non-blocking mode.
#[derive(Debug)]
pub struct Endpoint {
    fd: AsyncFd<OwnedFd>,
    kind: EndpointKind,
}

/// What an endpoint's descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointKind {
    /// A socket or a pipe: a short read means that it is empty for now.
    Stream,
    /// A pty master: EIO means that the last slave was closed, and a short read means nothing.
    Terminal,
}

impl Endpoint {
    /// Takes over `fd`, which must be in non-blocking mode.
    pub fn new(fd: OwnedFd, kind: EndpointKind) -> io::Result<Self> {
        // SAFETY: the descriptor is owned, and stays the same for as long as it is registered.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { fd, kind })
    }

    /// Waits until [`Self::try_read`] may have something to say.
    pub async fn readable(&self) -> io::Result<()> {
        self.fd.readable().await?.retain_ready();
        Ok(())
    }

    /// Appends what is there to `buffer`, up to its capacity. `Ok(Some(0))` is the end of the
    /// stream, `Ok(None)` nothing for now.
    pub fn try_read(&self, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
        let room = buffer.capacity() - buffer.len();
        self.try_read_with(room, |fd| {
            rustix::io::read(fd, rustix::buffer::spare_capacity(buffer))
        })
    }

    /// Like [`Self::try_read`], into a fixed buffer.
    pub fn try_read_slice(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        self.try_read_with(buffer.len(), |fd| rustix::io::read(fd, buffer))
    }

    /// Fills `buffer`, and reads nothing beyond it.
    pub async fn read_exact(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            self.readable().await?;
            match self.try_read_slice(rest)? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(count) => filled += count,
                None => {}
            }
        }
        Ok(())
    }

    /// Of a socket whose connecting is under way: waits for how it ends.
    pub async fn connected(&self) -> io::Result<()> {
        // Not connected yet isn't writable (connect(2), EINPROGRESS).
        self.fd.writable().await?.retain_ready();
        Ok(rustix::net::sockopt::socket_error(self.fd.get_ref())??)
    }

    fn try_read_with(
        &self,
        room: usize,
        read: impl FnOnce(&OwnedFd) -> rustix::io::Result<usize>,
    ) -> io::Result<Option<usize>> {
        let mut context = Context::from_waker(std::task::Waker::noop());
        let mut guard = match self.fd.poll_read_ready(&mut context) {
            Poll::Ready(guard) => guard?,
            Poll::Pending => return Ok(None),
        };
        match read(guard.get_inner()) {
            Ok(count) => {
                // Spares the read that would only say EAGAIN. An end of stream is not lost by
                // this: the event loop keeps it.
                if count < room && count > 0 && self.kind == EndpointKind::Stream {
                    guard.clear_ready();
                }
                Ok(Some(count))
            }
            Err(Errno::AGAIN) => {
                guard.clear_ready();
                Ok(None)
            }
            Err(Errno::INTR) => Ok(None),
            Err(Errno::IO) if self.kind == EndpointKind::Terminal => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes all of `bytes`, waiting for room as often as needed.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(self.fd.get_ref(), bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut guard = self.fd.writable().await?;
                    // The readiness may be an old one; then this clears it.
                    let again = guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?));
                    match again {
                        Ok(Ok(count)) => bytes = bytes.get(count..).unwrap_or_default(),
                        Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                        Ok(Err(error)) => return Err(error),
                        Err(_would_block) => {}
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Tells the other end that nothing more will be written.
    pub fn shut_down_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self.fd.get_ref(), Shutdown::Write)?)
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

impl AsyncRead for Endpoint {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            let room = unfilled.len();
            match rustix::io::read(guard.get_inner(), unfilled) {
                Ok(count) => {
                    if count < room && count > 0 {
                        guard.clear_ready();
                    }
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Endpoint {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(context))?;
            match rustix::io::write(guard.get_inner(), bytes) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shut_down_write())
    }
}

/// Listens on a vsock port.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let socket = bound_vsock_socket(port)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn bound_vsock_socket(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is a sockaddr_vm and its true size is passed.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Listens on a Unix socket, which is created with mode 0600.
pub fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
        None,
    )?;
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(path)?);
    rustix::process::umask(before);
    bound?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A listening socket that only lets the host in.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Accepts on a socket from [`listen_vsock`] or [`listen_unix`].
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned, and stays the same for as long as it is registered.
        let fd = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { fd })
    }

    /// The next connection of the host's. Others are closed at once.
    pub async fn accept(&self) -> io::Result<Endpoint> {
        std::future::poll_fn(|context| self.poll_accept(context)).await
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Endpoint>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(context))?;
            match accept_host(guard.get_inner().as_raw_fd()) {
                Ok(Some(socket)) => {
                    return Poll::Ready(Endpoint::new(socket, EndpointKind::Stream));
                }
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Stream for Listener {
    type Item = io::Result<Endpoint>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(context).map(Some)
    }
}

/// Accepts one connection; `None` when it came from somewhere else than the host. Without this
/// check any process of a container could drive the agent over a loopback connection.
fn accept_host(listener: RawFd) -> io::Result<Option<OwnedFd>> {
    // SAFETY: sockaddr_storage is plain data, for which all zeroes is a value.
    let mut peer: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: peer and length are ours, and length says how large peer is.
    let accepted = unsafe {
        libc::accept4(
            listener,
            (&raw mut peer).cast(),
            &raw mut length,
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    };
    if accepted < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: accept4 has just returned this descriptor; no one else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(accepted) };
    if i32::from(peer.ss_family) == libc::AF_VSOCK {
        // SAFETY: the family says that the storage holds a sockaddr_vm, and it is large enough.
        let address = unsafe { *(&raw const peer).cast::<libc::sockaddr_vm>() };
        if address.svm_cid != HOST_CID {
            return Ok(None);
        }
    }
    Ok(Some(socket))
}

/// Asks the host for a connection that it will refuse: the sign that the agent listens (see
/// [`bulkhead_proto::guest::READY_PORT`]). The returned socket has to live until the answer has
/// come, or the request may be taken back.
///
/// It goes out from the port of the same number: had the kernel to choose one, it would draw at
/// random where it begins, and all clones of this machine would go on from there.
pub fn knock(port: u32) -> io::Result<OwnedFd> {
    let socket = bound_vsock_socket(port)?;
    let address = vsock_address(HOST_CID, port);
    // SAFETY: the address is a sockaddr_vm and its true size is passed. The result doesn't matter:
    // in non-blocking mode it is EINPROGRESS.
    unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    Ok(socket)
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let socket = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket has just returned this descriptor; no one else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}
