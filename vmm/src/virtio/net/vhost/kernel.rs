//! An open /dev/vhost-net and what it is asked for: one pair of queues each.

use super::super::super::queue::Virtqueue;
use super::super::super::{F_EVENT_IDX, F_VERSION_1};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use vhost::net::VhostNet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding as kernel;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net as ids;
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

/// Index of a pair's queues in its vhost device.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Features that have two sides, of which the kernel's is one.
pub const SHARED: u64 = F_VERSION_1 | F_EVENT_IDX | 1 << ids::VIRTIO_NET_F_MRG_RXBUF;

/// Requests of vhost's descriptors, for the threads that make them.
pub mod ioctls {
    use vhost::vhost_kern::vhost_binding as kernel;

    /// When a card is plugged.
    pub fn plug() -> [u64; 2] {
        [kernel::VHOST_GET_FEATURES(), kernel::VHOST_SET_OWNER()].map(Into::into)
    }

    /// When its driver activates or resets it.
    pub fn activate() -> [u64; 9] {
        [
            kernel::VHOST_SET_FEATURES(),
            kernel::VHOST_SET_MEM_TABLE(),
            kernel::VHOST_SET_VRING_NUM(),
            kernel::VHOST_SET_VRING_ADDR(),
            kernel::VHOST_SET_VRING_BASE(),
            kernel::VHOST_SET_VRING_KICK(),
            kernel::VHOST_SET_VRING_CALL(),
            kernel::VHOST_SET_VRING_ERR(),
            kernel::VHOST_NET_SET_BACKEND(),
        ]
        .map(Into::into)
    }
}

/// A card could not be set up with vhost-net.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The descriptor is another one, or the kernel refuses.
    #[error("{call} on a descriptor of vhost-net: {source}; it must be one of /dev/vhost-net's")]
    Call {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: vhost::Error,
    },
    /// Descriptors of this process.
    #[error("creating an event descriptor: {0}; check the limit on open files (ulimit -n)")]
    EventFd(#[source] io::Error),
}

fn failed(call: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Call { call, source }
}

/// An open /dev/vhost-net, which serves one pair of queues.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    memory: Arc<GuestMemoryMmap>,
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

impl VhostNet for Kernel {
    fn set_backend(&self, queue_idx: usize, fd: Option<&File>) -> vhost::Result<()> {
        let backend = kernel::vhost_vring_file {
            index: queue_idx as u32,
            fd: fd.map_or(-1, AsRawFd::as_raw_fd),
        };
        // SAFETY: reads a vhost_vring_file, which lives across the call.
        match unsafe { ioctl_with_ref(self, kernel::VHOST_NET_SET_BACKEND(), &backend) } {
            0 => Ok(()),
            _ => Err(vhost::Error::IoctlError(io::Error::last_os_error())),
        }
    }
}

impl Kernel {
    /// Takes the descriptor for this process, and tells which features the kernel has.
    pub fn new(
        descriptor: OwnedFd,
        memory: Arc<GuestMemoryMmap>,
    ) -> Result<(Self, u64), VhostError> {
        let this = Self {
            file: descriptor.into(),
            memory,
        };
        this.set_owner().map_err(failed("VHOST_SET_OWNER"))?;
        let features = this.get_features();
        let features = features.map_err(failed("VHOST_GET_FEATURES"))?;
        Ok((this, features))
    }

    /// Lets the kernel work on the queues. They don't move before there is a tap.
    pub fn prepare(
        &self,
        features: u64,
        queues: &[Virtqueue; 2],
        line: &EventFd,
        failure: &EventFd,
    ) -> Result<(), VhostError> {
        self.set_features(features & SHARED)
            .map_err(failed("VHOST_SET_FEATURES"))?;
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        self.set_mem_table(&regions)
            .map_err(failed("VHOST_SET_MEM_TABLE"))?;
        for (index, queue) in queues.iter().enumerate() {
            let ring = queue.state();
            let addresses = VringConfigData {
                queue_max_size: ring.max_size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: ring.desc_table,
                used_ring_addr: ring.used_ring,
                avail_ring_addr: ring.avail_ring,
                log_addr: None,
            };
            self.set_vring_num(index, ring.size)
                .map_err(failed("VHOST_SET_VRING_NUM"))?;
            self.set_vring_base(index, ring.next_avail)
                .map_err(failed("VHOST_SET_VRING_BASE"))?;
            self.set_vring_addr(index, &addresses)
                .map_err(failed("VHOST_SET_VRING_ADDR"))?;
            self.set_vring_call(index, line)
                .map_err(failed("VHOST_SET_VRING_CALL"))?;
            self.set_vring_err(index, failure)
                .map_err(failed("VHOST_SET_VRING_ERR"))?;
            self.set_vring_kick(index, queue.kick())
                .map_err(failed("VHOST_SET_VRING_KICK"))?;
        }
        Ok(())
    }

    /// Has frames move between the queues and the tap, or no longer. A queue that fails doesn't
    /// keep the other from its change.
    pub fn connect(&self, tap: Option<&File>) -> Result<(), VhostError> {
        let done = [RECEIVE, TRANSMIT].map(|index| self.set_backend(index, tap));
        done.into_iter()
            .collect::<Result<_, _>>()
            .map_err(failed("VHOST_NET_SET_BACKEND"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::super::testing::memory;
    use super::*;

    #[test]
    fn only_vhost_net_is_taken() {
        let file = tempfile::tempfile().unwrap();
        let error = Kernel::new(file.into(), Arc::new(memory())).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("/dev/vhost-net"), "{error}");
    }

    #[test]
    fn requests_have_the_numbers_of_the_kernels_interface() {
        // linux/vhost.h, by the macros of asm-generic/ioctl.h.
        assert_eq!(ioctls::plug(), [0x8008_af00, 0xaf01]);
        let activate = ioctls::activate();
        assert_eq!(activate[0], 0x4008_af00);
        assert_eq!(activate[3], 0x4028_af11);
        assert_eq!(activate[8], 0x4008_af30);
    }
}
