//! Both ends of the socket pair between the agent and a set-up process.

use super::report::{MAX_REPORT, Report};
use crate::error::{Context, Failure, Kind};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The agent's word to go on.
const START: u8 = b's';

/// How far a set-up process has come.
#[derive(Debug)]
pub enum Progress {
    /// It is ready; with a terminal, here is its master.
    Ready(Option<OwnedFd>),
    /// Its program runs, or it was killed: either way the process table tells the rest.
    Gone,
}

/// The agent's end.
#[derive(Debug)]
pub struct Control {
    socket: AsyncFd<OwnedFd>,
}

/// A new pair: the agent's end and the process's.
pub fn pair() -> Result<(Control, OwnedFd), Failure> {
    let (agent, process) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context(|| "make a socket pair for a new process")?;
    // SAFETY: the descriptor is owned, and stays the same for as long as it is registered.
    let socket = unsafe { AsyncFd::register_with_interest(agent, Interest::READABLE) }
        .context(|| "watch a new process's socket")?;
    Ok((Control { socket }, process))
}

impl Control {
    /// Waits for the process's next word.
    pub async fn next(&self) -> Result<Progress, Failure> {
        loop {
            let mut guard = self
                .socket
                .readable()
                .await
                .context(|| "wait for a process that is being set up")?;
            match receive(self.socket.get_ref().as_fd()) {
                Ok(None) => return Ok(Progress::Gone),
                Ok(Some((Some(Report::Ready), master))) => return Ok(Progress::Ready(master)),
                Ok(Some((Some(Report::Failed(failure)), _))) => return Err(failure),
                Ok(Some((None, _))) => {
                    return Err(Failure::new(
                        Kind::Internal,
                        "a process that is being set up sent something unintelligible",
                    ));
                }
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                // The process was killed while something was on its way to it.
                Err(Errno::CONNRESET) => return Ok(Progress::Gone),
                Err(error) => {
                    return Err(Failure::internal(
                        "hear from a process that is being set up",
                        error,
                    ));
                }
            }
        }
    }

    /// Lets a process that is ready execute its program.
    pub fn start(&self) -> Result<(), Failure> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::send(self.socket.get_ref(), &[START], flags) {
            Ok(_) => Ok(()),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(Failure::new(
                Kind::FailedPrecondition,
                "the process was killed before it could be started",
            )),
            Err(error) => Err(Failure::internal("start the process", error)),
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

type Packet = (Option<Report>, Option<OwnedFd>);

fn receive(socket: BorrowedFd<'_>) -> rustix::io::Result<Option<Packet>> {
    let mut bytes = vec![0; MAX_REPORT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let packet = bytes.get(..received.bytes).unwrap_or_default();
    Ok(Some((Report::decode(packet), descriptor)))
}

/// In the process: tells the agent, with a descriptor if there is one.
pub fn send(
    socket: BorrowedFd<'_>,
    report: &Report,
    descriptor: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<()> {
    let packet = report.encode();
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&packet)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .map(drop)
}

/// In the process: waits for the agent's word. `false` when it never comes.
pub fn await_start(socket: BorrowedFd<'_>) -> bool {
    loop {
        let mut word = [0];
        match rustix::net::recv(socket, &mut word, RecvFlags::empty()) {
            Ok((1, _)) => return word == [START],
            Err(Errno::INTR) => {}
            _ => return false,
        }
    }
}
