//! Execs by the thousand: whether they leave anything in shim, VMM or agent.

use crate::pod;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::storm::{Bundles, Holdings, Pod};
use serde::Serialize;
use std::time::Instant;

/// Execs before the first look: heaps and thread pools have grown by then to what they need.
const WARM_UP: u32 = 20;

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench storm\n  \
    scripts/dev bench storm --execs 100 --at-once 10 --json")]
pub struct Arguments {
    /// Execs one after another.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    execs: u32,
    /// Execs at the same time, after those.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    at_once: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Figures {
    execs: u32,
    execs_s: f64,
    at_once: u32,
    at_once_s: f64,
    before: Holdings,
    after_execs: Holdings,
    after_at_once: Holdings,
    /// What there is more of at the end, in words; empty is good.
    left: Vec<String>,
    repeat: String,
}

/// Runs the storms and prints what is held before and after.
///
/// # Errors
/// When an exec fails, or when something is left.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let settings = pod::settings(false)?;
    let bundles = Bundles::new(artifacts, &settings)?;
    eprintln!("starting a pod; waiting for the template");
    let pod = Pod::start(&bundles)?;
    (0..WARM_UP).try_for_each(|_| pod.exec())?;
    pod.at_once(arguments.at_once)?;
    let before = pod.holdings()?;
    let began = Instant::now();
    for number in 1..=arguments.execs {
        pod.exec()?;
        if number % 100 == 0 {
            eprintln!("exec {number} of {}", arguments.execs);
        }
    }
    let execs_s = began.elapsed().as_secs_f64();
    let after_execs = pod.settled(&before)?;
    eprintln!("{} execs at once", arguments.at_once);
    let began = Instant::now();
    pod.at_once(arguments.at_once)?;
    let at_once_s = began.elapsed().as_secs_f64();
    let after_at_once = pod.settled(&before)?;
    pod.end()?;
    let round = |seconds| bulkhead_tests::stats::rounded(seconds, 1);
    let figures = Figures {
        execs: arguments.execs,
        execs_s: round(execs_s),
        at_once: arguments.at_once,
        at_once_s: round(at_once_s),
        before,
        after_execs,
        after_at_once,
        left: after_at_once.more_than(&before),
        repeat: format!(
            "scripts/dev bench storm --execs {} --at-once {}",
            arguments.execs, arguments.at_once
        ),
    };
    print(&figures, arguments.json)?;
    match figures.left.is_empty() {
        true => Ok(()),
        false => Err(Error::Unexpected(format!(
            "something is left: {}",
            figures.left.join("; ")
        ))),
    }
}

fn print(figures: &Figures, json: bool) -> Result<()> {
    if json {
        let text = serde_json::to_string_pretty(figures).map_err(std::io::Error::from);
        println!("{}", text.context(|| "encode the figures".into())?);
        return Ok(());
    }
    let columns = [
        &figures.before,
        &figures.after_execs,
        &figures.after_at_once,
    ];
    println!(
        "{:<28} {:>12} {:>12} {:>12}",
        "held",
        "before",
        format!("{} in a row", figures.execs),
        format!("{} at once", figures.at_once),
    );
    type Value = fn(&Holdings) -> u64;
    let rows: [(&str, Value); 10] = [
        ("shim_private_kib", |held| held.shim.private_kib),
        ("shim_threads", |held| held.shim.threads),
        ("shim_descriptors", |held| held.shim.descriptors),
        ("vmm_private_kib", |held| held.vmm.private_kib),
        ("vmm_threads", |held| held.vmm.threads),
        ("vmm_descriptors", |held| held.vmm.descriptors),
        ("agent_kib", |held| held.agent_kib),
        ("agent_descriptors", |held| held.agent_descriptors),
        ("guest_processes", |held| held.guest_processes),
        ("guest_kernel_kib", |held| held.guest_kernel_kib),
    ];
    for (name, value) in rows {
        let [before, row, once] = columns.map(value);
        println!("{name:<28} {before:>12} {row:>12} {once:>12}");
    }
    println!("seconds: {} and {}", figures.execs_s, figures.at_once_s);
    println!("repeat with: {}", figures.repeat);
    Ok(())
}
