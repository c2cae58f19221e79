//! Sending and catching of whole frames, and echo requests, in the calling thread's network
//! namespace.

use crate::error::{Context, Result};
use std::fs::File;
use std::io::{Error, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Every Ethernet frame that passes a device of a network namespace, from its making on.
#[derive(Debug)]
pub struct Capture {
    socket: File,
}

impl Capture {
    /// Of all devices of the calling thread's namespace.
    ///
    /// # Errors
    /// When there are no such sockets, or not for this user.
    pub fn start() -> Result<Self> {
        let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket = socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK,
            protocol,
        );
        let socket = socket.context(|| "open a packet socket".into())?;
        Ok(Self {
            socket: socket.into(),
        })
    }

    /// Catches frames until `last` has come; tells which of `frames` did.
    ///
    /// # Panics
    /// When it hasn't within `limit`.
    #[track_caller]
    pub fn until(&mut self, last: &[u8], frames: &[&[u8]], limit: Duration) -> Vec<bool> {
        let end = Instant::now() + limit;
        let mut seen = vec![false; frames.len()];
        let mut buffer = [0; 4096];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(length) => {
                    let found = &buffer[..length];
                    for (seen, frame) in seen.iter_mut().zip(frames) {
                        *seen |= found == *frame;
                    }
                    if found == last {
                        return seen;
                    }
                }
                Err(_) => {
                    assert!(
                        Instant::now() < end,
                        "the last frame did not come: {seen:?}"
                    );
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }
}

impl Capture {
    /// The length of the longest frame of `sender`'s that has been caught so far, and was not looked
    /// at yet.
    pub fn longest(&mut self, sender: [u8; 6]) -> usize {
        let mut longest = 0;
        let mut start = [0u8; 12];
        loop {
            // SAFETY: the buffer has room for as many bytes as are asked for; what is returned is the
            // frame's length (MSG_TRUNC).
            let length = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    start.as_mut_ptr().cast(),
                    start.len(),
                    libc::MSG_TRUNC,
                )
            };
            let Ok(length) = usize::try_from(length) else {
                return longest;
            };
            if start[6..] == sender {
                longest = longest.max(length);
            }
        }
    }
}

/// Sends `count` echo requests of `length` bytes at once, and tells how long it takes until all
/// answers are there. None if they are not within `limit`.
///
/// # Errors
/// When a socket can't be had, or used.
pub fn echoes(
    to: Ipv4Addr,
    count: u16,
    length: usize,
    limit: Duration,
) -> Result<Option<Duration>> {
    let socket = socket(
        libc::AF_INET,
        libc::SOCK_RAW | libc::SOCK_NONBLOCK,
        libc::IPPROTO_ICMP,
    );
    let socket = socket.context(|| "open a socket for ICMP".into())?;
    let mut file = File::from(socket.try_clone().context(|| "share a socket".into())?);
    let own = std::process::id() as u16;
    let begin = Instant::now();
    for sequence in 0..count {
        send_to(&socket, to, &echo_request(own, sequence, length))
            .context(|| format!("send an echo request to {to}"))?;
    }
    let mut answered = vec![false; count.into()];
    let mut buffer = [0; 4096];
    while begin.elapsed() < limit {
        let Ok(read) = file.read(&mut buffer) else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        // An IPv4 header of 20 bytes, then type, code, checksum, identifier and sequence.
        if let Some(&[0, _, _, _, a, b, c, d]) = buffer[..read].get(20..28)
            && u16::from_be_bytes([a, b]) == own
            && let Some(one) = answered.get_mut(usize::from(u16::from_be_bytes([c, d])))
        {
            *one = true;
            if answered.iter().all(|one| *one) {
                return Ok(Some(begin.elapsed()));
            }
        }
    }
    Ok(None)
}

/// RFC 792.
fn echo_request(identifier: u16, sequence: u16, length: usize) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.resize(length.max(8), 0);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// The internet's checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let words = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn socket(family: i32, kind: i32, protocol: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let socket = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if socket < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn send_to(socket: &OwnedFd, to: Ipv4Addr, message: &[u8]) -> std::io::Result<()> {
    // SAFETY: sockaddr_in is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_addr.s_addr = u32::from_ne_bytes(to.octets());
    // SAFETY: message and address live across the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    if sent < 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}
