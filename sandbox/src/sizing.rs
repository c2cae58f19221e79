//! How big a VM a pod needs. Pure arithmetic on limits; the host's memory comes in as a number.
//!
//! Every size is a template of its own, so what follows from a pod's limit is rounded up to one of
//! a few classes. What a guest doesn't touch costs the host nothing but the guest kernel's page
//! descriptors, 1.6% of the difference; the pod's cgroup in the guest keeps its exact limit.

use crate::config::{Config, MAX_MEMORY_MIB, MAX_VCPUS};
use crate::pod::PodLimits;
use bulkhead_proto::vmm::HOTPLUG_BLOCK_MIB;

/// Memory in MiB that the guest's kernel and the agent take beside the containers.
pub const OVERHEAD_MIB: u64 = 64;

const MIB: u64 = 1024 * 1024;

/// The classes, as the sizes up to which a step holds: 64, 128, … 512, 768, … 4096, 5120, … MiB.
const CLASSES: [(u64, u64); 3] = [(512, 64), (4096, 256), (u64::MAX, 1024)];

/// The machine to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSize {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, even.
    pub memory_mib: u32,
    /// How much can be plugged beyond that while the guest runs, in MiB, even; 0 for none.
    pub hotplug_mib: u32,
}

/// A machine that this host can't hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// More memory than the host has.
    #[error(
        "the virtual machine would need {wanted_mib} MiB of memory, and this host has \
         {host_mib} MiB: lower the memory limit, or memory_mib in the configuration"
    )]
    Memory {
        /// What was asked for, in MiB.
        wanted_mib: u64,
        /// What there is, in MiB.
        host_mib: u64,
    },
    /// /proc/meminfo can't be read.
    #[error("cannot tell how much memory this host has: {0}")]
    HostMemory(String),
}

/// Sizes the machine: the configuration's size at least, and room for the pod's limits. A limit
/// of 0 or below means no limit, as in cgroups.
///
/// # Errors
/// When the memory exceeds the host's.
pub fn machine_size(
    config: &Config,
    limits: PodLimits,
    host_memory_bytes: u64,
) -> Result<MachineSize, SizeError> {
    let host_mib = host_memory_bytes / MIB;
    let largest_mib = host_mib.min(u64::from(MAX_MEMORY_MIB));
    let mut memory_mib = u64::from(config.memory_mib);
    if let Some(limit) = limits
        .memory
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|l| *l > 0)
    {
        let wanted = limit.div_ceil(MIB).saturating_add(OVERHEAD_MIB);
        // The configuration's own size is a class already.
        if wanted > memory_mib {
            memory_mib = in_class(wanted, largest_mib);
        }
    }
    // Whole 2 MiB pages, so that huge pages fit.
    memory_mib = memory_mib.div_ceil(2).saturating_mul(2);
    if memory_mib > largest_mib {
        return Err(SizeError::Memory {
            wanted_mib: memory_mib,
            host_mib,
        });
    }
    let quota = limits
        .cpu_quota
        .and_then(|quota| u64::try_from(quota).ok())
        .unwrap_or(0);
    // The kernel's default period (100 ms) when only a quota is given.
    let period = limits
        .cpu_period
        .filter(|period| *period > 0)
        .unwrap_or(100_000);
    let wanted = u8::try_from(quota.div_ceil(period))
        .unwrap_or(MAX_VCPUS)
        .min(MAX_VCPUS);
    let max_mib = u64::from(config.memory_max_mib).min(largest_mib);
    let hotplug_mib = max_mib.saturating_sub(memory_mib);
    Ok(MachineSize {
        vcpus: wanted.max(config.vcpus),
        memory_mib: u32::try_from(memory_mib).unwrap_or(MAX_MEMORY_MIB),
        hotplug_mib: u32::try_from(hotplug_mib).unwrap_or(0) / HOTPLUG_BLOCK_MIB
            * HOTPLUG_BLOCK_MIB,
    })
}

impl MachineSize {
    /// How much memory must be plugged, in MiB, for containers whose limits are `limits` bytes
    /// together, up to a number that no machine has: what they exceed the boot memory by, together
    /// with the guest's own, and room for the page descriptors of what is plugged (1.6%).
    pub fn hotplug_for(&self, limits: u64) -> u64 {
        let wanted = limits.div_ceil(MIB).saturating_add(OVERHEAD_MIB);
        match wanted.saturating_sub(u64::from(self.memory_mib)) {
            0 => 0,
            more => more
                .saturating_add(more / 64)
                .div_ceil(HOTPLUG_BLOCK_MIB.into())
                .saturating_mul(HOTPLUG_BLOCK_MIB.into()),
        }
    }
}

/// The smallest class that holds `wanted_mib`, or that itself where the class wouldn't fit.
fn in_class(wanted_mib: u64, largest_mib: u64) -> u64 {
    let step = CLASSES
        .iter()
        .find(|(up_to, _)| wanted_mib <= *up_to)
        .map_or(1, |(_, step)| *step);
    let rounded = wanted_mib.div_ceil(step).saturating_mul(step);
    if rounded <= largest_mib {
        rounded
    } else {
        wanted_mib
    }
}

