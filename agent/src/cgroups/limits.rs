//! From the resources of an OCI spec, which speak of cgroup v1, to the files of cgroup v2.

use super::block_io;
use super::devices::DeviceRules;
use crate::error::Failure;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use std::borrow::Cow;

/// One file of a cgroup and what to write to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// File name; what is before the first dot is its controller.
    pub file: Cow<'static, str>,
    /// What to write.
    pub value: String,
    /// The field of the spec that asks for it, for error messages.
    pub field: &'static str,
}

/// All settings of a container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupSettings {
    /// In the order in which they have to be written.
    pub files: Vec<Setting>,
    /// Devices that it may use.
    pub devices: DeviceRules,
    /// `memory.checkBeforeUpdate`: a memory limit below what is in use is refused.
    check_usage: Option<i64>,
}

/// Largest value of `pids.max` etc. that OCI writes as "no limit".
const UNLIMITED: &str = "max";

impl CgroupSettings {
    /// Converts `linux.resources`; what cgroup v2 has no equivalent for is refused by name.
    pub fn new(resources: &LinuxResources) -> Result<Self, Failure> {
        let mut settings = Self::default();
        settings.refuse_unsupported(resources)?;
        if let Some(cpu) = resources.cpu() {
            settings.cpu(cpu)?;
        }
        if let Some(memory) = resources.memory() {
            settings.memory(memory)?;
        }
        if let Some(pids) = resources.pids() {
            settings.pids(pids.limit());
        }
        if let Some(io) = resources.block_io() {
            settings.files.extend(block_io::settings(io)?);
        }
        if let Some(devices) = resources.devices() {
            settings.devices = DeviceRules::new(devices)?;
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            settings.push(
                format!(
                    "hugetlb.{}.max",
                    checked_name("linux.resources.hugepageLimits", limit.page_size())?
                ),
                amount(limit.limit()),
                "linux.resources.hugepageLimits",
            );
        }
        for (file, value) in resources.unified().iter().flatten() {
            let file = checked_name("linux.resources.unified", file)?;
            if !file.contains('.') || file.starts_with("cgroup.") {
                return Err(Failure::invalid(
                    "linux.resources.unified",
                    format!("{file:?} is not the file of a controller"),
                ));
            }
            settings.push(file.to_owned(), value.clone(), "linux.resources.unified");
        }
        Ok(settings)
    }

    /// The controllers that these settings need.
    pub fn controllers(&self) -> impl Iterator<Item = &str> {
        self.files
            .iter()
            .filter_map(|setting| setting.file.split('.').next())
    }

