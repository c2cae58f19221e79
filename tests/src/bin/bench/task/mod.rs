//! The life of one more container in a pod that runs: create, start, exec, kill, delete; and the
//! same in a pod of runc's.

mod bulkhead;
mod report;
mod runc;

use crate::host::{self, Machine};
use crate::pod;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::stats::Quartiles;
use std::collections::BTreeMap;
use std::path::Path;

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench task\n  \
    scripts/dev bench task --json\n  \
    scripts/dev bench task --runs 3 --containers 4")]
pub struct Arguments {
    /// Print JSON: medians under `bulkhead` and `runc`, and what was compared.
    #[arg(long)]
    json: bool,
    /// How many containers' lives are timed; a third of them, at least 3, are counted besides.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many further containers at once tell what one more costs the shim.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    containers: u32,
    /// Boot the VM instead of starting it from the template.
    #[arg(long)]
    cold: bool,
}

/// A figure of one container's life; each has its key in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Figure {
    /// Milliseconds of Create; runc: `runc create`.
    CreateMs,
    /// Milliseconds of Start; runc: `runc start`.
    StartMs,
    /// Milliseconds of an exec of `true`: Exec, Start, Wait and Delete; runc: `runc exec`.
    ExecMs,
    /// Milliseconds from Kill with SIGKILL to Wait's answer; runc: `runc kill` to the process's end.
    KillMs,
    /// Milliseconds of Delete; runc: `runc delete`.
    DeleteMs,
    /// Guest kernel instructions from Create to the container's first instruction.
    CreateToExecInstructions,
    /// Guest kernel instructions from Exec to its program's first instruction.
    ExecInstructions,
    /// Guest kernel instructions of the whole exec of `true`, to Delete's answer.
    ExecToEndInstructions,
    /// Guest kernel instructions from Kill to Wait's answer.
    KillInstructions,
    /// Guest kernel instructions of Delete.
    DeleteInstructions,
    /// The shim's private memory in KiB with one pod of one container.
    ShimPrivateKib,
    /// KiB by which it grows with each further container.
    ShimPrivateKibPerContainer,
}

impl Figure {
    /// In the order of the output.
    const ALL: [Self; 12] = [
        Self::CreateMs,
        Self::StartMs,
        Self::ExecMs,
        Self::KillMs,
        Self::DeleteMs,
        Self::CreateToExecInstructions,
        Self::ExecInstructions,
        Self::ExecToEndInstructions,
        Self::KillInstructions,
        Self::DeleteInstructions,
        Self::ShimPrivateKib,
        Self::ShimPrivateKibPerContainer,
    ];

    fn key(self) -> &'static str {
        match self {
            Self::CreateMs => "create_ms",
            Self::StartMs => "start_ms",
            Self::ExecMs => "exec_ms",
            Self::KillMs => "kill_ms",
            Self::DeleteMs => "delete_ms",
            Self::CreateToExecInstructions => "create_to_exec_instructions",
            Self::ExecInstructions => "exec_instructions",
            Self::ExecToEndInstructions => "exec_to_end_instructions",
            Self::KillInstructions => "kill_instructions",
            Self::DeleteInstructions => "delete_instructions",
            Self::ShimPrivateKib => "shim_private_kib",
            Self::ShimPrivateKibPerContainer => "shim_private_kib_per_container",
        }
    }

    /// What the project allows itself.
    fn bound(self) -> Option<f64> {
        match self {
            Self::CreateToExecInstructions => Some(3e6),
            Self::ExecInstructions => Some(1e6),
            Self::ShimPrivateKib => Some(12.0 * 1024.0),
            Self::ShimPrivateKibPerContainer => Some(1024.0),
            _ => None,
        }
    }

    fn digits(self) -> u32 {
        if self.key().ends_with("_ms") { 2 } else { 0 }
    }
}

/// Values of one subject, by figure.
#[derive(Debug, Default)]
pub struct Values(BTreeMap<Figure, Vec<f64>>);

impl Values {
    fn add(&mut self, figure: Figure, value: f64) {
        self.0.entry(figure).or_default().push(value);
    }

    fn quartiles(&self, figure: Figure) -> Option<Quartiles> {
        Some(Quartiles::of(self.0.get(&figure)?)?.rounded(figure.digits()))
    }
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When it can't begin, or a container fails.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let kvm = host::kvm_kind(artifacts)?;
    let machine = Machine::look(artifacts)?;
    let settings = pod::settings(arguments.cold)?;
    if !arguments.cold {
        pod::warm_up(artifacts)?;
    }
    let bundle = bulkhead::sandbox(artifacts, &settings)?;
    let ours = bulkhead::Pod::start(artifacts, &bundle, &settings)?;
    let theirs = match Path::new(crate::start::runc::PROGRAM).exists() {
        true => Some(runc::Pod::start(artifacts)?),
        false => {
            eprintln!(
                "runc is left out: {} is missing",
                crate::start::runc::PROGRAM
            );
            None
        }
    };
    let mut bulkhead = Values::default();
    let mut runc = Values::default();
    // The first one of a pod finds what the template has made ahead, so it would tell too little.
    ours.life(&mut Values::default())?;
    for round in 1..=arguments.runs {
        eprintln!("container {round} of {}", arguments.runs);
        ours.life(&mut bulkhead)?;
        if let Some(theirs) = &theirs {
            theirs.life(&mut runc)?;
        }
    }
    if kvm == KvmKind::Emulated {
        eprintln!("counting guest instructions");
        for _ in 0..(arguments.runs / 3).max(3) {
            ours.count(&mut bulkhead)?;
        }
    }
    eprintln!("{} containers at once", arguments.containers);
    ours.weigh(arguments.containers, &mut bulkhead)?;
    ours.end()?;
    report::Report {
        bulkhead,
        runc: theirs.map(|_| runc),
        kvm,
        machine,
        arguments: format!(
            "scripts/dev bench task --runs {} --containers {}{}",
            arguments.runs,
            arguments.containers,
            if arguments.cold { " --cold" } else { "" }
        ),
    }
    .print(arguments.json);
    Ok(())
}

/// A failure of something that should have exited with 0.
fn expect_status(what: &str, found: u32, wanted: u32) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::Unexpected(format!(
        "{what} ended with status {found} instead of {wanted}"
    )))
}
