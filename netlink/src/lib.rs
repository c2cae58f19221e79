//! Conversations with the kernel's routing netlink (rtnetlink(7)), one request at a time. The
//! kernel answers in the call that asks, so nothing here waits for anything else.

mod answer;

use answer::Answer;
pub use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
pub use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
pub use netlink_packet_route as route;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

/// How often a dump is begun again because what it lists changed meanwhile.
const DUMPS: usize = 16;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket can't be made or used.
    #[error("the kernel's netlink cannot be used: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("{}", refusal(.cause, .hint))]
    Refused {
        /// The error's number, as an error.
        cause: io::Error,
        /// What the kernel says to it, or empty.
        hint: String,
    },
    /// The kernel's answer is none that netlink(7) describes.
    #[error("the kernel's netlink answered nonsense: {0}")]
    Nonsense(String),
}

fn refusal(cause: &io::Error, hint: &str) -> String {
    if hint.is_empty() {
        return cause.to_string();
    }
    format!("{cause} ({hint})")
}

impl NetlinkError {
    /// The number of the kernel's error, if it's one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetlinkError::Socket(cause) | NetlinkError::Refused { cause, .. } => {
                cause.raw_os_error()
            }
            NetlinkError::Nonsense(_) => None,
        }
    }
}

/// Takes `result` for a success too if the kernel refused with one of `errnos`.
///
/// # Errors
/// The other errors.
pub fn allow(result: Result<(), NetlinkError>, errnos: &[i32]) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.errno().is_some_and(|errno| errnos.contains(&errno)) => Ok(()),
        other => other,
    }
}

/// A netlink socket. It belongs to the network namespace in which it was opened, whoever uses it.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel doesn't give one.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Error messages in words; kernels before 4.12 have none.
        let _ = socket.set_ext_ack(true);
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Opens one in the calling thread's network namespace that hears of changes instead of asking:
    /// those of `groups` (the numbers RTNLGRP_* of rtnetlink). Not blocking.
    ///
    /// # Errors
    /// When the kernel doesn't give one.
    pub fn subscribe(groups: &[u32]) -> Result<OwnedFd, NetlinkError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        socket.set_non_blocking(true)?;
        // SAFETY: the descriptor is open, and the socket has just given it up.
        Ok(unsafe { OwnedFd::from_raw_fd(socket.into_raw_fd()) })
    }

    /// Has the kernel change something. `flags` are NLM_F_CREATE and the like.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        let sequence = self.send(message, flags | NLM_F_ACK)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for answer in answer::parts(&datagram)? {
                match answer {
                    Answer::Ack { sequence: of } if of == sequence => return Ok(()),
                    Answer::Error {
                        sequence: of,
                        cause,
                        hint,
                    } if of == sequence => return Err(NetlinkError::Refused { cause, hint }),
                    _ => {}
                }
            }
        }
    }

    /// Everything of the kind that `message` asks for.
    ///
    /// # Errors
    /// When the kernel refuses, or the list never stands still.
    pub fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..DUMPS {
            if let Some(found) = self.dump_once(message.clone())? {
                return Ok(found);
            }
        }
        Err(NetlinkError::Nonsense(
            "the list changed at each try to read it".into(),
        ))
    }

    /// None when the list changed while it was read.
    fn dump_once(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, NetlinkError> {
        let sequence = self.send(message, NLM_F_DUMP)?;
        let mut found = Vec::new();
        let mut consistent = true;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for answer in answer::parts(&datagram)? {
                match answer {
                    Answer::Message {
                        sequence: of,
                        interrupted,
                        bytes,
                    } if of == sequence => {
                        consistent &= !interrupted;
                        let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes);
                        let parsed =
                            parsed.map_err(|error| NetlinkError::Nonsense(error.to_string()))?;
                        if let NetlinkPayload::InnerMessage(message) = parsed.payload {
                            found.push(message);
                        }
                    }
                    Answer::Done {
                        sequence: of,
                        interrupted,
                    } if of == sequence => {
                        return Ok((consistent && !interrupted).then_some(found));
                    }
                    Answer::Error {
                        sequence: of,
                        cause,
                        hint,
                    } if of == sequence => return Err(NetlinkError::Refused { cause, hint }),
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<u32, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(self.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    #[test]
    fn the_loopback_device_is_listed() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()));
        let is_loopback = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewLink(link) => {
                let name = LinkAttribute::IfName("lo".into());
                link.attributes.contains(&name)
            }
            _ => false,
        };
        assert!(links.unwrap().iter().any(is_loopback));
    }

    #[test]
    fn refusals_come_with_their_number() {
        let mut netlink = Netlink::open().unwrap();
        let mut link = LinkMessage::default();
        link.header.index = u32::MAX >> 1;
        let refused = netlink.change(RouteNetlinkMessage::SetLink(link), 0);
        let error = refused.unwrap_err();
        let errnos = [libc::ENODEV, libc::EPERM];
        assert!(errnos.contains(&error.errno().unwrap()), "{error}");
        assert!(allow(Err(error), &errnos).is_ok());
    }
}