/// The host's memory in bytes, from /proc/meminfo.
///
/// # Errors
/// When it can't be read.
pub fn host_memory() -> Result<u64, SizeError> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| SizeError::HostMemory(format!("/proc/meminfo: {error}")))?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map(|kib| kib.saturating_mul(1024))
        .ok_or_else(|| SizeError::HostMemory("/proc/meminfo has no MemTotal line".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOST: u64 = 16 << 30;

    fn size(memory: Option<i64>, quota: Option<i64>, period: Option<u64>) -> MachineSize {
        let limits = PodLimits {
            cpu_quota: quota,
            cpu_period: period,
            memory,
        };
        machine_size(&Config::default(), limits, HOST).unwrap()
    }

    #[test]
    fn no_limit_is_the_configured_size() {
        assert_eq!(
            size(None, None, None),
            MachineSize {
                vcpus: 1,
                memory_mib: 128,
                hotplug_mib: 4096 - 128
            }
        );
        assert_eq!(
            size(Some(-1), Some(-1), Some(100_000)),
            MachineSize {
                vcpus: 1,
                memory_mib: 128,
                hotplug_mib: 4096 - 128
            }
        );
        assert_eq!(
            size(Some(0), Some(0), Some(0)),
            MachineSize {
                vcpus: 1,
                memory_mib: 128,
                hotplug_mib: 4096 - 128
            }
        );
    }

    #[test]
    fn limits_get_room_on_top() {
        assert_eq!(size(Some(128 << 20), None, None).memory_mib, 192);
        assert_eq!(size(Some(65 << 20), None, None).memory_mib, 192);
        assert_eq!(size(Some(16 << 20), None, None).memory_mib, 128);
        assert_eq!(size(None, Some(150_000), Some(100_000)).vcpus, 2);
        assert_eq!(size(None, Some(200_000), None).vcpus, 2);
        assert_eq!(size(None, Some(i64::MAX), Some(1)).vcpus, 32);
    }

    #[test]
    fn pods_of_about_the_same_size_share_a_class() {
        for (limit_mib, wanted) in [
            (100, 192),
            (128, 192),
            (129, 256),
            (448, 512),
            (449, 768),
            (512, 768),
            (4032, 4096),
            (4033, 5120),
        ] {
            let size = size(Some(limit_mib << 20), None, None);
            assert_eq!(size.memory_mib, wanted, "{limit_mib}");
        }
        let classes: std::collections::BTreeSet<u32> = (1..8192)
            .map(|limit| size(Some(limit << 20), None, None).memory_mib)
            .collect();
        assert!(classes.len() < 28, "{classes:?}");
    }

    #[test]
    fn a_class_that_the_host_cannot_hold_is_not_taken() {
        let limits = PodLimits {
            memory: Some(900 << 20),
            ..PodLimits::default()
        };
        let on = |host: u64| machine_size(&Config::default(), limits, host << 20).unwrap();
        assert_eq!(on(1024).memory_mib, 1024);
        assert_eq!(on(1000).memory_mib, 964);
    }

    #[test]
    fn a_machine_may_grow_up_to_the_configured_size_or_the_hosts() {
        assert_eq!(size(Some(4000 << 20), None, None).hotplug_mib, 0);
        let grown = |max: u32, host: u64| {
            let config = Config {
                memory_max_mib: max,
                ..Config::default()
            };
            machine_size(&config, PodLimits::default(), host << 20)
                .unwrap()
                .hotplug_mib
        };
        assert_eq!(grown(0, 1024), 0);
        assert_eq!(grown(128, 1024), 0);
        assert_eq!(grown(131, 1024), 2);
        assert_eq!(grown(u32::MAX, 1024), 1024 - 128);
    }

    #[test]
    fn what_exceeds_the_boot_memory_is_plugged() {
        let machine = size(None, None, None);
        assert_eq!(machine.hotplug_for(0), 0);
        assert_eq!(machine.hotplug_for(64 << 20), 0);
        assert_eq!(machine.hotplug_for((64 << 20) + 1), 2);
        assert_eq!(machine.hotplug_for(256 << 20), 194 + 2);
        assert!(machine.hotplug_for(u64::MAX) > 1 << 40);
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_both_numbers() {
        let limits = PodLimits {
            memory: Some(32 << 30),
            ..PodLimits::default()
        };
        let error = machine_size(&Config::default(), limits, HOST)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("32832 MiB") && error.contains("16384 MiB"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn any_limits_give_a_machine_in_range_or_an_error(
            memory in any::<Option<i64>>(), quota in any::<Option<i64>>(), period in any::<Option<u64>>()
        ) {
            let limits = PodLimits { cpu_quota: quota, cpu_period: period, memory };
            if let Ok(size) = machine_size(&Config::default(), limits, HOST) {
                prop_assert!((1..=32).contains(&size.vcpus));
                prop_assert!((128..=16384).contains(&size.memory_mib) && size.memory_mib % 2 == 0);
            }
        }
    }
}
