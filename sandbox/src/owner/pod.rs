//! A pod as a whole: its end, and what its containers use together.

use super::{Owner, Vm, wrong_state};
use crate::error::{Error, Result};
use crate::guest::{AgentError, Guest};
use crate::ids::{ContainerId, ProcessId};
use crate::process::{Phase, Reply};
use bulkhead_proto::agent::{HugetlbStats, IoStats, StatsResponse};
use std::collections::HashMap;
use std::sync::Arc;

/// Most entries of a list, or names of a table, that are taken over from the guest's answers.
pub(super) const MAX_ENTRIES: usize = 1024;

impl Owner {
    /// Shuts the VM down. Its end is then told as any other ([`Owner::vm_ended`]).
    pub(super) fn end_pod(&mut self, id: &ContainerId, reply: Reply<()>) {
        let init = ProcessId::init(id.clone());
        let phase = match self.process(&init) {
            Ok(process) => process.phase,
            Err(error) => return drop(reply.send(Err(error))),
        };
        if phase == Phase::Creating {
            return drop(reply.send(Err(wrong_state("stop", &init, phase))));
        }
        if !self.is_pod_sandbox(id) {
            let problem = format!("{id} is not the sandbox of a pod");
            return drop(reply.send(Err(Error::Invalid(problem))));
        }
        match &mut self.vm {
            Vm::Up(running) => {
                running.told_to_end = true;
                let guest = running.guest.clone();
                tokio::spawn(async move {
                    guest.shut_down().await;
                    let _ = reply.send(Ok(()));
                });
            }
            // Nothing runs any more.
            Vm::Dead { .. } | Vm::Stopping | Vm::Absent | Vm::Booting => drop(reply.send(Ok(()))),
        }
    }

    /// The sum over the containers that the guest has.
    pub(super) fn pod_stats(&self, guest: Arc<Guest>, reply: Reply<Box<StatsResponse>>) {
        let members: Vec<ContainerId> = self
            .containers
            .iter()
            .filter(|(id, one)| one.init.phase != Phase::Creating && !self.is_pod_sandbox(id))
            .map(|(id, _)| id.clone())
            .collect();
        tokio::spawn(async move {
            let _ = reply.send(sum_of(&guest, members).await.map(Box::new));
        });
    }
}

async fn sum_of(guest: &Guest, members: Vec<ContainerId>) -> Result<StatsResponse> {
    let mut sum = StatsResponse::default();
    for id in members {
        match guest.stats(&id).await {
            Ok(stats) => add(&mut sum, stats),
            // Deleted meanwhile.
            Err(AgentError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sum)
}

/// Adds a container's counters to its pod's. Limits are added up too: one container without a
/// limit leaves the pod without one.
fn add(sum: &mut StatsResponse, stats: StatsResponse) {
    let numbers = [
        (&mut sum.pids_current, stats.pids_current),
        (&mut sum.pids_max, stats.pids_max),
        (&mut sum.memory_current, stats.memory_current),
        (&mut sum.memory_max, stats.memory_max),
        (&mut sum.memory_peak, stats.memory_peak),
        (&mut sum.swap_current, stats.swap_current),
        (&mut sum.swap_max, stats.swap_max),
        (&mut sum.swap_peak, stats.swap_peak),
    ];
    for (total, value) in numbers {
        *total = total.saturating_add(value);
    }
    add_named(&mut sum.cpu, stats.cpu);
    add_named(&mut sum.memory, stats.memory);
    add_named(&mut sum.memory_events, stats.memory_events);
    for device in stats.io.into_iter().take(MAX_ENTRIES) {
        add_device(&mut sum.io, device);
    }
    for pages in stats.hugetlb.into_iter().take(MAX_ENTRIES) {
        add_pages(&mut sum.hugetlb, pages);
    }
}

fn add_named(sum: &mut HashMap<String, u64>, named: HashMap<String, u64>) {
    for (name, value) in named {
        if let Some(total) = sum.get_mut(&name) {
            *total = total.saturating_add(value);
        } else if sum.len() < MAX_ENTRIES {
            sum.insert(name, value);
        }
    }
}

fn add_device(sum: &mut Vec<IoStats>, device: IoStats) {
    let same = |one: &&mut IoStats| (one.major, one.minor) == (device.major, device.minor);
    if let Some(total) = sum.iter_mut().find(same) {
        total.read_bytes = total.read_bytes.saturating_add(device.read_bytes);
        total.written_bytes = total.written_bytes.saturating_add(device.written_bytes);
        total.reads = total.reads.saturating_add(device.reads);
        total.writes = total.writes.saturating_add(device.writes);
    } else if sum.len() < MAX_ENTRIES {
        sum.push(device);
    }
}

fn add_pages(sum: &mut Vec<HugetlbStats>, pages: HugetlbStats) {
    let same = |one: &&mut HugetlbStats| one.page_size == pages.page_size;
    if let Some(total) = sum.iter_mut().find(same) {
        total.current = total.current.saturating_add(pages.current);
        total.max = total.max.saturating_add(pages.max);
    } else if sum.len() < MAX_ENTRIES {
        sum.push(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stats(usage: u64, limit: u64) -> StatsResponse {
        StatsResponse {
            pids_current: 1,
            memory_max: limit,
            cpu: HashMap::from([("usage_usec".to_owned(), usage)]),
            io: vec![IoStats {
                major: 254,
                read_bytes: usage,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_uses_what_its_containers_use() {
        let mut sum = StatsResponse::default();
        add(&mut sum, stats(10, 1 << 20));
        add(&mut sum, stats(5, 1 << 20));
        assert_eq!((sum.pids_current, sum.memory_max), (2, 2 << 20));
        assert_eq!(sum.cpu["usage_usec"], 15);
        assert_eq!((sum.io.len(), sum.io[0].read_bytes), (1, 15));
        add(&mut sum, stats(0, u64::MAX));
        assert_eq!(sum.memory_max, u64::MAX, "one without a limit");
    }

    proptest! {
        #[test]
        fn whatever_guests_say_the_sum_is_bounded(
            values in proptest::collection::vec(any::<(u64, u64)>(), 0..8), names in 0usize..3000,
        ) {
            let mut sum = StatsResponse::default();
            for (usage, limit) in values {
                let mut one = stats(usage, limit);
                one.cpu.extend((0..names).map(|name| (format!("{usage}-{name}"), limit)));
                one.io.extend((0..names as u64).map(|minor| IoStats {
                    minor, read_bytes: u64::MAX, ..Default::default()
                }));
                add(&mut sum, one);
            }
            prop_assert!(sum.cpu.len() <= MAX_ENTRIES && sum.io.len() <= MAX_ENTRIES);
        }
    }
}
