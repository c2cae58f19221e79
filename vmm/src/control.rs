//! The control socket: requests come in, one JSON line each, and are answered in order.
//!
//! Runs on the main thread, in one loop with the machine's end: whoever asks, and whatever ends
//! the VM, is heard here and nowhere else.

use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use bulkhead_proto::vmm::{MAX_CONTROL_LINE, MAX_REQUEST_DESCRIPTORS, Request, Response};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vmm_sys_util::eventfd::EventFd;

/// Clients served at once; further ones wait in the listener's backlog.
const MAX_CLIENTS: usize = 8;

/// Serves `listener` until `ended` is signalled or `handle` says that the VM is to end.
///
/// # Errors
/// When the descriptors can't be waited for; a client's errors only end its connection.
pub fn serve(
    listener: &UnixListener,
    ended: &EventFd,
    mut handle: impl FnMut(Request, Vec<OwnedFd>) -> (Response, Next),
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let ready = wait(listener, ended, &clients)?;
        if ready.ended {
            return Ok(());
        }
        let mut stop = false;
        for index in ready.clients.into_iter().rev() {
            match clients[index].serve(&mut handle) {
                Ok(Next::GoOn) => {}
                Ok(Next::End) => stop = true,
                Err(error) => {
                    if error.kind() != ErrorKind::UnexpectedEof {
                        tracing::warn!(%error, "a control connection was closed");
                    }
                    clients.swap_remove(index);
                }
            }
        }
        if stop {
            return Ok(());
        }
        if ready.listener && clients.len() < MAX_CLIENTS {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    clients.push(Client::new(stream));
                }
                Err(error) => tracing::debug!(%error, "accepting a control connection"),
            }
        }
    }
}

/// Most descriptors that Linux passes with one message (SCM_MAX_FD). With room for all of them,
/// none can arrive that isn't seen here, and be left open for ever.
const MAX_PASSED: usize = 253;

/// What follows a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Serve on.
    GoOn,
    /// Answer, then return from [`serve`].
    End,
}

struct Ready {
    ended: bool,
    listener: bool,
    /// Indices, ascending.
    clients: Vec<usize>,
}

