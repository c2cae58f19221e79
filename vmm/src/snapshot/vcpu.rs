//! One vCPU: what KVM keeps of it, read and written in the order that KVM's dependencies ask for.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::msrs;
use super::restore::{Refused, kvm_refused};
use super::save::{SaveError, kvm_failed};

/// How far the time-stamp counter's rate may be from the saved one, in millionths: hosts measure
/// theirs anew at each boot, and KVM itself takes such differences for none.
const TSC_TOLERANCE_PPM: u64 = 250;

/// All of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Rate of the time-stamp counter in kHz.
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// In the order in which they are to be set.
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not running and has no access to ports or device windows
    /// pending. `cpuid` is what KVM_SET_CPUID2 was given, which is not what KVM_GET_CPUID2 gives
    /// back; `msrs` is what [`msrs::to_save`] gives.
    ///
    /// # Errors
    /// When KVM refuses one of the calls.
    pub fn read(vm: &VmFd, vcpu: &VcpuFd, cpuid: &CpuId, msrs: &[u32]) -> Result<Self, SaveError> {
        check_xsave(vm).map_err(SaveError::Xsave)?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().map_err(kvm_failed("KVM_GET_TSC_KHZ"))?,
            // First of what changes: it has KVM take in pending INIT and SIPI signals.
            mp_state: vcpu
                .get_mp_state()
                .map_err(kvm_failed("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(kvm_failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kvm_failed("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(kvm_failed("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(kvm_failed("KVM_GET_XCRS"))?,
            debugregs: vcpu
                .get_debug_regs()
                .map_err(kvm_failed("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(kvm_failed("KVM_GET_LAPIC"))?,
            msrs: msrs::read(vcpu, msrs)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(kvm_failed("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts a fresh vCPU, whose CPUID has been set to `cpuid`, into this state.
    ///
    /// # Errors
    /// When the vCPU differs from the saved one in what can't be set, or KVM refuses a call.
    pub fn write(&self, vm: &VmFd, vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), Refused> {
        check_xsave(vm).map_err(Refused::Xsave)?;
        self.check_cpuid(cpuid)?;
        self.check_tsc_rate(vcpu)?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(kvm_refused("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs)
            .map_err(kvm_refused("KVM_SET_REGS"))?;
        // The local APIC's base address and mode, which its registers depend on, are among these.
        vcpu.set_sregs(&self.sregs)
            .map_err(kvm_refused("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads no more than the structure has, as check_xsave has made sure.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm_refused("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(kvm_refused("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(kvm_refused("KVM_SET_DEBUGREGS"))?;
        // Before the TSC deadline, which is only kept in the timer mode that is set here.
        vcpu.set_lapic(&self.lapic)
            .map_err(kvm_refused("KVM_SET_LAPIC"))?;
        msrs::write(vcpu, &self.msrs)?;
        self.follow_tsc(vcpu)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(kvm_refused("KVM_SET_VCPU_EVENTS"))
    }

    /// Tells the guest's watchdogs that it was stopped. To be called once clock and registers are
    /// set; does nothing if the guest has no kvm-clock.
    ///
    /// # Errors
    /// When KVM refuses the call although it has it.
    pub fn tell_stopped(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), Refused> {
        let uses_clock = self
            .msrs
            .iter()
            .any(|msr| msr.index == msrs::KVM_SYSTEM_TIME && msr.data & 1 != 0);
        if !uses_clock || !vm.check_extension(Cap::KvmclockCtrl) {
            return Ok(());
        }
        vcpu.kvmclock_ctrl()
            .map_err(kvm_refused("KVM_KVMCLOCK_CTRL"))
    }

    /// A KVM without hardware assistance may leave the time-stamp counter at the host's value and
    /// say nothing. A deadline that counts from the saved value is then moved along. A counter that
    /// stands behind the saved value, since the host was restarted, would stop the guest's time.
    fn follow_tsc(&self, vcpu: &VcpuFd) -> Result<(), Refused> {
        let saved = |index| {
            let found = self.msrs.iter().find(|msr| msr.index == index);
            found.map(|msr| msr.data)
        };
        let Some(before) = saved(msrs::TSC) else {
            return Ok(());
        };
        let now = msrs::read_one(vcpu, msrs::TSC)?;
        let Some(ahead) = now.checked_sub(before) else {
            return Err(Refused::TscBehind { saved: before, now });
        };
        let second = u64::from(self.tsc_khz) * 1000;
        match saved(msrs::TSC_DEADLINE) {
            Some(deadline) if ahead > second && deadline != 0 => {
                msrs::write_one(vcpu, msrs::TSC_DEADLINE, deadline.saturating_add(ahead))
            }
            _ => Ok(()),
        }
    }

    fn check_cpuid(&self, cpuid: &CpuId) -> Result<(), Refused> {
        let here = cpuid.as_slice();
        if self.cpuid.len() != here.len() {
            return Err(Refused::CpuidLength {
                saved: self.cpuid.len(),
                here: here.len(),
            });
        }
        // KVM may reorder nothing, so the entries correspond one by one.
        match self
            .cpuid
            .iter()
            .zip(here)
            .find(|(saved, here)| saved != here)
        {
            None => Ok(()),
            Some((saved, here)) => Err(Refused::Cpuid {
                leaf: here.function,
                index: here.index,
                saved: registers(saved),
                here: registers(here),
            }),
        }
    }

    fn check_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), Refused> {
        let here = vcpu.get_tsc_khz().map_err(kvm_refused("KVM_GET_TSC_KHZ"))?;
        let difference = u64::from(here.abs_diff(self.tsc_khz));
        if difference * 1_000_000 > u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            return Err(Refused::TscRate {
                saved: self.tsc_khz,
                here,
            });
        }
        Ok(())
    }
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// KVM_GET_XSAVE's structure has a fixed size, which state that a process must ask for (AMX) would
/// exceed. This one doesn't ask; the size that KVM needs is the error.
fn check_xsave(vm: &VmFd) -> Result<(), i32> {
    let needed = vm.check_extension_int(Cap::Xsave2);
    let room = i32::try_from(size_of::<kvm_xsave>()).unwrap_or(i32::MAX);
    if needed > room { Err(needed) } else { Ok(()) }
}

#[cfg(test)]
impl VcpuState {
    /// A state of mostly zeros, with something in each list.
    pub(super) fn synthetic() -> Self {
        Self {
            cpuid: vec![kvm_cpuid_entry2 {
                function: 1,
                eax: 0x50654,
                ..Default::default()
            }],
            tsc_khz: 2_600_000,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs {
                rip: 0xffff_ffff_8100_0000,
                ..Default::default()
            },
            sregs: kvm_sregs::default(),
            xsave: kvm_xsave::default(),
            xcrs: kvm_xcrs::default(),
            debugregs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: vec![kvm_msr_entry {
                index: msrs::TSC,
                data: 1 << 40,
                ..Default::default()
            }],
            events: kvm_vcpu_events::default(),
        }
    }
}
