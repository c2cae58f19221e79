//! The set-up process of the next container, made before anyone asks for it.
//!
//! Making a process is a large part of what a container costs: the copy of the agent's page
//! tables, the page faults that follow in both, a pid and a mount namespace, a cgroup. All of that
//! is the same for every container, so one such process is made before the machine is saved, and
//! waits there for its orders: the spec, the standard streams, the terminal's size. Nothing of a
//! user's is in it, and what it executes in the end gets a memory and an address layout of its own,
//! as every program does.

use super::child::{self, ChildSetup, Role};
use super::control::{Control, send};
use super::report::Report;
use super::spawn::Spawned;
use super::terminal::WindowSize;
use crate::cgroups::Cgroup;
use crate::error::{Context, Failure, Kind};
use crate::spares::{Spares, Taken};
use crate::spec::ContainerPlan;
use crate::warm;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

/// Namespaces that it is born in. Those that can be held by a descriptor are in [`Spares`].
pub const NAMESPACES: i32 = libc::CLONE_NEWNS | libc::CLONE_NEWPID;

/// Longest spec that it takes, in bytes; several times as long as ordinary ones.
const MAX_SPEC: usize = 60 * 1024;

/// Flags of the spare namespaces, rows and columns: 4, 2 and 2 bytes, little-endian.
const HEADER: usize = 8;

/// A set-up process that waits, from the agent's side.
#[derive(Debug)]
pub struct Ahead {
    /// Its streams don't exist yet.
    pub spawned: Spawned,
    /// It was born in this one.
    pub cgroup: Option<Arc<Cgroup>>,
}

/// What it gets to know.
#[derive(Debug)]
pub struct Orders<'a> {
    /// The spec, which the agent has checked.
    pub spec: &'a [u8],
    /// Namespaces of [`Spares`] that are for this container.
    pub spares: i32,
    /// To become descriptors 0, 1 and 2.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Initial size of the terminal, if it gets one.
    pub size: Option<WindowSize>,
}

/// Whether such a process can become the first one of this container.
pub fn suits(plan: &ContainerPlan, spec: &[u8]) -> bool {
    // Hooks are told the container's id, which is not in the spec.
    plan.namespaces.clone_flags & NAMESPACES == NAMESPACES
        && spec.len() <= MAX_SPEC
        && plan.hooks.is_empty()
        // What it was born in belongs to the guest's own users.
        && plan.namespaces.ids.is_none()
}

impl Orders<'_> {
    /// Gives them to a waiting process.
    pub fn give(&self, control: &Control) -> Result<(), Failure> {
        let (rows, columns) = self.size.map_or((0, 0), WindowSize::cells);
        let mut header = [0; HEADER];
        let parts = [
            &self.spares.to_le_bytes()[..],
            &rows.to_le_bytes(),
            &columns.to_le_bytes(),
        ];
        for (to, from) in header.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&self.stdio));
        let packet = [IoSlice::new(&header), IoSlice::new(self.spec)];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(control.as_fd(), &packet, &mut ancillary, flags)
            .map(drop)
            .context(|| "give a waiting process its orders")
    }
}

/// In the process: waits for orders and carries them out.
pub fn run(control: RawFd, cgroup: Option<&Path>, spares: &Spares) -> ! {
    // SAFETY: the descriptor is open, and it is closed by nothing but the exec or the exit.
    let socket = unsafe { BorrowedFd::borrow_raw(control) };
    let (orders, plan, taken) = match await_orders(socket, spares) {
        Ok(Some(received)) => received,
        // The agent is gone, or has thought better of it.
        Ok(None) => child::end(),
        Err(failure) => child::give_up(socket, failure),
    };
    let stdio = orders.stdio.each_ref().map(AsRawFd::as_raw_fd);
    child::run(ChildSetup {
        role: Role::Init {
            id: "",
            plan: &plan,
            cgroup,
            born: NAMESPACES,
            spares: &taken,
            sources: None,
        },
        stdio,
        control,
        size: orders.size,
    })
}

struct Received {
    stdio: [OwnedFd; 3],
    size: Option<WindowSize>,
}

fn await_orders(
    socket: BorrowedFd<'_>,
    spares: &Spares,
) -> Result<Option<(Received, ContainerPlan, Taken)>, Failure> {
    let [network, ipc] = spares.raw();
    child::close_all_but(
        [Some(socket.as_raw_fd()), network, ipc]
            .into_iter()
            .flatten(),
    )?;
    child::heed_broken_pipes();
    let mut packet = vec![0; HEADER + MAX_SPEC];
    warm::touch(&mut packet);
    warm::memory();
    send(socket, &Report::Ready, None).context(|| "report to the agent")?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let slice = IoSliceMut::new(&mut packet);
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut [slice], &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received.context(|| "wait for orders")?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten();
    let unintelligible = || Failure::new(Kind::Internal, "a waiting process got strange orders");
    let stdio: [OwnedFd; 3] = descriptors
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| unintelligible())?;
    let packet = packet.get(..received.bytes).unwrap_or_default();
    let (header, spec) = packet
        .split_first_chunk::<HEADER>()
        .ok_or_else(unintelligible)?;
    let [a, b, c, d, rows @ .., x, y] = *header;
    let size = WindowSize::new(
        u16::from_le_bytes(rows).into(),
        u16::from_le_bytes([x, y]).into(),
    )?;
    let taken = spares.take_flags(i32::from_le_bytes([a, b, c, d]));
    let plan = ContainerPlan::parse(spec)?;
    Ok(Some((Received { stdio, size }, plan, taken)))
}
