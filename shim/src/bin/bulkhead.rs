//! The `bulkhead` command, for people and scripts.

use bulkhead_shim::check;
use bulkhead_shim::command::CommandError;
use bulkhead_shim::layers::{self, LayerCommand};
use bulkhead_shim::template::{self, TemplateCommand};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Containers in microVMs: looks at and works with this host's Bulkhead.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says whether this host can run microVMs, with which kind of KVM, and what to do if not.
    ///
    /// The exit code is 0 if it can, 1 if not.
    Check {
        /// Prints one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Uses this configuration file instead of the one that a shim would find.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Works with the saved machines that virtual machines are started from.
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Works with the layers of images that were converted to disks (`convert_layers`).
    #[command(subcommand)]
    Layer(LayerCommand),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Check { json, config } => run_check(json, config),
        Command::Template(command) => finish(template::run(command)),
        Command::Layer(command) => finish(layers::run(command)),
    }
}

fn finish(result: Result<(), CommandError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_check(json: bool, config: Option<PathBuf>) -> ExitCode {
    let report = check::run(config);
    if json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("bulkhead: cannot write the report as JSON: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        print!("{report}");
    }
    if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
