//! Many idle pods at once: what each costs.

use crate::host::{self, Machine};
use crate::pod::{self, HeldStart, Pod};
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::footprint::{Footprint, cpu_ms, descendants};
use bulkhead_tests::shim::{Bundle, spec};
use bulkhead_tests::stats::Quartiles;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench density 10\n  \
    scripts/dev bench density 100 --json\n  \
    scripts/dev bench density 4 --cold")]
pub struct Arguments {
    /// Number of pods.
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pods: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Boot each VM instead of starting it from the template.
    #[arg(long)]
    cold: bool,
    /// Seconds to wait, once all pods run, before measuring: what a start leaves to be done after
    /// it belongs to the pod's memory too.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    settle: u64,
}

/// The result. Of the figures per pod, medians.
#[derive(Debug, Serialize)]
struct Figures {
    /// Pods that ran at once.
    pods: u32,
    /// KiB that only this pod's processes hold, all of them together.
    private_kib_per_pod: u64,
    /// The same of the pod that held most.
    private_kib_worst_pod: u64,
    /// Its parts.
    vmm_private_kib: u64,
    shim_private_kib: u64,
    /// KiB that the pod's processes share with other pods' (or with each other).
    shared_kib_per_pod: u64,
    /// KiB with shared pages divided by those who share them.
    proportional_kib_per_pod: u64,
    /// KiB by which the host's MemAvailable fell for each pod: counts the host's kernel too (page
    /// tables, shadow pages, sockets) and whatever else happened on the host meanwhile.
    host_kib_per_pod: i64,
    /// Milliseconds of CPU time that a pod uses in a second of doing nothing.
    idle_cpu_ms_per_s: f64,
    processes_per_pod: u64,
    threads_per_pod: u64,
    descriptors_per_pod: u64,
    vmm_threads: u64,
    vmm_descriptors: u64,
    shim_threads: u64,
    shim_descriptors: u64,
    /// Seconds in which all were started, two at a time for each processor.
    all_started_s: f64,
    templates: bool,
    kvm_kind: KvmKind,
    machine: Machine,
    repeat: String,
}

/// One pod's.
struct Processes {
    shim: u32,
    /// The VMM, and whatever else there may be.
    children: Vec<u32>,
}

impl Processes {
    fn of(pod: &Pod<'_>) -> Result<Self> {
        let shim = pod.shim_pid();
        Ok(Self {
            shim,
            children: descendants(shim)?,
        })
    }
}

/// What one pod holds.
struct Measured {
    all: Footprint,
    shim: Footprint,
    vmm: Footprint,
    processes: u64,
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When a pod doesn't start.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let kvm_kind = host::kvm_kind(artifacts)?;
    let machine = Machine::look(artifacts)?;
    raise_descriptor_limit()?;
    let settings = pod::settings(arguments.cold)?;
    let settings = settings.as_str();
    let bundles = bundles(artifacts, arguments.pods, settings)?;
    if !arguments.cold {
        // Builds the template, so that it isn't counted as a pod's.
        pod::warm_up(artifacts)?;
    }
    let before = host::memory_kib("MemAvailable").unwrap_or(0);
    let began = Instant::now();
    let pods = start_all(&bundles, arguments.pods)?;
    let all_started_s = began.elapsed().as_secs_f64();
    eprintln!(
        "all {} run; waiting {} s for them to settle",
        pods.len(),
        arguments.settle
    );
    let processes = pods.iter().map(Processes::of).collect::<Result<Vec<_>>>()?;
    let idle_cpu_ms_per_s = idle_cpu(&processes, Duration::from_secs(arguments.settle))?;
    let after = host::memory_kib("MemAvailable").unwrap_or(0);
    let measured = processes.iter().map(of_pod).collect::<Result<Vec<_>>>()?;
    let median = |value: &dyn Fn(&Measured) -> u64| {
        let values: Vec<f64> = measured.iter().map(|m| value(m) as f64).collect();
        Quartiles::of(&values).map_or(0, |quartiles| quartiles.median as u64)
    };
    let figures = Figures {
        pods: arguments.pods,
        private_kib_per_pod: median(&|m| m.all.private_kib),
        private_kib_worst_pod: measured
            .iter()
            .map(|m| m.all.private_kib)
            .max()
            .unwrap_or(0),
        vmm_private_kib: median(&|m| m.vmm.private_kib),
        shim_private_kib: median(&|m| m.shim.private_kib),
        shared_kib_per_pod: median(&|m| m.all.shared_kib),
        proportional_kib_per_pod: median(&|m| m.all.proportional_kib),
        host_kib_per_pod: (before as i64 - after as i64) / i64::from(arguments.pods),
        idle_cpu_ms_per_s,
        processes_per_pod: median(&|m| m.processes),
        threads_per_pod: median(&|m| m.all.threads),
        descriptors_per_pod: median(&|m| m.all.descriptors),
        vmm_threads: median(&|m| m.vmm.threads),
        vmm_descriptors: median(&|m| m.vmm.descriptors),
        shim_threads: median(&|m| m.shim.threads),
        shim_descriptors: median(&|m| m.shim.descriptors),
        all_started_s: bulkhead_tests::stats::rounded(all_started_s, 1),
        templates: !arguments.cold,
        kvm_kind,
        machine,
        repeat: format!(
            "scripts/dev bench density {}{} --json",
            arguments.pods,
            if arguments.cold { " --cold" } else { "" }
        ),
    };
    print(&figures, arguments.json)
    // The pods end with the bench's namespaces.
}