    /// Carries out `checkBeforeUpdate`; `number` reads a file of the cgroup.
    pub fn check_usage(
        &self,
        number: impl FnOnce(&str) -> Result<Option<u64>, Failure>,
    ) -> Result<(), Failure> {
        let Some(limit) = self.check_usage.and_then(|limit| u64::try_from(limit).ok()) else {
            return Ok(());
        };
        match number("memory.current")? {
            Some(used) if used > limit => Err(Failure::invalid(
                "linux.resources.memory.limit",
                format!(
                    "{used} bytes are in use, and {limit} were asked for with checkBeforeUpdate"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn refuse_unsupported(&self, resources: &LinuxResources) -> Result<(), Failure> {
        let refused = |field: &str, why: &str| Err(Failure::invalid(field, why));
        if let Some(network) = resources.network() {
            let any = network.class_id().is_some_and(|id| id != 0)
                || network
                    .priorities()
                    .as_ref()
                    .is_some_and(|list| !list.is_empty());
            if any {
                return refused(
                    "linux.resources.network",
                    "cgroup v2 has no such controller; leave it out",
                );
            }
        }
        if resources.rdma().as_ref().is_some_and(|map| !map.is_empty()) {
            return refused(
                "linux.resources.rdma",
                "the guest has no RDMA device; leave it out",
            );
        }
        Ok(())
    }

    fn push(&mut self, file: impl Into<Cow<'static, str>>, value: String, field: &'static str) {
        self.files.push(Setting {
            file: file.into(),
            value,
            field,
        });
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Failure> {
        if cpu.realtime_runtime().is_some_and(|time| time != 0)
            || cpu.realtime_period().is_some_and(|time| time != 0)
        {
            return Err(Failure::invalid(
                "linux.resources.cpu.realtimeRuntime",
                "cgroup v2 has no limit for real-time tasks; leave it out",
            ));
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.push(
                "cpu.weight",
                weight(shares).to_string(),
                "linux.resources.cpu.shares",
            );
        }
        if let Some(idle) = cpu.idle() {
            self.push("cpu.idle", idle.to_string(), "linux.resources.cpu.idle");
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota.is_some() || period.is_some() {
            let mut value = match quota {
                Some(quota) if quota > 0 => quota.to_string(),
                _ => UNLIMITED.to_owned(),
            };
            if let Some(period) = period {
                value.push_str(&format!(" {period}"));
            }
            self.push("cpu.max", value, "linux.resources.cpu.quota");
        }
        // After cpu.max: the kernel refuses a burst above the quota.
        if let Some(burst) = cpu.burst().filter(|burst| *burst != 0) {
            self.push(
                "cpu.max.burst",
                burst.to_string(),
                "linux.resources.cpu.burst",
            );
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|list| !list.is_empty()) {
            self.push("cpuset.cpus", cpus.clone(), "linux.resources.cpu.cpus");
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|list| !list.is_empty()) {
            self.push("cpuset.mems", mems.clone(), "linux.resources.cpu.mems");
        }
        Ok(())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), Failure> {
        if memory.disable_oom_killer() == Some(true) {
            return Err(Failure::invalid(
                "linux.resources.memory.disableOOMKiller",
                "cgroup v2 can't switch the OOM killer off; leave it out",
            ));
        }
        if memory.swappiness().is_some() {
            return Err(Failure::invalid(
                "linux.resources.memory.swappiness",
                "cgroup v2 has no swappiness per cgroup; leave it out",
            ));
        }
        // kernel and kernelTCP are deprecated by the spec and without effect in cgroup v2, where
        // kernel memory counts into the limit itself.
        let limit = memory.limit().filter(|limit| *limit != 0);
        let swap = memory.swap().filter(|swap| *swap != 0);
        if memory.check_before_update() == Some(true) {
            self.check_usage = limit.filter(|limit| *limit > 0);
        }
        if let Some(limit) = limit {
            self.push("memory.max", amount(limit), "linux.resources.memory.limit");
        }
        if let Some(reservation) = memory.reservation().filter(|low| *low != 0) {
            self.push(
                "memory.low",
                amount(reservation),
                "linux.resources.memory.reservation",
            );
        }
        if let Some(swap) = swap {
            let field = "linux.resources.memory.swap";
            // In cgroup v1 and in the spec it is memory and swap together, in cgroup v2 swap alone.
            let value = match (swap, limit) {
                (..0, _) => UNLIMITED.to_owned(),
                (_, Some(..0)) => {
                    return Err(Failure::invalid(field, "a swap limit needs a memory limit"));
                }
                (_, None) => {
                    return Err(Failure::invalid(field, "a swap limit needs a memory limit"));
                }
                (swap, Some(limit)) if swap < limit => {
                    return Err(Failure::invalid(
                        field,
                        format!(
                            "{swap} is memory and swap together and must be at least the memory limit, {limit}"
                        ),
                    ));
                }
                (swap, Some(limit)) => (swap - limit).to_string(),
            };
            self.push("memory.swap.max", value, field);
        }
        Ok(())
    }

    fn pids(&mut self, limit: i64) {
        // 0 has always meant "not set" in runc, since a container without any process is of no use.
        if limit != 0 {
            self.push("pids.max", amount(limit), "linux.resources.pids.limit");
        }
    }
}

/// A limit in bytes or in number; negative ones mean none.
fn amount(limit: i64) -> String {
    if limit < 0 {
        UNLIMITED.to_owned()
    } else {
        limit.to_string()
    }
}

/// From cpu.shares (2 to 262144, default 1024) to cpu.weight (1 to 10000, default 100), linearly
/// as all runtimes do it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn checked_name<'a>(field: &str, name: &'a str) -> Result<&'a str, Failure> {
    if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
        return Err(Failure::invalid(
            field,
            format!("{name:?} is not a file name"),
        ));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::{CgroupSettings, weight};
    use oci_spec::runtime::LinuxResources;
    use proptest::prelude::*;

    fn convert(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources: LinuxResources = serde_json::from_str(json).expect("valid resources");
        CgroupSettings::new(&resources)
            .map(|settings| {
                settings
                    .files
                    .into_iter()
                    .map(|setting| (setting.file.into_owned(), setting.value))
                    .collect()
            })
            .map_err(|failure| failure.message)
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(file, value)| ((*file).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn converts_cpu_memory_and_pids() {
        let json = r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1"},
            "memory":{"limit":67108864,"reservation":33554432,"swap":134217728},"pids":{"limit":32},
            "devices":[{"allow":false,"access":"rwm"}]}"#;
        assert_eq!(
            convert(json),
            Ok(pairs(&[
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("memory.max", "67108864"),
                ("memory.low", "33554432"),
                ("memory.swap.max", "67108864"),
                ("pids.max", "32"),
            ]))
        );
    }

    #[test]
    fn negative_is_no_limit_and_zero_is_not_set() {
        assert_eq!(
            convert(
                r#"{"cpu":{"quota":-1,"period":0,"shares":0},"memory":{"limit":-1,"swap":-1},"pids":{"limit":-1}}"#
            ),
            Ok(pairs(&[
                ("cpu.max", "max"),
                ("memory.max", "max"),
                ("memory.swap.max", "max"),
                ("pids.max", "max")
            ]))
        );
        assert_eq!(
            convert(r#"{"pids":{"limit":0},"memory":{"limit":0,"swap":0}}"#),
            Ok(vec![])
        );
    }

    #[test]
    fn refuses_by_name_what_it_cannot_honour() {
        for (json, field) in [
            (r#"{"memory":{"swappiness":60}}"#, "swappiness"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "disableOOMKiller",
            ),
            (r#"{"memory":{"swap":10}}"#, "memory.swap"),
            (r#"{"memory":{"limit":20,"swap":10}}"#, "memory.swap"),
            (r#"{"cpu":{"realtimeRuntime":10}}"#, "realtimeRuntime"),
            (r#"{"blockIO":{"weight":1}}"#, "blockIO"),
            (r#"{"devices":[{"allow":true,"access":"x"}]}"#, "devices"),
            (r#"{"unified":{"cgroup.procs":"1"}}"#, "unified"),
            (r#"{"unified":{"../cpu.max":"1"}}"#, "unified"),
        ] {
            let refusal = convert(json).expect_err(json);
            assert!(refusal.contains(field), "{json}: {refusal}");
        }
    }

    #[test]
    fn a_limit_below_what_is_in_use_is_refused_if_asked() {
        let check = |json: &str, used: u64| {
            let resources: LinuxResources = serde_json::from_str(json).expect("valid resources");
            let settings = CgroupSettings::new(&resources).expect("settings");
            settings.check_usage(|file| {
                assert_eq!(file, "memory.current");
                Ok(Some(used))
            })
        };
        let asked = r#"{"memory":{"limit":100,"checkBeforeUpdate":true}}"#;
        assert!(check(asked, 101).is_err());
        assert!(check(asked, 100).is_ok());
        assert!(check(r#"{"memory":{"limit":100}}"#, 101).is_ok());
        assert!(check(r#"{"memory":{"limit":-1,"checkBeforeUpdate":true}}"#, 101).is_ok());
    }

    proptest! {
        #[test]
        fn weight_is_always_in_range(shares: u64) {
            prop_assert!((1..=10_000).contains(&weight(shares)));
        }
    }
}
