//! Finds out how this host's KVM treats guest kernel mode, by running a guest of a few
//! instructions: does `syscall` reach ring 0, and how many instructions a second does ring 0 make?
//!
//! A software KVM module without VMX or SVM runs ring 3 natively and emulates ring 0; there
//! `syscall` sets RIP but stays in ring 3. Such a host needs other kernel parameters, so the
//! question is asked of the machine instead of a list of host names.

use std::time::{Duration, Instant};

use bulkhead_proto::vmm::KvmKind;
use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::Serialize;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory;

/// Where the probe's guest keeps what.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const USER_CODE: u64 = 0x4000;
const SYSCALL_ENTRY: u64 = 0x5000;
const KERNEL_LOOP: u64 = 0x6000;
const STACK_TOP: u64 = 0x8000;
const MEMORY_BYTES: u64 = 0x1_0000;

/// Port at which the guest reports; any will do, nothing is behind it.
const REPORT_PORT: u8 = 0x10;
/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// `out REPORT_PORT, al; hlt`.
const REPORT: [u8; 3] = [0xe6, REPORT_PORT, 0xf4];
/// Rounds of `dec ecx; jnz` that are timed where `syscall` fails: 1.3 ms at 0.4 M emulated
/// instructions a second.
const FEW_ROUNDS: u32 = 250;
/// Rounds that are timed where `syscall` works, so that the loop and not the exit from it is
/// measured: under a hypervisor that is a guest itself, an exit can take as long as a million
/// instructions.
const MANY_ROUNDS: u32 = 100_000;
/// Instructions in a round.
const ROUND: u32 = 2;
/// Below this many ring 0 instructions a second, they are emulated. Emulation reaches some
/// hundred thousand, native execution thousands of millions.
const EMULATED_BELOW: u64 = 5_000_000;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;
/// SYSRET's and SYSCALL's selector bases; the selectors themselves don't matter here.
const STAR: u64 = (0x1b << 48) | (0x8 << 32);

/// What the probe found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// How guest kernel mode runs.
    pub kvm: KvmKind,
    /// Speed of ring 0, a lower bound where it runs natively.
    pub ring0_instructions_per_second: u64,
    /// `syscall` in ring 3 arrives in ring 0.
    pub syscall_reaches_ring0: bool,
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
}

/// Why the probe could not run.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// A call to KVM failed.
    #[error("probing KVM: {call}: {source}; is another hypervisor using this host's KVM?")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The probe's 64 KiB of memory could not be had.
    #[error("probing KVM: {0}")]
    Memory(#[from] memory::MemoryError),
    /// The probe's code does not fit its memory: a mistake of ours.
    #[error("probing KVM: writing the probe's guest: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// Runs the probe.
///
/// # Errors
/// When KVM can't run a guest at all.
pub fn run(kvm: &Kvm) -> Result<Findings, ProbeError> {
    let memory = memory::allocate(MEMORY_BYTES)?;
    write_guest(&memory)?;
    let vm = kvm
        .create_vm()
        .map_err(|source| failed("KVM_CREATE_VM", source))?;
    memory::register(&vm, &memory)
        .map_err(|source| failed("KVM_SET_USER_MEMORY_REGION", source))?;

    let syscall_reaches_ring0 = syscall_reaches_ring0(&vm)?;
    let speed = ring0_speed(&vm, syscall_reaches_ring0)?;
    let native = syscall_reaches_ring0 && speed >= EMULATED_BELOW;
    Ok(Findings {
        kvm: if native {
            hardware_kind()
        } else {
            KvmKind::Emulated
        },
        ring0_instructions_per_second: speed,
        syscall_reaches_ring0,
        api_version: kvm.get_api_version(),
    })
}

fn failed(call: &'static str, source: kvm_ioctls::Error) -> ProbeError {
    ProbeError::Kvm { call, source }
}

fn write_guest(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    // Present, writable, user; the last level with 2 MiB pages. The first 2 MiB map onto
    // themselves.
    const TABLE: u64 = 0x7;
    const LARGE_PAGE: u64 = 0x87;
    memory.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | TABLE, GuestAddress(PDPT))?;
    memory.write_obj(LARGE_PAGE, GuestAddress(PD))?;

    memory.write_slice(&SYSCALL, GuestAddress(USER_CODE))?;
    memory.write_slice(&REPORT, GuestAddress(SYSCALL_ENTRY))?;

    let mut code = vec![0xff, 0xc9, 0x75, 0xfc]; // dec ecx; jnz to the dec
    code.extend_from_slice(&REPORT);
    memory.write_slice(&code, GuestAddress(KERNEL_LOOP))
}

