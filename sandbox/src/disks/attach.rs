//! Disks into a running VM and out of it again: plugged into a spare slot by the VMM, then taken
//! into use by the guest.

use super::volumes::Number;
use super::{Disk, DiskError};
use crate::folder::RuntimeFolder;
use crate::guest::Guest;
use crate::prepare::Prepared;
use crate::slots::{plug_block, take_out};
use bulkhead_proto::vmm::PluggedSlot;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A container's disks in the VM.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attached {
    slots: Vec<PluggedSlot>,
    /// From the host's numbers of devices to the guest's.
    pub numbers: BTreeMap<Number, Number>,
}

impl Attached {
    /// Attaches all disks of `prepared`. On failure none is left.
    pub async fn new(guest: &Guest, prepared: &Prepared) -> Result<Self, DiskError> {
        let folder = Arc::new(prepared.plan.folder.clone());
        let mut attached = Self::default();
        match attached.add_all(guest, &folder, prepared).await {
            Ok(()) => Ok(attached),
            Err(error) => {
                attached.remove(Some(guest), &folder).await;
                Err(error)
            }
        }
    }

    async fn add_all(
        &mut self,
        guest: &Guest,
        folder: &Arc<RuntimeFolder>,
        prepared: &Prepared,
    ) -> Result<(), DiskError> {
        for disk in &prepared.disks {
            self.add(guest, folder, disk).await?;
        }
        for device in &prepared.devices {
            let number = self.add(guest, folder, &device.disk).await?;
            self.numbers.insert(device.host, number);
        }
        Ok(())
    }

    async fn add(
        &mut self,
        guest: &Guest,
        folder: &Arc<RuntimeFolder>,
        disk: &Disk,
    ) -> Result<Number, DiskError> {
        let failed = |cause: String| DiskError::NotAttached {
            path: disk.path.clone(),
            cause,
        };
        let backing = disk.open()?;
        let slot = plug_block(folder, &disk.serial, disk.read_only, backing)
            .await
            .map_err(|error| failed(error.to_string()))?;
        self.slots.push(slot);
        let found = guest.attach_disk(slot).await;
        let (major, minor) = found.map_err(|error| failed(error.to_string()))?;
        Ok((major.into(), minor.into()))
    }

    /// Takes them out again, as far as they can be. Without a guest that answers, the disks just
    /// vanish from it.
    pub async fn remove(&self, guest: Option<&Guest>, folder: &Arc<RuntimeFolder>) {
        for slot in self.slots.iter().rev() {
            let Some(guest) = guest else { return };
            take_out(guest, folder, *slot).await;
        }
    }
}
