//! The `bulkhead-vmm` program. The sandbox library starts it without arguments; people start it
//! with `--probe` or `--help`.

use std::process::ExitCode;
use std::time::Instant;

use bulkhead_proto::vmm::{Event, ExitReason};
use bulkhead_vmm::events::EventSink;
use bulkhead_vmm::{config, machine, probe};
use clap::Parser;

/// Virtual machine monitor of Bulkhead: boots one guest kernel on KVM.
///
/// Without options it reads its configuration from descriptor 3, as the sandbox library passes it.
#[derive(Parser)]
#[command(
    name = "bulkhead-vmm",
    version,
    after_help = "Examples:\n  \
    bulkhead-vmm --probe     how this host's KVM runs guest kernel mode, as JSON"
)]
struct Arguments {
    /// Find out how this host's KVM runs guest kernel mode, print it as JSON, and leave.
    #[arg(long)]
    probe: bool,
}

fn main() -> ExitCode {
    let started = Instant::now();
    let arguments = Arguments::parse();
    log_to_stderr();
    if arguments.probe {
        return print_probe();
    }
    end_on_panic();
    share_one_heap();
    run(started)
}

/// One heap for all threads: a heap for each would cost memory, and making one reads the number of
/// processors from a file, which the threads' filters rightly forbid.
fn share_one_heap() {
    // SAFETY: sets a number inside malloc; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// A thread that panics leaves a machine with a part missing: better none.
fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// Our own lines only: what the `log` crate's users among our libraries print holds guest bytes, as
/// many as the guest likes.
fn log_to_stderr() {
    let lines = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .finish();
    // Fails only if there is one already.
    let _ = tracing::subscriber::set_global_default(lines);
}

fn print_probe() -> ExitCode {
    let found = kvm_ioctls::Kvm::new()
        .map_err(|error| {
            format!(
                "opening /dev/kvm: {error}; load KVM's module and give this user the right to it"
            )
        })
        .and_then(|kvm| probe::run(&kvm).map_err(|error| error.to_string()))
        .and_then(|findings| serde_json::to_string(&findings).map_err(|error| error.to_string()));
    match found {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("bulkhead-vmm: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(started: Instant) -> ExitCode {
    let (resources, events) = match config::take() {
        Ok((resources, events)) => (resources, EventSink::new(events)),
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::from(2);
        }
    };
    let reason = machine::run(resources, &events, started);
    tracing::info!("{reason}");
    let code = match &reason {
        ExitReason::GuestShutdown | ExitReason::Stopped | ExitReason::Saved => ExitCode::SUCCESS,
        ExitReason::GuestPanic { .. }
        | ExitReason::KvmFailed { .. }
        | ExitReason::TemplateRefused { .. }
        | ExitReason::VmmFailed { .. } => ExitCode::FAILURE,
    };
    events.send(&Event::Exited(reason));
    code
}
