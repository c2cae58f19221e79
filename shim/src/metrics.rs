//! A container's counters in the daemon's wording: `io.containerd.cgroups.v2.Metrics`.
//!
//! The guest counts by the kernel's own names; here they only change their place. What the guest
//! doesn't say stays 0, as it does where a host's kernel lacks a file.

use bulkhead_proto::agent::{HugetlbStats, StatsResponse};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::MessageField;
use std::collections::HashMap;

/// Longest name of a page size that is passed on.
const MAX_PAGE_SIZE: usize = 16;

/// The counters that cgroup files give by name.
struct Named<'a>(&'a HashMap<String, u64>);

impl Named<'_> {
    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default()
    }
}

/// The metrics of one container.
pub fn of(stats: StatsResponse) -> Metrics {
    let pids = PidsStat {
        current: stats.pids_current,
        limit: stats.pids_max,
        ..Default::default()
    };
    let io = IOStat {
        usage: stats.io.iter().map(io_entry).collect(),
        ..Default::default()
    };
    Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu(&Named(&stats.cpu))),
        memory: MessageField::some(memory(&stats)),
        memory_events: MessageField::some(memory_events(&Named(&stats.memory_events))),
        io: MessageField::some(io),
        hugetlb: stats.hugetlb.into_iter().filter_map(hugetlb).collect(),
        ..Default::default()
    }
}

fn cpu(named: &Named<'_>) -> CPUStat {
    CPUStat {
        usage_usec: named.get("usage_usec"),
        user_usec: named.get("user_usec"),
        system_usec: named.get("system_usec"),
        nr_periods: named.get("nr_periods"),
        nr_throttled: named.get("nr_throttled"),
        throttled_usec: named.get("throttled_usec"),
        nr_bursts: named.get("nr_bursts"),
        burst_usec: named.get("burst_usec"),
        ..Default::default()
    }
}

fn memory(stats: &StatsResponse) -> MemoryStat {
    let named = Named(&stats.memory);
    // The kernel has told the two kinds of refaults apart since 5.9; the message hasn't.
    let both = |name: &str| {
        let parts = ["", "_anon", "_file"].map(|part| named.get(&format!("{name}{part}")));
        parts.into_iter().fold(0, u64::saturating_add)
    };
    MemoryStat {
        anon: named.get("anon"),
        file: named.get("file"),
        kernel_stack: named.get("kernel_stack"),
        slab: named.get("slab"),
        sock: named.get("sock"),
        shmem: named.get("shmem"),
        file_mapped: named.get("file_mapped"),
        file_dirty: named.get("file_dirty"),
        file_writeback: named.get("file_writeback"),
        anon_thp: named.get("anon_thp"),
        inactive_anon: named.get("inactive_anon"),
        active_anon: named.get("active_anon"),
        inactive_file: named.get("inactive_file"),
        active_file: named.get("active_file"),
        unevictable: named.get("unevictable"),
        slab_reclaimable: named.get("slab_reclaimable"),
        slab_unreclaimable: named.get("slab_unreclaimable"),
        pgfault: named.get("pgfault"),
        pgmajfault: named.get("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: named.get("workingset_nodereclaim"),
        pgrefill: named.get("pgrefill"),
        pgscan: named.get("pgscan"),
        pgsteal: named.get("pgsteal"),
        pgactivate: named.get("pgactivate"),
        pgdeactivate: named.get("pgdeactivate"),
        pglazyfree: named.get("pglazyfree"),
        pglazyfreed: named.get("pglazyfreed"),
        thp_fault_alloc: named.get("thp_fault_alloc"),
        thp_collapse_alloc: named.get("thp_collapse_alloc"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        max_usage: stats.memory_peak,
        swap_usage: stats.swap_current,
        swap_limit: stats.swap_max,
        swap_max_usage: stats.swap_peak,
        ..Default::default()
    }
}

fn memory_events(named: &Named<'_>) -> MemoryEvents {
    MemoryEvents {
        low: named.get("low"),
        high: named.get("high"),
        max: named.get("max"),
        oom: named.get("oom"),
        oom_kill: named.get("oom_kill"),
        oom_group_kill: named.get("oom_group_kill"),
        ..Default::default()
    }
}

fn io_entry(stats: &bulkhead_proto::agent::IoStats) -> IOEntry {
    IOEntry {
        major: stats.major,
        minor: stats.minor,
        rbytes: stats.read_bytes,
        wbytes: stats.written_bytes,
        rios: stats.reads,
        wios: stats.writes,
        ..Default::default()
    }
}

/// None for a name that no kernel gives a page size: daemons make labels of it.
fn hugetlb(stats: HugetlbStats) -> Option<HugeTlbStat> {
    let size = &stats.page_size;
    let plausible = !size.is_empty()
        && size.len() <= MAX_PAGE_SIZE
        && size.bytes().all(|byte| byte.is_ascii_alphanumeric());
    plausible.then(|| HugeTlbStat {
        current: stats.current,
        max: stats.max,
        pagesize: stats.page_size,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(pairs: &[(&str, u64)]) -> HashMap<String, u64> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).into(), *value))
            .collect()
    }

    #[test]
    fn every_counter_finds_its_place() {
        let stats = StatsResponse {
            pids_current: 3,
            pids_max: u64::MAX,
            cpu: named(&[("usage_usec", 10), ("nr_throttled", 2), ("unheard_of", 9)]),
            memory: named(&[
                ("anon", 4096),
                ("workingset_refault_anon", 5),
                ("workingset_refault_file", 7),
            ]),
            memory_events: named(&[("oom_kill", 1)]),
            memory_current: 8192,
            memory_max: 1 << 20,
            io: vec![bulkhead_proto::agent::IoStats {
                major: 254,
                written_bytes: 512,
                ..Default::default()
            }],
            hugetlb: ["2MB", "", "a\nb", &"9".repeat(17)]
                .map(|size| HugetlbStats {
                    page_size: size.into(),
                    ..Default::default()
                })
                .into(),
            ..Default::default()
        };
        let metrics = of(stats);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.nr_throttled), (10, 2));
        assert_eq!((metrics.memory.anon, metrics.memory.usage), (4096, 8192));
        assert_eq!(metrics.memory.usage_limit, 1 << 20);
        assert_eq!(metrics.memory.workingset_refault, 12);
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(metrics.io.usage[0].wbytes, 512);
        let sizes: Vec<_> = metrics
            .hugetlb
            .iter()
            .map(|one| one.pagesize.as_str())
            .collect();
        assert_eq!(sizes, ["2MB"]);
    }

    proptest! {
        #[test]
        fn whatever_the_guest_says_there_is_an_answer(
            refaults in any::<[u64; 3]>(), page_size in "\\PC{0,20}", value in any::<u64>(),
        ) {
            let names = ["workingset_refault", "workingset_refault_anon", "workingset_refault_file"];
            let metrics = of(StatsResponse {
                memory: names.iter().map(|name| (*name).into()).zip(refaults).collect(),
                hugetlb: vec![HugetlbStats { page_size, current: value, ..Default::default() }],
                ..Default::default()
            });
            let wanted = refaults.into_iter().fold(0, u64::saturating_add);
            prop_assert_eq!(metrics.memory.workingset_refault, wanted);
            prop_assert!(metrics.hugetlb.iter().all(|one| one.pagesize.is_ascii()));
        }
    }
}
