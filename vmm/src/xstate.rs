//! Extended registers (AVX and the like) where guest kernel mode is emulated. Programs run on the CPU
//! and use them, but KVM's instruction emulator has no XSAVE and XRSTOR, with which a kernel saves
//! them. So the VMM does it for the guest's kernel, at writes of 32 bits to four ports
//! (`guest-kernel/patches`, x86: extended registers saved by the VMM). Every byte here is the guest's
//! word, and harms nobody but its programs.

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// First of the ports. No PC has had anything there.
pub const FIRST_PORT: u16 = 0x5c0;
const FEATURES: u16 = FIRST_PORT;
const SAVE: u16 = FIRST_PORT + 4;
const LOAD: u16 = FIRST_PORT + 8;
const SAVE_THEN_LOAD: u16 = FIRST_PORT + 12;

/// Areas are named by their address in these units, so that 32 bits suffice for 256 GiB of addresses.
const ADDRESS_UNIT: u64 = 64;
/// One past the highest address that can be named.
pub const ADDRESS_LIMIT: u64 = ADDRESS_UNIT << 32;

/// XSAVE's leaf of CPUID.
const LEAF: u32 = 0xd;
/// Of a component's subleaf, ECX: it belongs to the kernel alone.
const SUPERVISOR: u32 = 1;
/// State components (Intel SDM 1, §13.1): x87 and SSE, which are always there.
const X87_SSE: u64 = 0b11;
/// AVX: the upper halves of the 256-bit registers.
const AVX: u64 = 1 << 2;
/// AVX-512: mask registers, upper halves of the first 16 registers, the other 16 registers.
const AVX_512: u64 = 0b111 << 5;

/// Legacy region and header (Intel SDM 1, §13.4): what every area has, in bytes.
const LEAST_AREA: usize = 576;
/// 32-bit words of an area (Intel SDM 1, §13.4): MXCSR, its mask, and the header's parts.
const MXCSR: usize = 6;
const MXCSR_MASK: usize = 7;
/// First of those that XSAVE and XRSTOR leave to software (§13.4.1): here the guest's kernel names
/// the area to save to before this one is loaded.
const SAVE_TO: usize = 116;
const XSTATE_BV: usize = 128;
const HEADER_REST: std::ops::Range<usize> = 130..144;
/// MXCSR's mask where an area names none (Intel SDM 1, §11.6.6).
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;

type Area = [u32; size_of::<kvm_xsave>() / size_of::<u32>()];

/// What can't be done for the guest's kernel. It has lost its programs' registers, so it must end.
#[derive(Debug, Error)]
pub enum XstateError {
    /// The area is not in guest memory.
    #[error(
        "an area for registers at {address:#x}, {size} bytes, is not in guest memory: {source}"
    )]
    Memory {
        /// Guest-physical.
        address: u64,
        /// In bytes.
        size: usize,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// KVM refused a call.
    #[error("extended registers: {call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
}

fn kvm_failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> XstateError {
    move |source| XstateError::Kvm { call, source }
}

fn not_in_memory(
    address: u64,
    size: usize,
) -> impl FnOnce(vm_memory::GuestMemoryError) -> XstateError {
    move |source| XstateError::Memory {
        address,
        size,
        source,
    }
}

/// Which components the host's areas have, and where they end, in XSAVE's standard format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XstateLayout {
    /// Bit of each component in XCR0, and its end in bytes.
    components: Vec<(u64, usize)>,
}

impl XstateLayout {
    /// Of this host, from the CPUID that it supports for guests. None when programs have nothing to
    /// save beyond what FXSAVE does, or when KVM's areas have no fixed size (then it would read more
    /// than there is).
    pub fn of_host(kvm: &Kvm, supported: &CpuId) -> Option<Self> {
        let needed = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(usize::MAX);
        if needed > size_of::<kvm_xsave>() {
            return None;
        }
        Self::of_cpuid(supported)
    }