fn wait(listener: &UnixListener, ended: &EventFd, clients: &[Client]) -> io::Result<Ready> {
    // SAFETY: `ended` outlives this call, and with it its descriptor.
    let ended = unsafe { std::os::fd::BorrowedFd::borrow_raw(ended.as_raw_fd()) };
    let accept = if clients.len() < MAX_CLIENTS {
        PollFlags::POLLIN
    } else {
        PollFlags::empty()
    };
    let mut fds = vec![
        PollFd::new(ended, PollFlags::POLLIN),
        PollFd::new(listener.as_fd(), accept),
    ];
    fds.extend(
        clients
            .iter()
            .map(|client| PollFd::new(client.stream.as_fd(), PollFlags::POLLIN)),
    );
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |fd: &PollFd| fd.any().unwrap_or(false);
    Ok(Ready {
        ended: ready(&fds[0]),
        listener: ready(&fds[1]),
        clients: (0..clients.len())
            .filter(|index| ready(&fds[index + 2]))
            .collect(),
    })
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    /// Descriptors that came with the line being read, at most [`MAX_REQUEST_DESCRIPTORS`].
    descriptors: Vec<OwnedFd>,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    /// Takes what has arrived and answers every whole line of it.
    fn serve(
        &mut self,
        handle: &mut impl FnMut(Request, Vec<OwnedFd>) -> (Response, Next),
    ) -> io::Result<Next> {
        self.receive()?;
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            // An invalid request's are closed: they are not the next one's.
            let descriptors = std::mem::take(&mut self.descriptors);
            let (response, next) = match serde_json::from_slice(&line) {
                Ok(request) => handle(request, descriptors),
                Err(error) => {
                    let message = format!("the request is not valid: {error}");
                    (Response::Error { message }, Next::GoOn)
                }
            };
            let answered = self.answer(&response);
            if next == Next::End {
                // Done as asked, whether or not the client still listens.
                return Ok(next);
            }
            answered?;
        }
        if self.line.len() >= MAX_CONTROL_LINE {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("a request of more than {MAX_CONTROL_LINE} bytes"),
            ));
        }
        Ok(Next::GoOn)
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut buffer = [0u8; 4096];
        let mut space = nix::cmsg_space!([RawFd; MAX_PASSED]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(
            self.stream.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        );
        let (bytes, descriptors) = match message {
            Ok(message) => {
                let descriptors: Vec<RawFd> = message
                    .cmsgs()
                    .map_err(io::Error::from)?
                    .filter_map(|message| match message {
                        ControlMessageOwned::ScmRights(fds) => Some(fds),
                        _ => None,
                    })
                    .flatten()
                    .collect();
                (message.bytes, descriptors)
            }
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for fd in descriptors {
            // SAFETY: the kernel has just made this descriptor for us.
            let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
            if self.descriptors.len() < MAX_REQUEST_DESCRIPTORS {
                self.descriptors.push(descriptor);
            }
        }
        if bytes == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.line.extend_from_slice(&buffer[..bytes]);
        Ok(())
    }

    /// A client that does not read its answers loses its connection, not the VM its time.
    fn answer(&mut self, response: &Response) -> io::Result<()> {
        let mut line = serde_json::to_vec(response)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    /// Runs `client` against a server that counts requests and ends on Stop.
    fn with_server(client: impl FnOnce(UnixStream)) -> usize {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let ended = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let server = std::thread::spawn(move || {
            let mut count = 0;
            serve(&listener, &ended, |request, _| {
                count += 1;
                match request {
                    Request::Stop {} => (Response::Ok, Next::End),
                    _ => (Response::Ok, Next::GoOn),
                }
            })
            .unwrap();
            count
        });
        client(UnixStream::connect(&path).unwrap());
        server.join().unwrap()
    }

    #[test]
    fn lines_are_answered_in_order_however_they_arrive() {
        let count = with_server(|mut stream| {
            let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
            stream
                .write_all(b"{\"request\":\"pause\"}\n{\"requ")
                .unwrap();
            assert_eq!(answers.next().unwrap().unwrap(), r#"{"response":"ok"}"#);
            stream.write_all(b"est\":\"nonsense\"}\n").unwrap();
            assert!(answers.next().unwrap().unwrap().contains("nonsense"));
            stream.write_all(b"{\"request\":\"stop\"}\n").unwrap();
            assert_eq!(answers.next().unwrap().unwrap(), r#"{"response":"ok"}"#);
        });
        assert_eq!(count, 2);
    }

    #[test]
    fn unknown_keys_are_refused_in_every_request() {
        let count = with_server(|mut stream| {
            let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
            for name in ["status", "pause", "resume", "save_template", "stop"] {
                writeln!(stream, "{{\"request\":\"{name}\",\"x\":1}}").unwrap();
                let answer = answers.next().unwrap().unwrap();
                assert!(answer.contains("unknown field"), "{name}: {answer}");
            }
            stream.write_all(b"{\"request\":\"stop\"}\n").unwrap();
        });
        assert_eq!(count, 1);
    }

    /// Sends `line` with as many descriptors and tells how many the handler got.
    #[test]
    fn descriptors_are_taken_up_to_the_limit_and_the_rest_closed() {
        use nix::sys::socket::{ControlMessage, sendmsg};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let ended = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let server = std::thread::spawn(move || {
            let mut counts = Vec::new();
            serve(&listener, &ended, |request, descriptors| {
                counts.push(descriptors.len());
                let next = match request {
                    Request::Stop {} => Next::End,
                    _ => Next::GoOn,
                };
                (Response::Ok, next)
            })
            .unwrap();
            counts
        });
        let stream = UnixStream::connect(&path).unwrap();
        let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
        // The write end of each pipe goes to the server; its read end tells when that is closed.
        for (line, count) in [
            ("{\"request\":\"save_template\"}\n", 2),
            ("{\"request\":\"pause\"}\n", MAX_REQUEST_DESCRIPTORS + 1),
            ("nonsense\n", 2),
            ("{\"request\":\"stop\"}\n", 0),
        ] {
            let pipes: Vec<_> = (0..count).map(|_| nix::unistd::pipe().unwrap()).collect();
            let fds: Vec<RawFd> = pipes.iter().map(|(_, write)| write.as_raw_fd()).collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let messages = if fds.is_empty() { &[][..] } else { &rights[..] };
            let iov = [io::IoSlice::new(line.as_bytes())];
            sendmsg::<()>(stream.as_raw_fd(), &iov, messages, MsgFlags::empty(), None).unwrap();
            answers.next().unwrap().unwrap();
            for (read, write) in pipes {
                drop(write);
                // End of file comes once the server has closed its copy.
                let mut byte = [0];
                assert_eq!(nix::unistd::read(&read, &mut byte).unwrap(), 0);
            }
        }
        assert_eq!(server.join().unwrap(), [2, MAX_REQUEST_DESCRIPTORS, 0]);
    }

    #[test]
    fn an_endless_line_ends_the_connection_only() {
        with_server(|mut stream| {
            let other = stream.peer_addr().unwrap();
            let flood = vec![b'x'; MAX_CONTROL_LINE + 1];
            let _ = stream.write_all(&flood);
            let mut answers = BufReader::new(stream).lines();
            assert!(!matches!(answers.next(), Some(Ok(_))));
            let mut second = UnixStream::connect(other.as_pathname().unwrap()).unwrap();
            second.write_all(b"{\"request\":\"stop\"}\n").unwrap();
        });
    }
}
