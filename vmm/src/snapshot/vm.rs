//! What KVM keeps of a machine besides its vCPUs: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::restore::{Refused, kvm_refused};
use super::save::{SaveError, kvm_failed};

/// The interrupt controllers in the order in which they are set: the PICs first, since what is
/// pending at the IO-APIC goes on to a CPU at once.
const CONTROLLERS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// Interrupt controllers, timer, clock.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    controllers: [kvm_irqchip; CONTROLLERS.len()],
    /// Only of a machine that has one.
    pit: Option<kvm_pit_state2>,
    /// kvm-clock in nanoseconds since the machine was first started.
    clock_ns: u64,
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("VmState")
            .field("clock_ns", &self.clock_ns)
            .finish_non_exhaustive()
    }
}

impl VmState {
    /// Reads the state of a machine none of whose vCPUs and devices works, and which has a `pit` or
    /// not.
    ///
    /// # Errors
    /// When KVM refuses one of the calls.
    pub fn read(vm: &VmFd, pit: bool) -> Result<Self, SaveError> {
        let mut controllers = [kvm_irqchip::default(); CONTROLLERS.len()];
        for (controller, chip_id) in controllers.iter_mut().zip(CONTROLLERS) {
            controller.chip_id = chip_id;
            vm.get_irqchip(controller)
                .map_err(kvm_failed("KVM_GET_IRQCHIP"))?;
        }
        Ok(Self {
            controllers,
            pit: pit
                .then(|| vm.get_pit2())
                .transpose()
                .map_err(kvm_failed("KVM_GET_PIT2"))?,
            clock_ns: vm.get_clock().map_err(kvm_failed("KVM_GET_CLOCK"))?.clock,
        })
    }

    /// Puts a fresh machine into this state. Its vCPUs must have theirs by now: interrupts that
    /// were pending are delivered to their local APICs. The clock goes on from the instant of
    /// saving.
    ///
    /// # Errors
    /// When KVM refuses one of the calls.
    pub fn write(&self, vm: &VmFd) -> Result<(), Refused> {
        for (controller, chip_id) in self.controllers.iter().zip(CONTROLLERS) {
            let controller = kvm_irqchip {
                chip_id,
                ..*controller
            };
            vm.set_irqchip(&controller)
                .map_err(kvm_refused("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(kvm_refused("KVM_SET_PIT2"))?;
        }
        let clock = kvm_clock_data {
            clock: self.clock_ns,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(kvm_refused("KVM_SET_CLOCK"))
    }
}

#[cfg(test)]
impl VmState {
    /// A state of zeros but for the clock.
    pub(super) fn synthetic() -> Self {
        Self {
            controllers: [kvm_irqchip::default(); CONTROLLERS.len()],
            pit: Some(kvm_pit_state2::default()),
            clock_ns: 12_345_678_901,
        }
    }
}
