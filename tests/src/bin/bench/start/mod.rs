//! Starts side by side: a template's clone, a cold boot, QEMU's microvm, runc; interleaved, so that
//! whatever else the machine does hits all of them alike.

pub mod marks;
pub mod qemu;
mod report;
pub mod runc;
mod shim;
mod vmm;

use crate::host::{self, Machine};
use crate::pod;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context as _, Result};
use bulkhead_tests::figures::{Sample, Samples, Subject};
use bulkhead_tests::perf::Watch;
use bulkhead_tests::shim::Bundle;
use marks::Marks;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench start\n  \
    scripts/dev bench start --json >start.json\n  \
    scripts/dev bench start --runs 3 --only cold,qemu_microvm")]
pub struct Arguments {
    /// Print JSON: medians by subject, their quartiles, and what was compared.
    #[arg(long)]
    json: bool,
    /// How often each is started.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Only these, by their names in the JSON.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Subject>,
    /// Longest that one boot may take, in seconds.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
}

/// In each round, how many starts end at the first guest instruction: they take milliseconds, and
/// with them the quartiles of the VMMs' own part rest on more than a few values.
const SHORT_STARTS: u32 = 4;

/// What all measurements share.
pub struct Context {
    artifacts: Artifacts,
    marks: Marks,
    kvm: KvmKind,
    boot_limit: Duration,
}

impl Context {
    /// Watches a held process and what it will start; `None` where the host doesn't allow it.
    fn watch(&self, pid: u32) -> Option<Watch> {
        match Watch::start(pid, &self.marks.addresses()) {
            Ok(watch) => Some(watch),
            Err(error) => {
                eprintln!("some times can't be told here: {error}");
                None
            }
        }
    }

    /// An instruction count, if it means anything: elsewhere KVM emulates a few instructions only.
    fn counted(&self, instructions: Option<u64>) -> Option<u64> {
        instructions.filter(|_| self.kvm == KvmKind::Emulated)
    }
}

/// A subject that can be started here, with what its starts need.
enum Contender {
    Cold { bundle: Bundle },
    Template { bundle: Bundle },
    Qemu,
    Runc { bundle: Bundle },
}

impl Contender {
    /// `None` where it can't be started; says why.
    fn prepare(subject: Subject, context: &Context) -> Result<Option<Self>> {
        let artifacts = &context.artifacts;
        let missing = |program: &str| {
            let missing = !Path::new(program).exists();
            if missing {
                eprintln!("{} is left out: {program} is missing", subject.name());
            }
            missing
        };
        Ok(match subject {
            Subject::Template => {
                pod::warm_up(artifacts)?;
                let settings = pod::settings(false)?;
                let bundle = pod::greeting_bundle(artifacts, "bench-template", &settings)?;
                Some(Self::Template { bundle })
            }
            Subject::Cold => {
                let settings = pod::settings(true)?;
                let bundle = pod::greeting_bundle(artifacts, "bench-cold", &settings)?;
                Some(Self::Cold { bundle })
            }
            Subject::QemuMicrovm if missing(qemu::PROGRAM) => None,
            Subject::QemuMicrovm => Some(Self::Qemu),
            Subject::Runc if missing(runc::PROGRAM) => None,
            Subject::Runc => {
                let bundle = pod::greeting_bundle(artifacts, "bench-runc", "")?;
                runc::set_cgroup(&bundle)?;
                Some(Self::Runc { bundle })
            }
        })
    }

    /// One start up to the first guest instruction; `None` for what has no guest.
    fn start_short(&self, context: &Context) -> Option<Result<Sample>> {
        match self {
            Self::Cold { .. } => Some(vmm::short(context, None)),
            Self::Template { .. } => {
                let started =
                    pod::saved_machine().and_then(|saved| vmm::short(context, Some(saved)));
                Some(started)
            }
            Self::Qemu => Some(qemu::short(context)),
            Self::Runc { .. } => None,
        }
    }

    fn start(&self, context: &Context) -> Result<Sample> {
        match self {
            Self::Cold { bundle } => {
                let mut sample = vmm::cold(context)?;
                sample.extend(shim::container(context, bundle, true)?);
                Ok(sample)
            }
            Self::Template { bundle } => {
                let mut sample = vmm::template(context)?;
                sample.extend(shim::container(context, bundle, false)?);
                Ok(sample)
            }
            Self::Qemu => qemu::boot(context),
            Self::Runc { bundle } => runc::container(context, bundle),
        }
    }
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When it can't begin, or a start failed; the figures of the others are printed before.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let context = Context {
        artifacts: artifacts.clone(),
        marks: Marks::find(artifacts),
        kvm: host::kvm_kind(artifacts)?,
        boot_limit: Duration::from_secs(arguments.timeout),
    };
    let machine = Machine::look(artifacts)?;
    read_ahead(artifacts)?;
    let wanted = |subject: &Subject| arguments.only.is_empty() || arguments.only.contains(subject);
    let mut contenders = Vec::new();
    for subject in Subject::ALL.into_iter().filter(wanted) {
        if let Some(contender) = Contender::prepare(subject, &context)? {
            contenders.push((subject, contender));
        }
    }
    let mut all: BTreeMap<Subject, Samples> = BTreeMap::new();
    for round in 1..=arguments.runs {
        eprintln!("round {round} of {}", arguments.runs);
        run_round(&context, &contenders, &mut all);
        // Nobody always comes after the same other.
        if !contenders.is_empty() {
            contenders.rotate_left(1);
        }
    }
    let result = report::Report {
        kvm: context.kvm,
        machine,
        rounds: arguments.runs,
        all,
    };
    result.print(arguments.json)
}

/// Starts each once in full, and before that several times up to the first guest instruction.
fn run_round(
    context: &Context,
    contenders: &[(Subject, Contender)],
    all: &mut BTreeMap<Subject, Samples>,
) {
    let told = |subject: &Subject, started: &Result<Sample>| {
        if let Err(error) = started {
            eprintln!("{} failed: {error}", subject.name());
        }
    };
    for _ in 0..SHORT_STARTS {
        for (subject, contender) in contenders {
            if let Some(started) = contender.start_short(context) {
                told(subject, &started);
                all.entry(*subject).or_default().add_short(started);
            }
        }
    }
    for (subject, contender) in contenders {
        eprintln!("    {}", subject.name());
        let started = contender.start(context);
        told(subject, &started);
        all.entry(*subject).or_default().add(started);
    }
}

/// Reads what will be started once, so that no start waits for the disk.
fn read_ahead(artifacts: &Artifacts) -> Result<()> {
    let files = [
        artifacts.kernel(),
        artifacts.rootfs(),
        artifacts.program("bulkhead-vmm"),
        artifacts.program("containerd-shim-bulkhead-v2"),
    ];
    for file in files {
        let mut opened =
            std::fs::File::open(&file).context(|| format!("open {}", file.display()))?;
        std::io::copy(&mut opened, &mut std::io::sink())
            .context(|| format!("read {}", file.display()))?;
    }
    Ok(())
}
