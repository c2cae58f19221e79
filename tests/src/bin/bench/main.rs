//! `bulkhead-bench`: the figures behind `scripts/dev bench`.

mod boot;
mod density;
mod guests;
mod hold;
mod host;
mod io;
mod isolate;
mod layers;
mod net;
mod parallel;
mod plot;
mod pod;
mod profile;
mod run;
mod start;
mod storm;
mod task;
mod usage;

use bulkhead_tests::{Artifacts, Result};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Measures Bulkhead on this host. Called by scripts/dev bench, which builds what is measured.
#[derive(Parser)]
#[command(name = "bulkhead-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// From the VMM's start to the agent's ready message, for 1 vCPU and 128 MiB.
    Boot(boot::Arguments),
    /// `ctr run busybox true` from cold, and exec into a running container.
    Run(run::Arguments),
    /// Template, cold boot, QEMU's microvm and runc side by side.
    Start(start::Arguments),
    /// N idle pods at once: memory, threads and descriptors of each.
    Density(density::Arguments),
    /// N starts at once: throughput, median and worst.
    Parallel(parallel::Arguments),
    /// One more container in a running pod: create, start, exec, kill, delete.
    Task(task::Arguments),
    /// Execs by the thousand, and what they leave.
    Storm(storm::Arguments),
    /// An image's layers read by virtio-fs, and converted to disks.
    Layers(layers::Arguments),
    /// fio in guests of Bulkhead's and QEMU's, and under runc.
    Io(io::Arguments),
    /// iperf3 and a ping-pong in guests of Bulkhead's and QEMU's, and under runc.
    Net(net::Arguments),
    /// Draws the phases of a start as SVG.
    Plot(plot::Arguments),
    /// Stops itself and, continued, executes a program.
    #[command(hide = true, name = hold::SUBCOMMAND)]
    Hold(hold::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Boot(arguments) => here(|artifacts| boot::measure(artifacts, &arguments)),
        Command::Run(arguments) => here(|artifacts| run::measure(artifacts, &arguments)),
        Command::Start(arguments) => alone(|artifacts| start::measure(artifacts, &arguments)),
        Command::Density(arguments) => alone(|artifacts| density::measure(artifacts, &arguments)),
        Command::Parallel(arguments) => alone(|artifacts| parallel::measure(artifacts, &arguments)),
        Command::Task(arguments) => alone(|artifacts| task::measure(artifacts, &arguments)),
        Command::Storm(arguments) => alone(|artifacts| storm::measure(artifacts, &arguments)),
        Command::Layers(arguments) => alone(|artifacts| layers::measure(artifacts, &arguments)),
        Command::Io(arguments) => alone(|artifacts| io::measure(artifacts, &arguments)),
        Command::Net(arguments) => alone(|artifacts| net::measure(artifacts, &arguments)),
        Command::Plot(arguments) => match plot::draw(&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Command::Hold(arguments) => failed(&hold::run(&arguments)),
    }
}

fn here(measure: impl FnOnce(&Artifacts) -> Result<()>) -> ExitCode {
    match Artifacts::find().and_then(|artifacts| measure(&artifacts)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// In namespaces of its own.
fn alone(measure: impl FnOnce(&Artifacts) -> Result<()>) -> ExitCode {
    isolate::run(|| Artifacts::find().and_then(|artifacts| measure(&artifacts)))
}

fn failed(error: &bulkhead_tests::Error) -> ExitCode {
    eprintln!("bulkhead-bench: {error}");
    ExitCode::FAILURE
}
