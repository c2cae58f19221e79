//! How a device's window is connected to KVM: a pin of the I/O APIC with an irqfd, and an ioeventfd
//! for each queue.

use bulkhead_proto::vmm::{FIRST_SPARE_SLOT, SPARE_SLOTS};
use kvm_ioctls::{IoEventAddress, VmFd};
use std::sync::Arc;
use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout;
use crate::coalesced;
use crate::pins::Pins;
use crate::virtio::VirtioDevice;
use crate::virtio::interrupt::Line;
use crate::virtio::mmio::{
    self, ACKNOWLEDGEMENT, MMIO_SIZE, MmioTransport, PREPARING, QUEUE_NOTIFY,
};

/// Why a device's window could not be connected.
#[derive(Debug, Error)]
pub enum WiringError {
    /// A register window.
    #[error(transparent)]
    Mmio(#[from] mmio::Error),
    /// An interrupt line's descriptor.
    #[error(
        "creating the interrupt descriptor of slot {slot}: {source}; check the limit on open files (ulimit -n)"
    )]
    EventFd {
        /// Which slot.
        slot: u32,
        /// Its error.
        #[source]
        source: std::io::Error,
    },
    /// KVM refused a line or a notification address.
    #[error("{call} for slot {slot}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Which slot.
        slot: u32,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Where a device is: its slot, and with it its window, and its interrupt line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the slot.
    pub slot: u32,
    /// Pin of the IO-APIC.
    pub irq: u32,
}

impl Place {
    /// Of the device at this index of those that the machine starts with. Each has a line of its own.
    pub fn of_boot_device(index: usize) -> Self {
        debug_assert!(index < (layout::FIRST_SPARE_IRQ - layout::FIRST_DEVICE_IRQ) as usize);
        let slot = index as u32;
        Self {
            slot,
            irq: layout::FIRST_DEVICE_IRQ + slot,
        }
    }

    /// Of the spare slot with this number, if there is one. Spare slots share lines in turn.
    pub fn of_spare(slot: u32) -> Option<Self> {
        let index = slot
            .checked_sub(FIRST_SPARE_SLOT)
            .filter(|index| *index < SPARE_SLOTS)?;
        let lines = layout::IRQ_END - layout::FIRST_SPARE_IRQ;
        Some(Self {
            slot,
            irq: layout::FIRST_SPARE_IRQ + index % lines,
        })
    }

    /// Guest-physical address of the window.
    pub fn address(self) -> u64 {
        layout::MMIO_BASE + u64::from(self.slot) * MMIO_SIZE
    }

    /// Puts a device behind the window.
    ///
    /// # Errors
    /// [`WiringError`]; nothing is connected then.
    pub fn connect(
        self,
        pins: &Arc<Pins>,
        memory: &GuestMemoryMmap,
        device: Box<dyn VirtioDevice>,
    ) -> Result<MmioTransport, WiringError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            WiringError::EventFd {
                slot: self.slot,
                source,
            }
        })?;
        let line = Line::of_pin(event, Arc::clone(pins), self.irq);
        let window = MmioTransport::new(memory.clone(), device, line)?;
        if let Err(error) = self.register(pins.vm(), &window) {
            self.disconnect(pins.vm(), &window);
            return Err(error);
        }
        Ok(window)
    }

    fn register(self, vm: &VmFd, window: &MmioTransport) -> Result<(), WiringError> {
        vm.register_irqfd(window.interrupt_event(), self.irq)
            .map_err(self.refused("KVM_IRQFD"))?;
        for (index, event) in window.queue_events().iter().enumerate() {
            vm.register_ioevent(event, &self.notify(), index as u32)
                .map_err(self.refused("KVM_IOEVENTFD"))?;
        }
        Ok(())
    }

    /// Undoes [`Place::connect`], or what there is of it.
    pub fn disconnect(self, vm: &VmFd, window: &MmioTransport) {
        for (index, event) in window.queue_events().iter().enumerate() {
            // Fails for what isn't registered, and for nothing else.
            let _ = vm.unregister_ioevent(event, &self.notify(), index as u32);
        }
        let _ = vm.unregister_irqfd(window.interrupt_event(), self.irq);
        let (offset, length) = ACKNOWLEDGEMENT;
        coalesced::leave(vm, self.address() + offset, length);
    }

    /// Spares the guest's driver an exit for most of what it writes to set its device up, and for the
    /// acknowledgement of each interrupt; see [`coalesced`].
    ///
    /// # Errors
    /// What KVM says.
    pub fn gather_writes(self, vm: &VmFd) -> Result<(), WiringError> {
        for registers in PREPARING {
            self.gather(vm, registers)?;
        }
        self.gather_acknowledgements(vm)
    }

    /// The same for acknowledgements alone: of two exits for each interrupt one is left.
    ///
    /// # Errors
    /// What KVM says.
    pub fn gather_acknowledgements(self, vm: &VmFd) -> Result<(), WiringError> {
        self.gather(vm, ACKNOWLEDGEMENT)
    }

    fn gather(self, vm: &VmFd, (offset, length): (u64, u32)) -> Result<(), WiringError> {
        coalesced::gather(vm, self.address() + offset, length)
            .map_err(self.refused("KVM_REGISTER_COALESCED_MMIO"))
    }

    fn notify(self) -> IoEventAddress {
        IoEventAddress::Mmio(self.address() + QUEUE_NOTIFY)
    }

    fn refused(self, call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> WiringError {
        let slot = self.slot;
        move |source| WiringError::Kvm { call, slot, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_slots_have_windows_and_lines_that_no_boot_device_has() {
        let most = (layout::FIRST_SPARE_IRQ - layout::FIRST_DEVICE_IRQ) as usize;
        let last = Place::of_boot_device(most - 1);
        assert!(last.slot < FIRST_SPARE_SLOT && last.irq < layout::FIRST_SPARE_IRQ);
        let spares: Vec<_> = (0..FIRST_SPARE_SLOT + SPARE_SLOTS + 1)
            .filter_map(Place::of_spare)
            .collect();
        assert_eq!(spares.len(), SPARE_SLOTS as usize);
        for (index, place) in spares.iter().enumerate() {
            assert_eq!(place.slot, FIRST_SPARE_SLOT + index as u32);
            assert!((layout::FIRST_SPARE_IRQ..layout::IRQ_END).contains(&place.irq));
            assert!(place.address() + MMIO_SIZE <= u64::from(layout::IO_APIC));
        }
        assert_eq!(Place::of_spare(u32::MAX), None);
    }
}
