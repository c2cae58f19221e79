//! `ctr run busybox true` from cold, and exec into a running container.

use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::error::{Error, Result};
use serde::Serialize;
use std::time::Instant;

/// What can be said on the command line.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON: the medians.
    #[arg(long)]
    json: bool,
    /// How often each is done.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
}

#[derive(Serialize)]
struct Figures {
    ctr_run_true_ms: f64,
    ctr_exec_true_ms: f64,
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When containerd or a container fails.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let containerd = Containerd::start(artifacts, &Release::debian(), "")?;
    containerd.import_busybox()?;
    let mut runs = Vec::new();
    for number in 1..=arguments.runs {
        eprintln!(
            "run {number} of {}: waiting for a container's whole life",
            arguments.runs
        );
        let id = format!("bench-run-{number}");
        runs.push(timed(|| {
            containerd
                .run(&["--rm"], &id, &["true"])
                .map(|run| (run.code, run.stderr))
        })?);
    }
    let started = containerd.run(&["--detach"], "bench-exec", &["sleep", "100000"])?;
    let mut execs = Vec::new();
    if started.code == Some(0) {
        for number in 1..=arguments.runs {
            eprintln!("exec {number} of {}", arguments.runs);
            let exec = || {
                containerd
                    .exec(&[], "bench-exec", &["true"])
                    .map(|run| (run.code, run.stderr))
            };
            execs.push(timed(exec)?);
        }
    }
    containerd.ctr(&["tasks", "delete", "--force", "bench-exec"])?;
    containerd.ctr(&["containers", "delete", "bench-exec"])?;
    if started.code != Some(0) {
        return Err(Error::Unexpected(format!(
            "the container for exec did not start: {started:?}"
        )));
    }
    let figures = Figures {
        ctr_run_true_ms: median(runs),
        ctr_exec_true_ms: median(execs),
    };
    if arguments.json {
        println!("{}", serde_json::json!(figures));
    } else {
        println!(
            "ctr run --rm busybox true, cold  {:>10.1} ms",
            figures.ctr_run_true_ms
        );
        println!(
            "ctr tasks exec true              {:>10.1} ms",
            figures.ctr_exec_true_ms
        );
    }
    Ok(())
}

fn timed(act: impl FnOnce() -> Result<(Option<i32>, String)>) -> Result<f64> {
    let began = Instant::now();
    let (code, stderr) = act()?;
    if code != Some(0) {
        return Err(Error::Unexpected(format!("ended with {code:?}: {stderr}")));
    }
    Ok((began.elapsed().as_secs_f64() * 10_000.0).round() / 10.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
