//! The five capability sets of a process (capabilities(7)).
//!
//! Set directly instead of through a crate that asks for every bit before it changes it: the guest
//! pays for each system call.

use crate::error::{Context, Failure};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// All five sets; the default is none at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilityPlan {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

impl CapabilityPlan {
    /// Converts `process.capabilities`. A process without them gets none.
    pub fn new(capabilities: Option<&LinuxCapabilities>) -> Result<Self, Failure> {
        let set = |choose: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
            capabilities
                .and_then(|capabilities| choose(capabilities).as_ref())
                .into_iter()
                .flatten()
                .fold(CapabilitySet::empty(), |set, capability| {
                    set | bit(*capability)
                })
        };
        let plan = Self {
            bounding: set(LinuxCapabilities::bounding),
            effective: set(LinuxCapabilities::effective),
            permitted: set(LinuxCapabilities::permitted),
            inheritable: set(LinuxCapabilities::inheritable),
            ambient: set(LinuxCapabilities::ambient),
        };
        if !plan.permitted.contains(plan.effective) {
            return Err(Failure::invalid(
                "process.capabilities.effective",
                "has capabilities that process.capabilities.permitted doesn't have",
            ));
        }
        Ok(plan)
    }

    /// Drops everything else from the bounding set; needs CAP_SETPCAP, so it comes before the
    /// change of user.
    pub fn limit_bounding(&self) -> Result<(), Failure> {
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if self.bounding.contains(capability) {
                continue;
            }
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // Past the last capability that this kernel knows.
                Err(Errno::INVAL) => break,
                Err(error) => {
                    return Err(Failure::internal(
                        format!("drop capability {number} from the bounding set"),
                        error,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Sets the other four, after the change of user.
    pub fn apply(&self) -> Result<(), Failure> {
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: self.effective,
                permitted: self.permitted,
                inheritable: self.inheritable,
            },
        )
        .context(|| "process.capabilities: set the effective, permitted and inheritable sets")?;
        // The kernel keeps only those that are both permitted and inheritable; like other
        // runtimes, ask for no more and leave the rest out.
        let ambient = self.ambient & self.permitted & self.inheritable;
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if ambient.contains(capability) {
                rustix::thread::configure_capability_in_ambient_set(capability, true)
                    .context(|| "process.capabilities: set the ambient set")?;
            }
        }
        Ok(())
    }
}

fn bit(capability: Capability) -> CapabilitySet {
    use CapabilitySet as Set;
    match capability {
        Capability::AuditControl => Set::AUDIT_CONTROL,
        Capability::AuditRead => Set::AUDIT_READ,
        Capability::AuditWrite => Set::AUDIT_WRITE,
        Capability::BlockSuspend => Set::BLOCK_SUSPEND,
        Capability::Bpf => Set::BPF,
        Capability::CheckpointRestore => Set::CHECKPOINT_RESTORE,
        Capability::Chown => Set::CHOWN,
        Capability::DacOverride => Set::DAC_OVERRIDE,
        Capability::DacReadSearch => Set::DAC_READ_SEARCH,
        Capability::Fowner => Set::FOWNER,
        Capability::Fsetid => Set::FSETID,
        Capability::IpcLock => Set::IPC_LOCK,
        Capability::IpcOwner => Set::IPC_OWNER,
        Capability::Kill => Set::KILL,
        Capability::Lease => Set::LEASE,
        Capability::LinuxImmutable => Set::LINUX_IMMUTABLE,
        Capability::MacAdmin => Set::MAC_ADMIN,
        Capability::MacOverride => Set::MAC_OVERRIDE,
        Capability::Mknod => Set::MKNOD,
        Capability::NetAdmin => Set::NET_ADMIN,
        Capability::NetBindService => Set::NET_BIND_SERVICE,
        Capability::NetBroadcast => Set::NET_BROADCAST,
        Capability::NetRaw => Set::NET_RAW,
        Capability::Perfmon => Set::PERFMON,
        Capability::Setfcap => Set::SETFCAP,
        Capability::Setgid => Set::SETGID,
        Capability::Setpcap => Set::SETPCAP,
        Capability::Setuid => Set::SETUID,
        Capability::SysAdmin => Set::SYS_ADMIN,
        Capability::SysBoot => Set::SYS_BOOT,
        Capability::SysChroot => Set::SYS_CHROOT,
        Capability::SysModule => Set::SYS_MODULE,
        Capability::SysNice => Set::SYS_NICE,
        Capability::SysPacct => Set::SYS_PACCT,
        Capability::SysPtrace => Set::SYS_PTRACE,
        Capability::SysRawio => Set::SYS_RAWIO,
        Capability::SysResource => Set::SYS_RESOURCE,
        Capability::SysTime => Set::SYS_TIME,
        Capability::SysTtyConfig => Set::SYS_TTY_CONFIG,
        Capability::Syslog => Set::SYSLOG,
        Capability::WakeAlarm => Set::WAKE_ALARM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<CapabilityPlan, Failure> {
        let capabilities: LinuxCapabilities = serde_json::from_str(json).expect("capabilities");
        CapabilityPlan::new(Some(&capabilities))
    }

    #[test]
    fn none_means_none() {
        let plan = CapabilityPlan::new(None).expect("a plan");
        assert!(plan.bounding.is_empty() && plan.permitted.is_empty());
    }

    #[test]
    fn maps_numbers() {
        let json = r#"{"bounding":["CAP_CHOWN","CAP_CHECKPOINT_RESTORE"],"permitted":["CAP_KILL"],"effective":["CAP_KILL"]}"#;
        let plan = plan(json).expect("a plan");
        assert_eq!(plan.bounding.bits(), 1 | 1 << 40);
        assert_eq!(plan.effective.bits(), 1 << 5);
    }

    #[test]
    fn refuses_effective_beyond_permitted() {
        let failure = plan(r#"{"effective":["CAP_KILL"]}"#).expect_err("refused");
        assert!(
            failure
                .message
                .starts_with("process.capabilities.effective")
        );
    }
}