/// This process holds a connection to each shim.
fn raise_descriptor_limit() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context(|| "read limits".into())?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context(|| "raise the limit of files".into())
}

fn bundles(artifacts: &Artifacts, count: u32, settings: &str) -> Result<Vec<Bundle>> {
    (0..count)
        .map(|number| {
            let bundle = Bundle::new(artifacts, &format!("bench-{number}"), settings)?;
            bundle.set_spec(&spec(&["sleep", "1000000"]))?;
            Ok(bundle)
        })
        .collect()
}

/// Two at a time for each processor: enough to keep all busy.
fn start_all(bundles: &[Bundle], count: u32) -> Result<Vec<Pod<'_>>> {
    let waiting: Mutex<VecDeque<&Bundle>> = Mutex::new(bundles.iter().collect());
    let lanes = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    let started = Mutex::new(Vec::new());
    let lane = || -> Result<()> {
        loop {
            let next = waiting
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .pop_front();
            let Some(bundle) = next else { return Ok(()) };
            let (pod, _) = HeldStart::new(bundle)?.release()?;
            pod.run(None)?;
            let mut started = started.lock().unwrap_or_else(|e| e.into_inner());
            started.push(pod);
            eprintln!("pod {} of {count} runs", started.len());
        }
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().try_for_each(|lane| {
            lane.join()
                .unwrap_or_else(|_| Err(Error::Unexpected("starting a pod panicked".into())))
        })
    })?;
    Ok(started.into_inner().unwrap_or_else(|e| e.into_inner()))
}

/// Waits, and returns the median of the CPU time that pods use in a second.
fn idle_cpu(pods: &[Processes], wait: Duration) -> Result<f64> {
    let used = || -> Result<Vec<f64>> {
        pods.iter()
            .map(|pod| {
                let of_children = pod.children.iter().map(|child| cpu_ms(*child));
                Ok(cpu_ms(pod.shim)? + of_children.sum::<Result<f64>>()?)
            })
            .collect()
    };
    let began = Instant::now();
    let before = used()?;
    std::thread::sleep(wait);
    let after = used()?;
    let seconds = began.elapsed().as_secs_f64();
    let each: Vec<f64> = before
        .iter()
        .zip(&after)
        .map(|(before, after)| (after - before) / seconds)
        .collect();
    Ok(Quartiles::of(&each).map_or(0.0, |quartiles| quartiles.rounded(2).median))
}

fn of_pod(pod: &Processes) -> Result<Measured> {
    let shim = Footprint::of(pod.shim)?;
    let mut vmm = Footprint::default();
    for child in &pod.children {
        vmm += Footprint::of(*child)?;
    }
    let mut all = shim;
    all += vmm;
    Ok(Measured {
        all,
        shim,
        vmm,
        processes: 1 + pod.children.len() as u64,
    })
}

fn print(figures: &Figures, json: bool) -> Result<()> {
    let value = serde_json::to_value(figures).map_err(std::io::Error::from);
    let value = value.context(|| "encode the figures".into())?;
    if json {
        println!("{value:#}");
        return Ok(());
    }
    println!("{}", figures.machine.line());
    for (key, value) in value.as_object().into_iter().flatten() {
        if key != "machine" {
            println!("{key:<28} {}", value.to_string().trim_matches('"'));
        }
    }
    Ok(())
}
