//! The line by which a client says where it wants to go.

use nix::sys::socket::{MsgFlags, recv};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Longest line, newline included.
const MAX_LINE: usize = 32;

/// A `CONNECT <port>\n` line as far as it has come.
#[derive(Debug, Default)]
pub struct Handshake {
    line: Vec<u8>,
}

/// How far the line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More bytes must come.
    Incomplete,
    /// The guest's port.
    Port(u32),
    /// This is no such line, or the client is gone.
    Failed,
}

impl Handshake {
    /// Reads what the client has written, and not a byte beyond the line.
    pub fn read(&mut self, stream: BorrowedFd) -> Progress {
        loop {
            let mut bytes = [0; MAX_LINE];
            let room = MAX_LINE - self.line.len();
            let seen = match receive(stream, &mut bytes[..room], MsgFlags::MSG_PEEK) {
                Ok(seen) => seen,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Progress::Incomplete;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Progress::Failed,
            };
            let newline = bytes[..seen].iter().position(|&byte| byte == b'\n');
            let take = newline.map_or(seen, |at| at + 1);
            // These bytes were just seen, and nobody else reads here.
            if seen == 0
                || receive(stream, &mut bytes[..take], MsgFlags::empty()).ok() != Some(take)
            {
                return Progress::Failed;
            }
            self.line.extend_from_slice(&bytes[..take]);
            if newline.is_some() {
                return parse(&self.line).map_or(Progress::Failed, Progress::Port);
            }
            if self.line.len() == MAX_LINE {
                return Progress::Failed;
            }
        }
    }
}

fn receive(stream: BorrowedFd, bytes: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
    Ok(recv(stream.as_raw_fd(), bytes, flags)?)
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    // Digits only: `parse` alone would take a sign.
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(port).ok()?.parse().ok()
}

/// What the client reads once the guest has accepted.
pub fn answer(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        (here, there)
    }

    #[test]
    fn a_line_in_pieces_is_read_and_nothing_beyond_it() {
        let (mut here, mut there) = pair();
        let mut handshake = Handshake::default();
        for piece in ["CON", "NECT 10"] {
            there.write_all(piece.as_bytes()).unwrap();
            assert_eq!(handshake.read(here.as_fd()), Progress::Incomplete);
        }
        there.write_all(b"24\nhello").unwrap();
        assert_eq!(handshake.read(here.as_fd()), Progress::Port(1024));
        let mut rest = [0; 8];
        assert_eq!(here.read(&mut rest).unwrap(), 5);
        assert_eq!(&rest[..5], b"hello");
    }

    #[test]
    fn other_lines_fail() {
        for line in [
            "CONNECT\n",
            "CONNECT \n",
            "connect 1\n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 1 \n",
            "CONNECT 4294967296\n",
            "\n",
            "CONNECT 00000000000000000000000000000001\n",
            "0123456789012345678901234567890123456789",
        ] {
            let (here, mut there) = pair();
            there.write_all(line.as_bytes()).unwrap();
            let progress = Handshake::default().read(here.as_fd());
            assert_eq!(progress, Progress::Failed, "{line:?}");
        }
        let (here, there) = pair();
        drop(there);
        assert_eq!(Handshake::default().read(here.as_fd()), Progress::Failed);
    }

    proptest! {
        /// Any bytes in any pieces: the line is never longer than its bound.
        #[test]
        fn any_bytes_are_bounded(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..4)) {
            let (here, mut there) = pair();
            let mut handshake = Handshake::default();
            for piece in pieces {
                there.write_all(&piece).unwrap();
                let progress = handshake.read(here.as_fd());
                prop_assert!(handshake.line.len() <= MAX_LINE);
                if progress != Progress::Incomplete {
                    break;
                }
            }
        }
    }
}
