//! Tells a host's KVM from another one without running a guest on it.
//!
//! How KVM runs guest kernel mode follows from the kernel's build, the processor and which of KVM's
//! modules is loaded. Where all of these are as they were when a template was saved, what the probe
//! found then still holds; where one is not, the probe runs again.

use kvm_ioctls::{Cap, Kvm};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};

use super::format::checksum;

/// Capabilities in which KVM's modules differ.
const CAPABILITIES: &[Cap] = &[
    Cap::NestedState,
    Cap::Xsave,
    Cap::TscControl,
    Cap::SyncMmu,
    Cap::ReadonlyMem,
    Cap::X86Smm,
    Cap::Xsave2,
];

/// What a host's KVM depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKvm {
    /// Release and build of the kernel.
    kernel: String,
    /// Of the processor's signature and of what KVM says of itself.
    fingerprint: u64,
}

impl HostKvm {
    /// Asks this host.
    ///
    /// # Errors
    /// When it can't be asked.
    pub fn of(kvm: &Kvm) -> std::io::Result<Self> {
        let system = uname()?;
        let kernel = format!(
            "{} {}",
            system.release().to_string_lossy(),
            system.version().to_string_lossy()
        );
        let mut words: Vec<u32> = Vec::new();
        // Family, model and stepping, and the bits of VMX and SVM.
        for leaf in [1, 0x8000_0001] {
            let found = std::arch::x86_64::__cpuid(leaf);
            words.extend([found.eax, found.ecx]);
        }
        for list in [kvm.get_msr_index_list()?, kvm.get_msr_feature_index_list()?] {
            words.push(list.as_slice().len() as u32);
            words.extend(list.as_slice());
        }
        let value = |capability: &Cap| kvm.check_extension_int(*capability) as u32;
        words.extend(CAPABILITIES.iter().map(value));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(Self {
            kernel,
            fingerprint: checksum(&bytes),
        })
    }
}

#[cfg(test)]
impl HostKvm {
    /// No host's.
    pub(super) fn synthetic() -> Self {
        Self {
            kernel: "6.18.0 #1 SMP".into(),
            fingerprint: 42,
        }
    }
}
