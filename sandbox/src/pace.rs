//! Time-outs that fit the host: what takes milliseconds where guest kernel code runs natively
//! takes seconds where KVM emulates it.

use bulkhead_proto::vmm::KvmKind;
use std::time::Duration;

/// How long the VMM may take until it reports that the vCPUs are about to run. It probes KVM
/// before, so nothing about the host's speed is known yet.
pub(crate) const VMM_SETUP: Duration = Duration::from_secs(30);

/// How much patience this host's guests need. Every limit has room for a host under load, and where
/// KVM emulates guest kernel mode for its some 0.4 M instructions a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pace {
    emulated: bool,
}

impl Pace {
    /// The pace of a host whose KVM is of kind `kvm`.
    pub fn of(kvm: KvmKind) -> Self {
        Self {
            emulated: kvm == KvmKind::Emulated,
        }
    }

    fn seconds(self, native: u64, emulated: u64) -> Duration {
        Duration::from_secs(if self.emulated { emulated } else { native })
    }

    /// From the first guest instruction to the agent's knock.
    pub fn boot(self) -> Duration {
        self.seconds(30, 200)
    }

    /// One connection to the guest.
    pub fn dial(self) -> Duration {
        self.seconds(5, 80)
    }

    /// Setting up a container or an exec.
    pub fn create(self) -> Duration {
        self.seconds(10, 200)
    }

    /// Any other call that ends by itself.
    pub fn call(self) -> Duration {
        self.seconds(5, 80)
    }

    /// Plugging so many MiB of memory, each 128 MiB of which cost the guest some 2 million
    /// instructions.
    pub fn plug(self, mib: u32) -> Duration {
        self.seconds(10, 80) + self.seconds(1, 20) * mib.div_ceil(128)
    }

    /// Guest shutdown, from the call to the VMM's end. Short even on a slow host: the daemon waits.
    pub fn shutdown(self) -> Duration {
        self.seconds(3, 15)
    }

    /// How long an ended process's output may stand still before its end is told all the same:
    /// some other process holds it open, or its reader doesn't read.
    pub fn output_stall(self) -> Duration {
        self.seconds(1, 4)
    }

    /// How long the streams of an ended process may stand still before they are given up.
    pub fn drain_stall(self) -> Duration {
        self.seconds(2, 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulated_host_gets_more_time_everywhere() {
        let (slow, fast) = (Pace::of(KvmKind::Emulated), Pace::of(KvmKind::Vmx));
        for limit in [
            Pace::boot,
            Pace::dial,
            Pace::create,
            Pace::call,
            |pace: Pace| pace.plug(256),
            Pace::shutdown,
            Pace::output_stall,
            Pace::drain_stall,
        ] {
            assert!(limit(slow) > limit(fast));
        }
    }
}