    fn of_cpuid(supported: &CpuId) -> Option<Self> {
        let leaf = |index| {
            let mut entries = supported.as_slice().iter();
            entries.find(|entry| entry.function == LEAF && entry.index == index)
        };
        let offered = u64::from(leaf(0)?.eax);
        let mut wanted = AVX;
        if offered & AVX_512 == AVX_512 {
            wanted |= AVX_512;
        }
        let mut components = Vec::new();
        for index in (0..u32::BITS).filter(|index| wanted & (1 << index) != 0) {
            let entry = leaf(index)?;
            let end = usize::try_from(entry.ebx.checked_add(entry.eax)?).ok()?;
            if offered & (1 << index) == 0
                || entry.ecx & SUPERVISOR != 0
                || !(LEAST_AREA..=size_of::<kvm_xsave>()).contains(&end)
            {
                return None;
            }
            components.push((1 << index, end));
        }
        Some(Self { components })
    }

    /// Bytes of an area with the components of `features`.
    fn size(&self, features: u64) -> usize {
        let ends = self.components.iter();
        ends.filter(|(bit, _)| features & bit != 0)
            .map(|(_, end)| *end)
            .fold(LEAST_AREA, usize::max)
    }

    /// Those of `features` that there are.
    fn known(&self, features: u64) -> u64 {
        let all = self.components.iter().map(|(bit, _)| bit);
        features & all.fold(X87_SSE, |all, bit| all | bit)
    }
}

/// What the guest's kernel asks for by a write to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XstateRequest {
    /// XSETBV: these components of XCR0 are in use.
    Features(u64),
    /// XSAVE to this guest-physical address.
    Save(u64),
    /// XRSTOR from it.
    Load(u64),
    /// XSAVE to the address that the area at this one names, then XRSTOR from this one: a switch
    /// between two programs in one exit.
    SaveThenLoad(u64),
}

impl XstateRequest {
    /// The request that a write of `data` to `port` is, if it is one.
    pub fn of(port: u16, data: &[u8]) -> Option<Self> {
        let value = u32::from_le_bytes(data.try_into().ok()?);
        match port {
            FEATURES => Some(Self::Features(value.into())),
            SAVE => Some(Self::Save(address_of(value))),
            LOAD => Some(Self::Load(address_of(value))),
            SAVE_THEN_LOAD => Some(Self::SaveThenLoad(address_of(value))),
            _ => None,
        }
    }
}

/// Below [`ADDRESS_LIMIT`], whatever the guest says.
fn address_of(units: u32) -> u64 {
    u64::from(units) * ADDRESS_UNIT
}

/// A vCPU's extended registers.
pub struct Xstate {
    layout: Arc<XstateLayout>,
    /// Once it has been asked for. KVM has it, and with it each saved machine.
    valid: Option<Valid>,
}

/// What an area may hold.
#[derive(Debug, Clone, Copy)]
struct Valid {
    /// XCR0.
    features: u64,
    /// Bits of MXCSR that the processor has.
    mxcsr: u32,
}

impl Xstate {
    /// Of a vCPU whose areas have this layout.
    pub fn new(layout: Arc<XstateLayout>) -> Self {
        Self {
            layout,
            valid: None,
        }
    }

    /// Does what the guest's kernel asks for, on the vCPU's own thread between two KVM_RUN.
    ///
    /// # Errors
    /// [`XstateError`]; the registers are as they were.
    pub fn serve(
        &mut self,
        vcpu: &VcpuFd,
        memory: &GuestMemoryMmap,
        request: XstateRequest,
    ) -> Result<(), XstateError> {
        let valid = self.valid(vcpu)?;
        let size = self.layout.size(valid.features);
        let area = match request {
            XstateRequest::Features(features) => return self.set_features(vcpu, features),
            XstateRequest::Save(address) => {
                return write_area(memory, address, &registers(vcpu)?[..size]);
            }
            XstateRequest::Load(address) => read_area(memory, address, size)?,
            XstateRequest::SaveThenLoad(address) => {
                exchange(memory, address, &registers(vcpu)?[..size])?
            }
        };
        set_registers(vcpu, made_valid(area, valid))
    }

