//! The pins of the machine's I/O APIC, by which devices interrupt the guest; edge-triggered, all of
//! them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VmFd;

/// Raises pins by calls, rather than by the irqfds that are registered for them: for an irqfd of such
/// a pin KVM wakes up a kernel thread, which takes longer, and comes later where the host is busy.
#[derive(Debug)]
pub struct Pins {
    vm: Arc<VmFd>,
    /// Others raise pins, too.
    shared: AtomicBool,
}

impl Pins {
    /// Of this machine.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            shared: AtomicBool::new(false),
        }
    }

    /// The machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// From now on no pin is raised here, but by their irqfds alone: somebody else (vhost) does so, and
    /// several devices may have the same pin.
    pub fn leave_to_irqfds(&self) {
        self.shared.store(true, Ordering::Release);
    }

    /// Gives an edge to a pin. False, and nothing is done: it is left to its irqfd.
    ///
    /// Devices of different threads may have the same pin, and any of them may lose its CPU halfway,
    /// with the pin up. Whoever found it up would give no edge, and the guest may have looked at the
    /// devices since it came up. So it is taken down first: if it is up again by then, somebody has
    /// given an edge meanwhile, after what we have to tell was there to be seen.
    ///
    /// # Errors
    /// What KVM_IRQ_LINE says.
    pub fn pulse(&self, pin: u32) -> Result<bool, kvm_ioctls::Error> {
        if self.shared.load(Ordering::Acquire) {
            return Ok(false);
        }
        for up in [false, true, false] {
            self.vm.set_irq_line(pin, up)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
    use kvm_ioctls::{Kvm, VcpuFd};

    const PIN: u32 = 17;
    const VECTOR: u8 = 0x51;
    /// Spurious-interrupt vector register (Intel SDM 3A, §11.9), and the bit that turns the local APIC
    /// on.
    const SPURIOUS: usize = 0xf0;
    const ENABLED: u32 = 1 << 8;
    /// Interrupt request register (§11.8.4): 32 vectors in every 16 bytes.
    const REQUESTS: usize = 0x200;

    /// A machine whose pin is delivered to its vCPU. None where there is no KVM.
    fn machine() -> Option<(Arc<VmFd>, VcpuFd)> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED 1 test: it needs /dev/kvm");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: KVM has filled in the I/O APIC's form, which it was asked for.
        let entry = unsafe { &mut chip.chip.ioapic.redirtbl[PIN as usize] };
        // Edge-triggered, unmasked, fixed, to the local APIC with number 0 (82093AA, §3.2.4).
        entry.bits = VECTOR.into();
        vm.set_irqchip(&chip).unwrap();
        Some((Arc::new(vm), vcpu))
    }

    /// Turns the local APIC on, and takes away what it was asked for.
    fn clear(vcpu: &VcpuFd) {
        let mut apic = vcpu.get_lapic().unwrap();
        let mut set = |offset: usize, value: u32| {
            for (register, byte) in apic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
                *register = byte as i8;
            }
        };
        set(SPURIOUS, ENABLED | 0xff);
        set(REQUESTS + usize::from(VECTOR / 32) * 16, 0);
        vcpu.set_lapic(&apic).unwrap();
    }

    fn asked(vcpu: &VcpuFd) -> bool {
        let apic = vcpu.get_lapic().unwrap();
        let byte =
            apic.regs[REQUESTS + usize::from(VECTOR / 32) * 16 + usize::from(VECTOR % 32 / 8)];
        byte as u8 & 1 << (VECTOR % 8) != 0
    }

    #[test]
    fn each_pulse_is_an_interrupt_even_after_another_s_that_is_not_over() {
        let Some((vm, vcpu)) = machine() else { return };
        let pins = Pins::new(Arc::clone(&vm));
        clear(&vcpu);
        assert!(!asked(&vcpu));
        for _ in 0..2 {
            assert!(pins.pulse(PIN).unwrap());
            assert!(asked(&vcpu));
            clear(&vcpu);
        }
        // Another thread has come as far as this, and the guest has had its interrupt.
        vm.set_irq_line(PIN, false).unwrap();
        vm.set_irq_line(PIN, true).unwrap();
        assert!(asked(&vcpu));
        clear(&vcpu);
        assert!(pins.pulse(PIN).unwrap());
        assert!(asked(&vcpu));
    }

    #[test]
    fn shared_pins_are_left_alone() {
        let Some((vm, vcpu)) = machine() else { return };
        let pins = Pins::new(vm);
        clear(&vcpu);
        pins.leave_to_irqfds();
        assert!(!pins.pulse(PIN).unwrap());
        assert!(!asked(&vcpu));
    }
}
