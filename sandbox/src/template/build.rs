//! Making a template: a VM with nothing of a user's in it boots, its agent prepares what every
//! container needs, and the VMM saves it.

use super::TemplateError;
use super::key::Identity;
use super::lock::KeyLock;
use super::save::save;
use super::store::{Description, MEMORY, STATE, Store, Template};
use crate::boot::{self, BootError, Launch};
use crate::cache::{Key, now};
use crate::config::Config;
use crate::folder::RuntimeFolder;
use crate::images::Images;
use crate::sizing::MachineSize;
use crate::spec::HostNetns;
use crate::vmm::{SharedVmm, VmEnd};
use bulkhead_proto::vmm::ExitReason;
use std::time::{Duration, Instant};

/// How long a start waits for another that builds the template it needs. On a KVM that emulates
/// guest kernel mode a build takes some 15 s, more when many boot at once; a start that has waited
/// in vain still has its own boot before it.
const BUILD_WAIT: Duration = Duration::from_secs(90);

/// How long writing the machine to the disk may take, and the VMM to leave after that.
const SAVE_LIMIT: Duration = Duration::from_secs(60);
const LEAVE_LIMIT: Duration = Duration::from_secs(10);

/// How far a build has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The VM boots.
    Booting,
    /// The agent has answered and makes what containers need.
    Preparing,
    /// The VMM writes the machine to the disk.
    Saving,
}

/// Everything that a template is made from.
pub(crate) struct Builder<'a> {
    pub store: &'a Store,
    pub config: &'a Config,
    pub images: &'a Images,
    pub size: MachineSize,
    pub identity: &'a Identity,
    pub key: &'a Key,
}

/// Ends a VM that nobody else will.
struct KillOnDrop(SharedVmm);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // Without effect on one that has ended.
        self.0.kill();
    }
}

impl Builder<'_> {
    /// The template, built now if there is none or only `refused`, by this process or by the one
    /// that is at it already. What couldn't be built a short while ago isn't tried again.
    pub async fn find_or_build(
        &self,
        refused: Option<&Template>,
    ) -> Result<Template, TemplateError> {
        // Held over the whole build: that is its purpose.
        let lock = KeyLock::take(self.store, self.key, BUILD_WAIT).await?;
        if let Some(refused) = refused {
            self.store.remove_if_same(&lock, refused)?;
        }
        if let Some(found) = self.store.find(self.key)? {
            return Ok(found);
        }
        if let Some(reason) = self.store.recent_failure(&lock) {
            return Err(TemplateError::FailedBefore { reason });
        }
        self.build_noted(&lock, &|_| ()).await
    }

    /// Builds the template, even in the place of one that is there.
    pub async fn build(
        &self,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Template, TemplateError> {
        let lock = KeyLock::take(self.store, self.key, BUILD_WAIT).await?;
        self.build_noted(&lock, progress).await
    }

    /// Has the next starts leave the key alone for a while: its template was built, but is no good.
    pub async fn give_up(&self, template: &Template, reason: &str) -> Result<(), TemplateError> {
        let lock = KeyLock::take(self.store, self.key, BUILD_WAIT).await?;
        self.store.remove_if_same(&lock, template)?;
        self.store.note_failure(&lock, reason);
        Ok(())
    }

    async fn build_noted(
        &self,
        lock: &KeyLock,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Template, TemplateError> {
        if let Err(error) = self.store.sweep() {
            tracing::warn!(%error, "what ended builds left stays for now");
        }
        let built = self.build_locked(lock, progress).await;
        match &built {
            Ok(_) => {
                self.store.forget_failure(lock);
                let limit = u64::from(self.config.template_limit_mib) << 20;
                if let Err(error) = self.store.enforce_limit(limit, self.key) {
                    tracing::warn!(%error, "the limit of the template folder is not enforced");
                }
            }
            Err(error) => self.store.note_failure(lock, &error.to_string()),
        }
        built
    }

    async fn build_locked(
        &self,
        lock: &KeyLock,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Template, TemplateError> {
        let begin = Instant::now();
        tracing::info!(key = self.key.short(), size = ?self.size, "building a template");
        let build = self.store.begin_build(lock)?;
        let folder = build.folder();
        folder.create_bare().map_err(BootError::from)?;
        progress(Progress::Booting);
        let guest = boot::launch(Launch {
            sandbox: &format!("template-{}", self.key.short()),
            config: self.config,
            folder: &folder,
            size: self.size,
            netns: &HostNetns::New,
            cgroup: None,
            images: self.images,
            template: None,
            dies_with_us: true,
        })
        .await?
        .0;
        let (vmm, pace) = (guest.vmm.clone(), guest.pace);
        let _vm = KillOnDrop(vmm.clone());
        progress(Progress::Preparing);
        let prepared = guest.prepare().await;
        prepared.map_err(|cause| TemplateError::Prepare { cause })?;
        // With it goes the connection to the agent.
        drop(guest);

        progress(Progress::Saving);
        let files = [build.create(MEMORY)?, build.create(STATE)?];
        self.save(folder, files, &vmm).await?;
        let elapsed = begin.elapsed();
        let description = Description {
            identity: self.identity.clone(),
            created: now(),
            build_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        };
        let template = self.store.publish(lock, build, &description)?;
        tracing::info!(
            key = self.key.short(),
            build_ms = description.build_ms,
            ?pace,
            "built a template"
        );
        Ok(template)
    }

    async fn save(
        &self,
        folder: RuntimeFolder,
        files: [std::fs::File; 2],
        vmm: &SharedVmm,
    ) -> Result<(), TemplateError> {
        let saved = tokio::task::spawn_blocking(move || save(&folder, files, SAVE_LIMIT)).await;
        let failed = |reason: String| TemplateError::Save { reason };
        saved
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))?;
        match tokio::time::timeout(LEAVE_LIMIT, vmm.wait()).await {
            Ok(VmEnd::Reported(ExitReason::Saved)) => Ok(()),
            Ok(end) => Err(failed(format!("after the save it ended otherwise: {end}"))),
            Err(_) => Err(failed(format!(
                "it still runs {LEAVE_LIMIT:?} after the save"
            ))),
        }
    }
}