/// `syscall` in ring 3: whatever does not end in our entry point with ring 0's code segment has
/// not reached ring 0.
fn syscall_reaches_ring0(vm: &VmFd) -> Result<bool, ProbeError> {
    let mut vcpu = vm
        .create_vcpu(0)
        .map_err(|source| failed("KVM_CREATE_VCPU", source))?;
    enter(&vcpu, USER_CODE, 3, 0).map_err(|source| failed("setting registers", source))?;
    let reported =
        matches!(vcpu.run(), Ok(VcpuExit::IoOut(port, _)) if port == u16::from(REPORT_PORT));
    let ring = vcpu
        .get_sregs()
        .map_err(|source| failed("KVM_GET_SREGS", source))?
        .cs
        .selector
        & 3;
    Ok(reported && ring == 0)
}

/// Ring 0 instructions a second. A host where `syscall` fails emulates, and the long loop would take
/// half a second there.
fn ring0_speed(vm: &VmFd, likely_native: bool) -> Result<u64, ProbeError> {
    let mut vcpu = vm
        .create_vcpu(1)
        .map_err(|source| failed("KVM_CREATE_VCPU", source))?;
    let rounds = if likely_native {
        MANY_ROUNDS
    } else {
        FEW_ROUNDS
    };
    let Some(elapsed) = time_loop(&mut vcpu, rounds)? else {
        // Ring 0 does not even run a loop as it should: nothing here is native.
        return Ok(0);
    };
    let instructions = u128::from(rounds) * u128::from(ROUND);
    Ok((instructions * 1_000_000_000 / elapsed.as_nanos().max(1)) as u64)
}

/// How long `rounds` rounds take, or none if the guest doesn't report its end.
fn time_loop(vcpu: &mut VcpuFd, rounds: u32) -> Result<Option<Duration>, ProbeError> {
    enter(vcpu, KERNEL_LOOP, 0, rounds).map_err(|source| failed("setting registers", source))?;
    let start = Instant::now();
    let exit = vcpu.run().map_err(|source| failed("KVM_RUN", source))?;
    let elapsed = start.elapsed();
    Ok(matches!(exit, VcpuExit::IoOut(..)).then_some(elapsed))
}

/// 64-bit mode at `rip` in `ring` with `rcx`, `syscall` enabled and pointing at [`SYSCALL_ENTRY`].
fn enter(vcpu: &VcpuFd, rip: u64, ring: u8, rcx: u32) -> Result<(), kvm_ioctls::Error> {
    const IO_PRIVILEGE_3: u64 = 3 << 12;
    const RESERVED: u64 = 1 << 1;
    let mut sregs = vcpu.get_sregs()?;
    let segment = |selector: u16, type_: u8, long: u8| kvm_segment {
        limit: 0xffff_ffff,
        selector: selector | u16::from(ring),
        type_,
        present: 1,
        dpl: ring,
        s: 1,
        l: long,
        db: 1 - long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x30, 0xb, 1);
    let data = segment(0x28, 0x3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = 0x8000_0011; // PG, ET, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x501; // LMA, LME, SCE
    vcpu.set_sregs(&sregs)?;

    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    if let Ok(msrs) = Msrs::from_entries(&[
        msr(MSR_STAR, STAR),
        msr(MSR_LSTAR, SYSCALL_ENTRY),
        msr(MSR_FMASK, 0),
    ]) {
        vcpu.set_msrs(&msrs)?;
    }
    vcpu.set_regs(&kvm_regs {
        rip,
        rsp: STACK_TOP,
        rcx: rcx.into(),
        rflags: RESERVED | IO_PRIVILEGE_3,
        ..Default::default()
    })
}

/// The hardware's name for it, from the host's CPUID.
fn hardware_kind() -> KvmKind {
    const VMX: u32 = 1 << 5; // leaf 1, ECX
    const SVM: u32 = 1 << 2; // leaf 0x8000_0001, ECX
    if std::arch::x86_64::__cpuid(1).ecx & VMX != 0 {
        KvmKind::Vmx
    } else if std::arch::x86_64::__cpuid(0x8000_0001).ecx & SVM != 0 {
        KvmKind::Svm
    } else {
        KvmKind::Native
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemory;

    #[test]
    fn the_guest_fits_its_memory() {
        let memory = memory::allocate(MEMORY_BYTES).unwrap();
        write_guest(&memory).unwrap();
        assert!(memory.last_addr().0 > STACK_TOP);
        let target: [u8; 2] = memory.read_obj(GuestAddress(KERNEL_LOOP)).unwrap();
        assert_eq!(target, [0xff, 0xc9], "dec ecx");
    }
}
