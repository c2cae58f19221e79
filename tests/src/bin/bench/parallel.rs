//! Many starts at once: how many a second, and how long each takes.

use crate::host::{self, Machine};
use crate::pod::{self, FirstOutput, HeldStart};
use crate::start::runc;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::figures::ms_between;
use bulkhead_tests::perf::now_ns;
use bulkhead_tests::shim::Bundle;
use bulkhead_tests::stats::{Quartiles, rounded};
use serde::Serialize;
use std::path::Path;
use std::sync::Barrier;
use std::time::Duration;

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench parallel 8\n  \
    scripts/dev bench parallel 32 --json\n  \
    scripts/dev bench parallel 2 --cold")]
pub struct Arguments {
    /// Number of starts at once.
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    starts: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Boot each VM instead of starting it from the template.
    #[arg(long)]
    cold: bool,
    /// Longest that a start may take, in seconds.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

/// Of starts that all began at the same moment; each lasts from its command (the shim's `start`, or
/// `runc run`) to the container's first output.
#[derive(Debug, Serialize)]
struct Times {
    /// How many.
    starts: u32,
    /// Starts in a second, from the common beginning to the last one's output.
    starts_per_second: f64,
    median_ms: f64,
    worst_ms: f64,
    all_ms: f64,
}

#[derive(Debug, Serialize)]
struct Figures {
    #[serde(flatten)]
    bulkhead: Times,
    runc: Option<Times>,
    templates: bool,
    kvm_kind: KvmKind,
    machine: Machine,
    repeat: String,
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When a container doesn't start.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let kvm_kind = host::kvm_kind(artifacts)?;
    let machine = Machine::look(artifacts)?;
    let settings = pod::settings(arguments.cold)?;
    let settings = settings.as_str();
    if !arguments.cold {
        pod::warm_up(artifacts)?;
    }
    let limit = Duration::from_secs(arguments.timeout);
    let bundles = |name: &str| -> Result<Vec<Bundle>> {
        (0..arguments.starts)
            .map(|number| pod::greeting_bundle(artifacts, &format!("{name}-{number}"), settings))
            .collect()
    };
    let runc = if Path::new(runc::PROGRAM).exists() {
        eprintln!("{} starts at once: runc", arguments.starts);
        let bundles = bundles("bench-runc")?;
        bundles.iter().try_for_each(runc::set_cgroup)?;
        Some(at_once(&bundles, |bundle, barrier| {
            with_runc(bundle, barrier, limit)
        })?)
    } else {
        None
    };
    eprintln!("{} starts at once: Bulkhead", arguments.starts);
    let bulkhead = at_once(&bundles("bench")?, |bundle, barrier| {
        with_shim(bundle, barrier, limit)
    })?;
    let figures = Figures {
        bulkhead,
        runc,
        templates: !arguments.cold,
        kvm_kind,
        machine,
        repeat: format!(
            "scripts/dev bench parallel {}{} --json",
            arguments.starts,
            if arguments.cold { " --cold" } else { "" }
        ),
    };
    print(&figures, arguments.json)
}

/// When a start began and when its output came.
type Span = (u64, u64);

/// Prepares all starts, lets them go at the same moment, and ends the containers once all have
/// printed. Each `start` must wait twice at the barrier: before it begins, and after its output.
fn at_once(
    bundles: &[Bundle],
    start: impl Fn(&Bundle, &Barrier) -> Result<Span> + Sync,
) -> Result<Times> {
    let barrier = Barrier::new(bundles.len());
    let spans = std::thread::scope(|scope| {
        let (start, barrier) = (&start, &barrier);
        let threads: Vec<_> = bundles
            .iter()
            .map(|bundle| scope.spawn(move || start(bundle, barrier)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(Error::Unexpected("a start panicked".into())))
            })
            .collect::<Result<Vec<Span>>>()
    })?;
    let first = spans.iter().map(|span| span.0).min().unwrap_or(0);
    let last = spans.iter().map(|span| span.1).max().unwrap_or(0);
    let each: Vec<f64> = spans
        .iter()
        .map(|(from, to)| ms_between(*from, *to))
        .collect();
    let all_ms = ms_between(first, last);
    Ok(Times {
        starts: spans.len() as u32,
        starts_per_second: rounded(spans.len() as f64 * 1000.0 / all_ms.max(f64::EPSILON), 3),
        median_ms: rounded(Quartiles::of(&each).map_or(0.0, |q| q.median), 1),
        worst_ms: rounded(each.iter().copied().fold(0.0, f64::max), 1),
        all_ms: rounded(all_ms, 1),
    })
}

fn with_shim(bundle: &Bundle, barrier: &Barrier, limit: Duration) -> Result<Span> {
    let prepared = HeldStart::new(bundle)
        .and_then(|held| Ok((held, FirstOutput::of_fifo(&bundle.beside("out"))?)));
    barrier.wait();
    // Whatever fails: the others must not wait at the barrier for ever.
    let started = prepared.and_then(|(held, output)| {
        let (pod, began) = held.release()?;
        pod.run(Some(&output))?;
        Ok((pod, (began, output.wait(limit)?)))
    });
    barrier.wait();
    let (pod, span) = started?;
    pod.end()?;
    Ok(span)
}

fn with_runc(bundle: &Bundle, barrier: &Barrier, limit: Duration) -> Result<Span> {
    let prepared = runc::Container::hold(bundle);
    barrier.wait();
    let started = prepared.and_then(|(container, output)| {
        let began = now_ns();
        crate::hold::release(container.pid())?;
        let first = output.wait(limit)?;
        Ok((container, (began, first)))
    });
    barrier.wait();
    let (_container, span) = started?;
    Ok(span)
}

fn print(figures: &Figures, json: bool) -> Result<()> {
    if json {
        let text = serde_json::to_string_pretty(figures).map_err(std::io::Error::from);
        println!("{}", text.context(|| "encode the figures".into())?);
        return Ok(());
    }
    println!("{}", figures.machine.line());
    println!(
        "{:<10} {:>8} {:>12} {:>12} {:>12} {:>12}",
        "", "starts", "per second", "median ms", "worst ms", "all ms"
    );
    let rows = [
        ("bulkhead", Some(&figures.bulkhead)),
        ("runc", figures.runc.as_ref()),
    ];
    for (name, times) in rows {
        let Some(t) = times else { continue };
        println!(
            "{name:<10} {:>8} {:>12} {:>12} {:>12} {:>12}",
            t.starts, t.starts_per_second, t.median_ms, t.worst_ms, t.all_ms
        );
    }
    println!("repeat with: {}", figures.repeat);
    Ok(())
}
