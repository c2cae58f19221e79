//! Templates: machines saved once their agent was ready, of which every start clones one.
//!
//! ```text
//! start ─► identity, key (key.rs) ─► in the store (store.rs)? ── yes ──► clone ─► Identify ─► up
//!                                        │ no                              │ refused: removed
//!                                   key's lock (lock.rs) ◄─────────────────┘
//!                                        │
//!                           builder VM: boot, Prepare, SaveTemplate (build.rs, save.rs)
//!                                        │
//!                              one rename into the store ─► clone
//! ```
//!
//! No failure on this way is the user's: whatever can't be read, built, saved or continued, the VM
//! boots cold then, and the log says why. A template holds nothing of a user's: the builder VM has
//! an empty share, a network namespace of its own, and is saved before any container was created.

mod build;
pub(crate) mod identify;
mod key;
mod lock;
mod save;
mod store;

pub use crate::cache::Key;
pub use build::Progress;
pub use key::{FileIdentity, Host, Identity, Shape};
pub use store::{Description, Entry, Store};

pub(crate) use store::Template;

use crate::boot::{self, BootError, BootPlan, Up};
use crate::config::Config;
use crate::guest::AgentError;
use crate::images::Images;
use crate::sizing::MachineSize;
use crate::vmm::VmEnd;
use build::Builder;
use bulkhead_proto::vmm::ExitReason;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A template that can't be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file operation failed.
    #[error("cannot {verb} {path}: {cause}", path = .path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// The store isn't this user's alone.
    #[error(
        "the template folder {path} is not usable: {problem}; set `template_dir` in the \
         configuration to a folder of root's alone",
        path = .path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The files that a template depends on can't be looked at.
    #[error("cannot tell which template fits this start: {0}")]
    Identity(io::Error),
    /// Another process builds the template and doesn't come to an end.
    #[error("another start was still building the template after {limit:?}")]
    StillBuilding {
        /// How long was waited.
        limit: Duration,
    },
    /// Asked to remove a template that is being built or replaced.
    #[error("the template is being built or replaced at this moment; try again when that is done")]
    InUse,
    /// A build failed a short while ago.
    #[error(
        "building the template failed a short while ago ({reason}); `bulkhead template build` \
         tries again at once"
    )]
    FailedBefore {
        /// What was said then.
        reason: String,
    },
    /// The builder VM didn't come up, or the clone didn't.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The agent couldn't prepare the guest.
    #[error("the template's guest could not be prepared: {cause}")]
    Prepare {
        /// Why.
        cause: AgentError,
    },
    /// The VMM couldn't save the machine.
    #[error(
        "the VMM did not save the machine: {reason}; look for room where `template_dir` of the \
         configuration is"
    )]
    Save {
        /// What it said.
        reason: String,
    },
}

/// Starts a VM from its template, which is built if there is none.
pub(crate) async fn start(plan: &BootPlan, images: &Images) -> Result<Up, TemplateError> {
    let begin = Instant::now();
    let store = Store::open(&plan.config.template_dir)?;
    let identity =
        Identity::of(&plan.config, images, plan.size).map_err(TemplateError::Identity)?;
    let key = identity.key();
    let builder = Builder {
        store: &store,
        config: &plan.config,
        images,
        size: plan.size,
        identity: &identity,
        key: &key,
    };
    let (template, just_built) = match store.find(&key)? {
        Some(template) => (template, false),
        None => (builder.find_or_build(None).await?, true),
    };
    let found_us = micros(begin.elapsed());
    tracing::info!(key = key.short(), found_us, "starting from a template");
    let error = match clone(plan, images, &template).await {
        Ok(up) => return Ok(up),
        Err(error) => error,
    };
    if !blames_template(&error) {
        return Err(error.into());
    }
    tracing::warn!(key = key.short(), %error, "the template is no good and is removed");
    if just_built || !is_refusal(&error) {
        // What was built a moment ago would be no better the next time.
        builder.give_up(&template, &error.to_string()).await?;
        return Err(error.into());
    }
    let rebuilt = builder.find_or_build(Some(&template)).await?;
    match clone(plan, images, &rebuilt).await {
        Ok(up) => Ok(up),
        Err(error) => {
            if blames_template(&error) {
                builder.give_up(&rebuilt, &error.to_string()).await?;
            }
            Err(error.into())
        }
    }
}

async fn clone(plan: &BootPlan, images: &Images, template: &Template) -> Result<Up, BootError> {
    let up = boot::start_in_folder(plan, images, Some(template)).await?;
    template.note_use();
    Ok(up)
}

fn is_refusal(error: &BootError) -> bool {
    matches!(
        error,
        BootError::Ended {
            end: VmEnd::Reported(ExitReason::TemplateRefused { .. }),
            ..
        }
    )
}

/// Whether the template, and not the host or an administrator, may be what made its clone fail.
fn blames_template(error: &BootError) -> bool {
    match error {
        BootError::Agent { .. } | BootError::TimedOut { .. } => true,
        BootError::Ended { end, .. } => matches!(
            end,
            VmEnd::Reported(
                ExitReason::TemplateRefused { .. }
                    | ExitReason::KvmFailed { .. }
                    | ExitReason::GuestPanic { .. }
                    | ExitReason::GuestShutdown
            )
        ),
        BootError::Image(_)
        | BootError::Folder(_)
        | BootError::Own(_)
        | BootError::Cgroup(_)
        | BootError::Configure { .. } => false,
    }
}

/// Builds the template of a machine of this size now, even if there is one, and says how far it
/// has come. Must be called on a tokio runtime with I/O and time.
///
/// # Errors
/// When something that it's made from is missing, or the builder VM can't be booted or saved.
pub async fn build(
    config: &Config,
    size: MachineSize,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Entry, TemplateError> {
    let images = Images::open(config).map_err(BootError::from)?;
    let store = Store::open(&config.template_dir)?;
    let identity = Identity::of(config, &images, size).map_err(TemplateError::Identity)?;
    let key = identity.key();
    let builder = Builder {
        store: &store,
        config,
        images: &images,
        size,
        identity: &identity,
        key: &key,
    };
    builder.build(progress).await?;
    let built = store.list()?.into_iter().find(|entry| entry.key == key);
    built.ok_or_else(|| TemplateError::Io {
        verb: "find the template that was just built in",
        path: store.path().into(),
        cause: io::ErrorKind::NotFound.into(),
    })
}

/// For log fields.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
