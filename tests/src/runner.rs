//! Runs scenarios, each in a process and namespaces of its own, two at a time, and counts.
//!
//! A boot is dear on a KVM that emulates guest kernel mode, so a *scenario* starts one machine (or
//! one containerd) and makes many *checks*; each check is reported by its own name and counted as
//! one test. Isolation: `unshare` gives a scenario its own process and mount namespaces, and this
//! program a fresh /run, so whatever is left at the end in any of them was left by the scenario.
//! Process 1 of that namespace only reaps, as a host's init does; when it ends, all ends.
//!
//! A scenario whose needs this host doesn't meet is reported as SKIPPED with the reason, check by
//! check where they are known, and counted; it never looks like a pass.

mod isolate;
mod report;

use crate::artifacts::Artifacts;
use crate::cgroups;
use report::Totals;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Environment variable with the name of the scenario that a process is for.
pub const SCENARIO_ENV: &str = "BULKHEAD_SCENARIO";

/// What a scenario can't do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Root and what was built, but no guest.
    Host,
    /// A KVM on which a guest runs.
    Guest,
    /// A guest, and tap devices for its network cards.
    Taps,
    /// All of these, and a host whose kernel serves network cards.
    VhostNet,
    /// A guest, and a current containerd beside Debian's.
    CurrentContainerd,
    /// The same, and thin pools of the device mapper's.
    ThinPools,
    /// A guest, and what makes networks for pods.
    Pods,
    /// The same, and a kernel with ipvlan interfaces.
    Ipvlan,
    /// Pods on a current containerd.
    PodsOnCurrentContainerd,
    /// A guest, a current containerd, and a Docker daemon.
    Docker,
    /// A guest, and public programs that test file systems.
    FileSystemPrograms,
}

/// A group of checks that share a machine or a containerd.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Name; checks are reported as `name::check`.
    pub name: &'static str,
    /// What it can't do without.
    pub needs: Need,
    /// The checks.
    pub run: fn(&mut Checks, &Artifacts),
}

/// Longest that a scenario may take. The slowest takes a fourth of it on the slowest host known.
const SCENARIO_LIMIT: Duration = Duration::from_secs(600);

/// Reports the checks of one scenario.
#[derive(Debug)]
pub struct Checks {
    scenario: &'static str,
    failed: bool,
}

impl Checks {
    /// Makes one check: passed unless it panics.
    pub fn check(&mut self, name: &str, check: impl FnOnce()) {
        self.require(name, check);
    }

    /// Makes one check that later ones build on, and returns what it made; `None` if it failed.
    pub fn require<T>(&mut self, name: &str, check: impl FnOnce() -> T) -> Option<T> {
        let began = Instant::now();
        report::clear_panic();
        let result = catch_unwind(AssertUnwindSafe(check));
        self.failed |= result.is_err();
        report::check_done(self.scenario, name, result.is_ok(), began.elapsed());
        result.ok()
    }
}

/// The whole program: lists, runs one scenario, or runs all that match.
pub fn main(scenarios: &[Scenario]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--help" | "-h"] => {
            println!(
                "Usage: e2e [FILTER...]\n\nRuns the scenarios whose name contains a FILTER (all \
                 without one). Called by scripts/dev test.\n\n  --list   print their names\n\n\
                 Example:\n  scripts/dev test --e2e containerd"
            );
            ExitCode::SUCCESS
        }
        ["--list"] => {
            scenarios
                .iter()
                .for_each(|scenario| println!("{}", scenario.name));
            ExitCode::SUCCESS
        }
        // Cargo's, for the harnesses of a whole workspace's tests. Here is none.
        ["--show-output"] => ExitCode::SUCCESS,
        ["--init", name] => isolate::init(name),
        ["--scenario", name] => match scenarios.iter().find(|scenario| scenario.name == name) {
            Some(scenario) => run_here(scenario),
            None => ExitCode::from(2),
        },
        _ => run_all(scenarios, &arguments),
    }
}

/// Runs a scenario in this process, which [`isolate`] has put into namespaces of its own.
fn run_here(scenario: &Scenario) -> ExitCode {
    report::keep_panics();
    let mut checks = Checks {
        scenario: scenario.name,
        failed: false,
    };
    let prepared = checks.require("namespaces and what was built", || {
        isolate::prepare_run();
        cgroups::remove_leftovers();
        Artifacts::find().unwrap_or_else(|error| panic!("{error}"))
    });
    if let Some(artifacts) = prepared {
        let before = isolate::snapshot();
        // A panic outside of a check is a failure as well.
        if catch_unwind(AssertUnwindSafe(|| (scenario.run)(&mut checks, &artifacts))).is_err() {
            checks.check("ran to its end", || panic!("{}", report::take_panic()));
        }
        checks.check("leaves nothing behind", || {
            isolate::assert_nothing_left(&before)
        });
    }
    println!("{}", report::END_MARK);
    ExitCode::from(u8::from(checks.failed))
}

fn run_all(scenarios: &[Scenario], filters: &[String]) -> ExitCode {
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f));
    let queue: VecDeque<&Scenario> = scenarios.iter().filter(|s| wanted(s.name)).collect();
    if queue.is_empty() {
        eprintln!("no scenario matches {filters:?}; --list prints their names");
        return ExitCode::from(2);
    }
    // What an earlier run has left must not decide how this one's machines start.
    if let Ok(artifacts) = Artifacts::find() {
        let _ = std::fs::remove_dir_all(artifacts.templates());
    }
    let totals = Mutex::new(Totals::default());
    let obstacles = isolate::Obstacles::find();
    let queue = Mutex::new(queue);
    // One guest keeps one core busy while it boots.
    let lanes = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(2));
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                while let Some(scenario) = next(&queue) {
                    let done = match obstacles.against(scenario.needs) {
                        Some(reason) => report::skipped(scenario.name, &reason),
                        None => isolate::run(scenario.name, SCENARIO_LIMIT),
                    };
                    if let Ok(mut totals) = totals.lock() {
                        totals.add(done);
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap_or_default();
    totals.print();
    ExitCode::from(u8::from(totals.failed > 0))
}

fn next<'a>(queue: &Mutex<VecDeque<&'a Scenario>>) -> Option<&'a Scenario> {
    queue.lock().ok()?.pop_front()
}
