//! `delete`: the daemon's call after every lost connection. Idempotent; prints a DeleteResponse
//! and nothing else.

use crate::flags::Flags;
use crate::publisher::timestamp;
use crate::{address, logging};
use bulkhead_sandbox::ExitStatus;
use bulkhead_sandbox::cleanup::clean_up;
use bulkhead_sandbox::ids::ContainerId;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};
use std::path::{Path, PathBuf};

/// Cleans up after `flags.id`; returns what to print.
///
/// # Errors
/// When the id is bad, or something can't be removed.
pub fn run(flags: &Flags) -> Result<Vec<u8>, bulkhead_sandbox::Error> {
    let bundle = bundle(flags);
    logging::to_bundle(&bundle, flags.debug);
    let id = ContainerId::try_from(flags.id.as_str())?;
    let cleaned = clean_up(&bundle, &id)?;
    if cleaned.sandbox_ended {
        remove_dead_socket(&bundle);
    }
    let exit = ExitStatus::killed();
    let answer = DeleteResponse {
        pid: cleaned.pid,
        exit_status: exit.code,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..Default::default()
    };
    // Numbers can't fail to encode.
    Ok(answer.write_to_bytes().unwrap_or_default())
}

/// The bundle as the daemon names it, else the working directory.
fn bundle(flags: &Flags) -> PathBuf {
    let bundle = flags.bundle.clone().filter(|bundle| bundle.is_absolute());
    bundle
        .or_else(|| std::env::current_dir().ok())
        .unwrap_or_default()
}

/// A killed shim leaves its socket, at the address that it left in the bundle.
fn remove_dead_socket(bundle: &Path) {
    let Ok(address) = std::fs::read_to_string(bundle.join("address")) else {
        return;
    };
    let Some(path) = address.trim().strip_prefix("unix://").map(Path::new) else {
        return;
    };
    if path.is_absolute() && !address::answers(path) {
        let _ = std::fs::remove_file(path);
    }
}
