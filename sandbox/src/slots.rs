//! Plugging devices into spare slots of a running VM, and unplugging them. The guest is told by
//! [`Guest::attach_device`](crate::guest::Guest::attach_device).

use crate::Kind;
use crate::control;
use crate::folder::RuntimeFolder;
use crate::guest::{AgentError, Guest};
use bulkhead_proto::vmm::{PluggedSlot, RateLimit, Request, Response};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// One conversation with the VMM, which does nothing in it that takes time.
const STEP: Duration = Duration::from_secs(30);

/// A device that was not plugged or unplugged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SlotError {
    /// The VMM refused.
    #[error("the VMM does not {verb} the {what}: {message}")]
    Refused {
        /// What was tried.
        verb: &'static str,
        /// On what.
        what: String,
        /// The VMM's reason.
        message: String,
    },
    /// The VMM doesn't answer as its contract says, or is gone.
    #[error("asking the VMM to {verb} the {what}: {cause}")]
    Broken {
        /// What was tried.
        verb: &'static str,
        /// On what.
        what: String,
        /// Why it failed.
        cause: io::Error,
    },
}

/// Plugs a disk with this serial number (at most 20 characters) over a raw file or block device.
pub(crate) async fn plug_block(
    folder: &Arc<RuntimeFolder>,
    serial: &str,
    read_only: bool,
    backing: File,
) -> Result<PluggedSlot, SlotError> {
    let request = Request::PlugBlock {
        serial: serial.to_owned(),
        read_only,
    };
    plug(folder, request, vec![backing], format!("disk {serial:?}")).await
}

/// A network card to plug in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NetCard {
    /// Its address, and the only one that its frames may come from.
    pub mac: [u8; 6],
    /// Longest packet in bytes.
    pub mtu: u16,
    /// Limits what the guest gets.
    pub to_guest: RateLimit,
    /// Limits what the guest sends.
    pub from_guest: RateLimit,
}

/// What moves a card's frames.
#[derive(Debug)]
pub(crate) struct NetQueues {
    /// Those of a tap device.
    pub taps: Vec<File>,
    /// As many of /dev/vhost-net; none for the VMM itself.
    pub vhosts: Vec<File>,
}

/// Plugs a network card over the queues of a tap device.
pub(crate) async fn plug_net(
    folder: &Arc<RuntimeFolder>,
    card: NetCard,
    queues: NetQueues,
) -> Result<PluggedSlot, SlotError> {
    let request = Request::PlugNet {
        mac: card.mac,
        mtu: card.mtu,
        any_sender: false,
        to_guest: card.to_guest,
        from_guest: card.from_guest,
        vhost: !queues.vhosts.is_empty(),
    };
    let mut files = queues.taps;
    files.extend(queues.vhosts);
    plug(folder, request, files, "network card".to_owned()).await
}

/// Has the guest let go of a device and takes it out of its slot; whether it's out.
///
/// One that the guest doesn't let go of stays: its requests may be under way, for instance because
/// the host's disk hangs. If it vanished, none of them would ever be answered, and what waits for
/// them in the guest, the agent among it, would wait for ever.
pub(crate) async fn take_out(
    guest: &Guest,
    folder: &Arc<RuntimeFolder>,
    slot: PluggedSlot,
) -> bool {
    let number = slot.slot;
    match guest.detach_device(slot).await {
        // It was never in use, or no longer.
        Ok(())
        | Err(AgentError::Refused {
            kind: Kind::NotFound,
            ..
        }) => {}
        Err(error) => {
            tracing::warn!(%error, number, "a device that the guest does not let go of stays");
            return false;
        }
    }
    let out = unplug(folder, slot).await;
    if let Err(error) = &out {
        tracing::warn!(%error, number, "a device stays in the virtual machine");
    }
    out.is_ok()
}

async fn unplug(folder: &Arc<RuntimeFolder>, slot: PluggedSlot) -> Result<(), SlotError> {
    let what = format!("device in slot {}", slot.slot);
    let request = Request::Unplug { slot: slot.slot };
    match ask(folder, request, Vec::new(), "unplug", what.clone()).await? {
        Response::Ok => Ok(()),
        other => Err(unexpected("unplug", what, other)),
    }
}

async fn plug(
    folder: &Arc<RuntimeFolder>,
    request: Request,
    files: Vec<File>,
    what: String,
) -> Result<PluggedSlot, SlotError> {
    match ask(folder, request, files, "plug", what.clone()).await? {
        Response::Plugged { slot } => Ok(slot),
        other => Err(unexpected("plug", what, other)),
    }
}

async fn ask(
    folder: &Arc<RuntimeFolder>,
    request: Request,
    files: Vec<File>,
    verb: &'static str,
    what: String,
) -> Result<Response, SlotError> {
    control::ask_later(folder, request, files, STEP)
        .await
        .map_err(|cause| SlotError::Broken { verb, what, cause })
}

fn unexpected(verb: &'static str, what: String, response: Response) -> SlotError {
    match response {
        Response::Error { message } => SlotError::Refused {
            verb,
            what,
            message,
        },
        _ => SlotError::Broken {
            verb,
            what,
            cause: io::Error::other("it answered another question"),
        },
    }
}