    fn set_features(&mut self, vcpu: &VcpuFd, features: u64) -> Result<(), XstateError> {
        let features = self.layout.known(features);
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0] = kvm_xcr {
            value: features,
            ..Default::default()
        };
        vcpu.set_xcrs(&xcrs).map_err(kvm_failed("KVM_SET_XCRS"))?;
        self.valid = None;
        Ok(())
    }

    fn valid(&mut self, vcpu: &VcpuFd) -> Result<Valid, XstateError> {
        if let Some(valid) = self.valid {
            return Ok(valid);
        }
        let xcrs = vcpu.get_xcrs().map_err(kvm_failed("KVM_GET_XCRS"))?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
        let xcr0 = xcrs.xcrs.iter().take(count).find(|xcr| xcr.xcr == 0);
        let area = vcpu.get_xsave().map_err(kvm_failed("KVM_GET_XSAVE"))?;
        let valid = Valid {
            features: self.layout.known(xcr0.map_or(X87_SSE, |xcr| xcr.value)),
            mxcsr: match area.region[MXCSR_MASK] {
                0 => DEFAULT_MXCSR_MASK,
                mask => mask,
            },
        };
        self.valid = Some(valid);
        Ok(valid)
    }
}

fn registers(vcpu: &VcpuFd) -> Result<[u8; size_of::<Area>()], XstateError> {
    let area = vcpu.get_xsave().map_err(kvm_failed("KVM_GET_XSAVE"))?;
    Ok(to_bytes(&area.region))
}

fn set_registers(vcpu: &VcpuFd, region: Area) -> Result<(), XstateError> {
    let area = kvm_xsave {
        region,
        ..Default::default()
    };
    // SAFETY: KVM reads no more than the structure has: `XstateLayout::of_host` made sure.
    unsafe { vcpu.set_xsave(&area) }.map_err(kvm_failed("KVM_SET_XSAVE"))
}

fn read_area(memory: &GuestMemoryMmap, address: u64, size: usize) -> Result<Area, XstateError> {
    let mut bytes = [0; size_of::<Area>()];
    memory
        .read_slice(&mut bytes[..size], GuestAddress(address))
        .map_err(not_in_memory(address, size))?;
    Ok(from_bytes(&bytes))
}

fn write_area(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), XstateError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(not_in_memory(address, bytes.len()))
}

/// The area at `address`, and `saved` in memory where that area says. It is read once and as a whole
/// before anything is written, so where the two overlap, what was there before is what is loaded.
/// The address stays behind: it is none of a program's registers.
fn exchange(memory: &GuestMemoryMmap, address: u64, saved: &[u8]) -> Result<Area, XstateError> {
    let mut area = read_area(memory, address, saved.len())?;
    let save_to = address_of(std::mem::take(&mut area[SAVE_TO]));
    write_area(memory, save_to, saved)?;
    Ok(area)
}

/// An area as KVM takes it, without what XRSTOR refuses (Intel SDM 1, §13.8.1): of components in use
/// only, in the standard format, no reserved bit set.
fn made_valid(mut area: Area, valid: Valid) -> Area {
    area[MXCSR] &= valid.mxcsr;
    // The lower half: no component that is known here is in the upper one.
    area[XSTATE_BV] &= valid.features as u32;
    area[XSTATE_BV + 1] = 0;
    area[HEADER_REST].fill(0);
    area
}

fn to_bytes(area: &Area) -> [u8; size_of::<Area>()] {
    let mut bytes = [0; size_of::<Area>()];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(area) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn from_bytes(bytes: &[u8; size_of::<Area>()]) -> Area {
    let mut area = [0; size_of::<Area>() / 4];
    for (word, bytes) in area.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    area
}

#[cfg(test)]
mod tests;
