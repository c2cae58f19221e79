//! What a machine must have in common with the one that was saved.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use bulkhead_proto::vmm::KvmKind;
use serde::{Deserialize, Serialize};

use super::format::checksum;
use crate::config::BlockResource;

/// Bytes at the beginning of an image that tell it from another: an ELF file's headers, a file
/// system's superblock.
const HEAD: usize = 16 << 10;

/// The machine as the guest was told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Length in bytes of the region for memory that can be plugged; 0 if there is none.
    pub hotplug_bytes: u64,
    /// How KVM runs guest kernel mode, on which the command line depends.
    pub kvm: KvmKind,
    /// The kernel's command line, which names the device windows.
    pub command_line: String,
    /// The kernel that was booted.
    pub kernel: Image,
    /// Block devices in slot order.
    pub block: Vec<BlockShape>,
    /// virtio-fs is there.
    pub share: bool,
}

/// A block device of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockShape {
    serial: String,
    read_only: bool,
    /// None for a slot that was empty, which may have been filled since.
    image: Option<Image>,
}

/// Tells an image from another one without reading all of it: a swapped or rebuilt one is found,
/// a forged one is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    bytes: u64,
    head: u64,
}

impl BlockShape {
    /// What there is of each device.
    ///
    /// # Errors
    /// When an image can't be read.
    pub fn of_all(devices: &[BlockResource]) -> io::Result<Vec<Self>> {
        devices
            .iter()
            .map(|block| {
                Ok(Self {
                    serial: block.serial.clone(),
                    read_only: block.read_only,
                    image: block.file.as_ref().map(Image::of).transpose()?,
                })
            })
            .collect()
    }
}

impl Image {
    /// Reads the length and the beginning of `file`.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn of(mut file: &File) -> io::Result<Self> {
        let bytes = file.seek(SeekFrom::End(0))?;
        let mut head = vec![0; usize::try_from(bytes).map_or(HEAD, |bytes| bytes.min(HEAD))];
        file.read_exact_at(&mut head, 0)?;
        Ok(Self {
            bytes,
            head: checksum(&head),
        })
    }
}

/// The first difference between two shapes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the template's machine has {what} {saved}, this one {here}")]
pub struct Difference {
    /// Of what.
    pub what: &'static str,
    /// In the template.
    pub saved: String,
    /// Here.
    pub here: String,
}

impl Shape {
    /// Whether a machine of shape `here` can go on from one of this shape. Slots that were empty
    /// may have a backing by now.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, here: &Shape) -> Result<(), Difference> {
        fn same<T: PartialEq + std::fmt::Debug>(
            what: &'static str,
            saved: &T,
            here: &T,
        ) -> Result<(), Difference> {
            if saved == here {
                return Ok(());
            }
            Err(Difference {
                what,
                saved: format!("{saved:?}"),
                here: format!("{here:?}"),
            })
        }
        same("vcpus", &self.vcpus, &here.vcpus)?;
        same("memory_bytes", &self.memory_bytes, &here.memory_bytes)?;
        same("hotplug_bytes", &self.hotplug_bytes, &here.hotplug_bytes)?;
        same("KVM kind", &self.kvm, &here.kvm)?;
        same("kernel image", &self.kernel, &here.kernel)?;
        same(
            "number of block devices",
            &self.block.len(),
            &here.block.len(),
        )?;
        for (saved, here) in self.block.iter().zip(&here.block) {
            same("block serial", &saved.serial, &here.serial)?;
            same("block read_only", &saved.read_only, &here.read_only)?;
            if saved.image.is_some() {
                same("block image", &saved.image, &here.image)?;
            }
        }
        same("share", &self.share, &here.share)?;
        same(
            "kernel command line",
            &self.command_line,
            &here.command_line,
        )
    }
}
