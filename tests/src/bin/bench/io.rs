//! Reads and writes by fio: on a disk, on the EROFS root, on virtio-fs; in guests of Bulkhead's and
//! QEMU's, interleaved, and on the host under runc.

use crate::guests::placement::{self, Placement};
use crate::guests::report::{Figure, Report, Row, Sample, figure};
use crate::guests::{
    Counts, DATA_SERIAL, Devices, Guest, Room, Subject, Window, progress, runc, subjects,
};
use crate::host::Machine;
use crate::profile::{self, Symbols};
use bulkhead_bench_guest::SERIAL;
use bulkhead_proto::guest::SHARE_TAG;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::fio::jobs::{self as cases, Case, FILE_BYTES, Jobs, OPTIONS, Place};
use bulkhead_tests::fio::{self, Transfer};
use serde_json::json;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench io\n  \
    scripts/dev bench io --json >io.json\n  \
    scripts/dev bench io --runs 1 --only bulkhead,qemu_microvm --cases block_\n  \
    scripts/dev bench io --profile --only bulkhead --cases block_random_read")]
pub struct Arguments {
    /// Print JSON: medians by case and subject, quartiles, ratios, and what was compared.
    #[arg(long)]
    json: bool,
    /// How often each case is measured, in a guest of its own each time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Only these, by their names in the JSON.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Subject>,
    /// Only cases whose names contain one of these.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Print which guest kernel functions the instructions of each case go to, and measure nothing.
    #[arg(long)]
    profile: bool,
    /// vCPUs of each guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    vcpus: u8,
    /// Folder for what is read and written; a temporary file system unless given.
    #[arg(long)]
    backing: Option<PathBuf>,
    /// Longest that one boot or one case may take, in seconds.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

const MIB: f64 = 1_048_576.0;

const RATE: Figure = figure("mib_per_s", "MiB a second, as fio says", 2, false);
const REQUESTS: Figure = figure("requests_per_s", "requests a second, as fio says", 1, false);
const LATENCY: Figure = figure(
    "latency_us",
    "microseconds of a request on average, as fio says",
    0,
    false,
);
const INSTRUCTIONS: Figure = figure(
    "instructions_per_mib",
    "guest kernel instructions a MiB",
    0,
    true,
);
const INSTRUCTIONS_EACH: Figure = figure(
    "instructions_per_request",
    "guest kernel instructions a request",
    0,
    true,
);
const EXITS: Figure = figure(
    "exits_per_mib",
    "returns of KVM to the monitor, a MiB, but for accesses to ports",
    1,
    true,
);
const EXITS_EACH: Figure = figure(
    "exits_per_request",
    "returns of KVM to the monitor, a request, but for accesses to ports",
    2,
    true,
);
const PORT_EXITS: Figure = figure(
    "port_exits_per_mib",
    "returns of KVM for accesses to ports, a MiB: Bulkhead saves and loads registers there for a \
     guest kernel that is emulated, which QEMU leaves undone",
    1,
    false,
);
const DEVICE: Figure = figure(
    "device_cpu_ms_per_mib",
    "milliseconds of CPU time on the host a MiB of all threads that run no vCPU",
    3,
    true,
);
const VCPU: Figure = figure(
    "vcpu_cpu_ms_per_mib",
    "milliseconds of CPU time on the host a MiB of the threads that run vCPUs",
    1,
    false,
);
const FIGURES: [Figure; 10] = [
    RATE,
    REQUESTS,
    LATENCY,
    INSTRUCTIONS,
    INSTRUCTIONS_EACH,
    EXITS,
    EXITS_EACH,
    PORT_EXITS,
    DEVICE,
    VCPU,
];

/// Where the guest has fio's jobs.
const JOBS: &str = "/tmp/jobs";

/// Every how many instructions a sample is taken. A prime, so as not to keep step with loops.
const PROFILE_PERIOD: u64 = 101;

/// Seconds for which each case goes on under runc.
const RUNC_SECONDS: u32 = 1;

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When it can't begin, or something failed; the figures of the rest are printed before.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let room = Room::new(
        artifacts,
        Duration::from_secs(arguments.timeout),
        arguments.vcpus,
    )?;
    let machine = Machine::look(artifacts)?;
    let mut bench = Bench::new(room, arguments)?;
    if arguments.profile {
        return bench.profile();
    }
    for round in 1..=arguments.runs {
        eprintln!("round {round} of {}", arguments.runs);
        for subject in bench.subjects.clone() {
            eprintln!("    {}", subject.name());
            bench.measure(subject);
        }
        // Nobody always comes after the same other.
        if !bench.subjects.is_empty() {
            bench.subjects.rotate_left(1);
        }
    }
    let report = Report {
        machine,
        kvm: bench.room.kvm,
        figures: &FIGURES,
        rows: bench.rows.into_iter().map(|(_, row)| row).collect(),
        notes: notes(arguments, bench.room.placement.as_ref()),
        repeat: format!("scripts/dev bench io --runs {}", arguments.runs),
        failures: bench.failures,
    };
    report.print(arguments.json)
}

struct Bench {
    room: Room,
    subjects: Vec<Subject>,
    rows: Vec<(Case, Row)>,
    data: PathBuf,
    failures: Vec<String>,
    _folder: TempDir,
}

impl Bench {
    fn new(room: Room, arguments: &Arguments) -> Result<Self> {
        let wanted = |name: &str| {
            let parts = &arguments.cases;
            parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()))
        };
        let rows: Vec<(Case, Row)> = cases::ALL
            .into_iter()
            .filter(|case| wanted(case.name))
            .map(|case| {
                let row = Row::new(case.name, case.meaning(), case.place != Place::Fs);
                (case, row)
            })
            .collect();
        if rows.is_empty() {
            let names: Vec<&str> = cases::ALL.iter().map(|case| case.name).collect();
            return Err(Error::Unexpected(format!(
                "no case's name contains one of {:?}; there are {}",
                arguments.cases,
                names.join(", ")
            )));
        }
        let folder = match &arguments.backing {
            Some(folder) => TempDir::with_prefix_in("bh-io.", folder),
            None => TempDir::with_prefix("bh-io."),
        };
        let folder = folder.context(|| "make a folder".into())?;
        let data = folder.path().join("data");
        fill(&data)?;
        Ok(Self {
            subjects: subjects(&arguments.only),
            room,
            rows,
            data,
            failures: Vec::new(),
            _folder: folder,
        })
    }

    fn failed(&mut self, what: &str, error: &Error) {
        eprintln!("{what} failed: {error}");
        self.failures.push(format!("{what}: {error}"));
    }

    fn measure(&mut self, subject: Subject) {
        if subject == Subject::Runc {
            self.measure_runc();
            return;
        }
        let begin = Instant::now();
        let mut guest = match self.boot(subject) {
            Ok(guest) => guest,
            Err(error) => return self.failed(subject.name(), &error),
        };
        progress("boot", begin);
        let begin = Instant::now();
        match guest.run(self.rows.iter().map(|(case, _)| case)) {
            Ok(samples) => {
                for ((_, row), sample) in self.rows.iter_mut().zip(samples) {
                    row.add(subject, sample);
                }
            }
            Err(error) => self.failed(subject.name(), &error),
        }
        progress("fio", begin);
    }

    fn boot(&self, subject: Subject) -> Result<Measured> {
        let shared = self.rows.iter().any(|(case, _)| case.place == Place::Fs);
        let devices = Devices {
            data: Some(self.data.clone()),
            shared: shared.then(|| self.data.clone()),
            card: None,
        };
        let mut guest = Guest::boot(&self.room, subject, &devices)?;
        if shared {
            guest.call(&["mount", "virtiofs", SHARE_TAG, "/mnt/share"])?;
        }
        Ok(Measured {
            disk: guest.disk(DATA_SERIAL)?,
            control: guest.disk(SERIAL)?,
            guest,
        })
    }

    fn measure_runc(&mut self) {
        for index in 0..self.rows.len() {
            let case = self.rows[index].0;
            // The host's files are files.
            if case.place == Place::Erofs {
                continue;
            }
            match runc_sample(&self.room.artifacts, &case, &self.data) {
                Ok(sample) => self.rows[index].1.add(Subject::Runc, sample),
                Err(error) => self.failed(&format!("{} under runc", case.name), &error),
            }
        }
    }

    fn profile(&self) -> Result<()> {
        let symbols = Symbols::read(&self.room.artifacts)?;
        for subject in &self.subjects {
            if *subject == Subject::Runc {
                continue;
            }
            let mut measured = self.boot(*subject)?;
            let cases = self.rows.iter().map(|(case, _)| case);
            let jobs = measured.jobs(cases);
            let (_, windows) = measured.fio(&jobs, Some(PROFILE_PERIOD))?;
            // The first is what comes before the first mark.
            for (name, window) in jobs.names.iter().zip(&windows[1..]) {
                println!("\n{name}, {}: {:?}", subject.name(), window.counts);
                profile::print_functions(&symbols, &window.by_address);
            }
        }
        Ok(())
    }
}

/// Bytes of the kind that can't be taken for a hole.
fn fill(path: &Path) -> Result<()> {
    let what = || format!("write {}", path.display());
    let mut file = File::create(path).context(what)?;
    let mut block = vec![0; 1 << 20];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut block))
        .context(|| "read /dev/urandom".into())?;
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&block).context(what)?;
    }
    file.sync_all().context(what)
}

/// A guest that is ready.
struct Measured {
    guest: Guest,
    /// The node of the disk to measure.
    disk: String,
    /// And of that on which marks are made.
    control: String,
}

impl Measured {
    fn jobs<'a>(&self, cases: impl Iterator<Item = &'a Case> + Clone) -> Jobs {
        let file_of = |case: &Case| match case.place {
            Place::Block => self.disk.clone(),
            Place::Erofs => "/data".into(),
            Place::Fs => "/mnt/share/data".into(),
        };
        Jobs::marked(cases, file_of, &self.control)
    }

    fn fio(&mut self, jobs: &Jobs, period: Option<u64>) -> Result<(String, Vec<Window>)> {
        self.guest.call(&["create", JOBS, &jobs.text])?;
        let mut words = vec!["run", "/bin/fio"];
        words.extend(OPTIONS);
        words.push(JOBS);
        self.guest.call_marked(&words, jobs.names.len() + 1, period)
    }

    /// A sample for each case.
    fn run<'a>(&mut self, cases: impl Iterator<Item = &'a Case> + Clone) -> Result<Vec<Sample>> {
        let jobs = self.jobs(cases.clone());
        let (output, windows) = self.fio(&jobs, None)?;
        let transfers: HashMap<String, Transfer> = fio::parse(&output)?.into_iter().collect();
        let counts: HashMap<&str, Counts> = jobs
            .names
            .iter()
            .zip(&windows[1..])
            .map(|(name, window)| (name.as_str(), window.counts))
            .collect();
        let samples = cases.map(|case| {
            let told = transfers.get(case.name).zip(counts.get(case.name));
            let idle = counts.get(cases::idle_name(case).as_str());
            let ((transfer, counts), idle) = told
                .zip(idle)
                .ok_or_else(|| Error::Unexpected(format!("fio says nothing of {}", case.name)))?;
            Ok(sample_of(transfer, *counts - *idle))
        });
        samples.collect()
    }
}

fn sample_of(transfer: &Transfer, counts: Counts) -> Sample {
    let mib = transfer.bytes as f64 / MIB;
    let requests = transfer.requests as f64;
    let by = |count: Option<u64>, units: f64| count.map(|count| count as f64 / units);
    let mut sample = rates(transfer);
    sample.extend([
        (&INSTRUCTIONS, by(counts.instructions, mib)),
        (&INSTRUCTIONS_EACH, by(counts.instructions, requests)),
        (&EXITS, by(counts.exits, mib)),
        (&EXITS_EACH, by(counts.exits, requests)),
        (&PORT_EXITS, by(counts.port_exits, mib)),
        (&DEVICE, by(Some(counts.device_ns), mib * 1e6)),
        (&VCPU, by(Some(counts.vcpu_ns), mib * 1e6)),
    ]);
    sample
}

fn rates(transfer: &Transfer) -> Sample {
    let seconds = transfer.ms / 1000.0;
    let rate = |units: f64| (seconds > 0.0).then(|| units / seconds);
    vec![
        (&RATE, rate(transfer.bytes as f64 / MIB)),
        (&REQUESTS, rate(transfer.requests as f64)),
        (&LATENCY, Some(transfer.latency_us)),
    ]
}

fn runc_sample(artifacts: &Artifacts, case: &Case, data: &Path) -> Result<Sample> {
    let jobs = data.with_file_name("jobs");
    let text = case.timed_job("/bench-data", RUNC_SECONDS);
    std::fs::write(&jobs, text).context(|| format!("write {}", jobs.display()))?;
    let mut words = vec!["fio"];
    words.extend(OPTIONS);
    words.push("/bench-jobs");
    let output = runc::run(artifacts, &words, |spec| {
        let bind = |from: &Path, to: &str| json!({ "destination": to, "type": "bind", "source": from, "options": ["bind", "rw"] });
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.extend([bind(data, "/bench-data"), bind(&jobs, "/bench-jobs")]);
        }
    })?;
    let transfers = fio::parse(&output)?;
    let first = transfers.first();
    first
        .map(|(_, transfer)| rates(transfer))
        .ok_or_else(|| Error::Unexpected("fio says nothing of its job".into()))
}

fn notes(arguments: &Arguments, placement: Option<&Placement>) -> Vec<String> {
    let backing = match &arguments.backing {
        Some(_) => "in the folder that --backing names",
        None => "on a temporary file system, so that the device models are compared and no disk is",
    };
    vec![
        format!(
            "Both virtual machines: {} vCPU, {} MiB, the same guest kernel, root image and kernel \
             parameters but for the devices; the same file {backing}.",
            arguments.vcpus,
            crate::guests::MEMORY_MIB,
        ),
        "QEMU: its microvm machine, virtio 1 over MMIO with QEMU's defaults (event indices, indirect \
         descriptors, write-back through the host's page cache, aio=threads), the queues of its disks \
         served by an I/O thread; virtio-fs by its own virtiofsd, whose CPU time counts as QEMU's."
            .to_owned(),
        "Counts are those between two marks, blocks that fio writes on another disk before and after \
         each job, less those of the same job with fio's null engine, just before: a job's memory, thread \
         and marks are in both."
            .to_owned(),
        placement::note(placement),
        "Device CPU time: of all threads that run no vCPU, user and kernel mode together; it leaves out \
         what a vCPU's thread does itself for an exit, of which the number of exits tells."
            .to_owned(),
        "runc: the same program on the host's kernel, on the same file, for one second each; the file's \
         copy on virtio-fs and the disk's are the same to it."
            .to_owned(),
        "Bounds are for block and EROFS; virtio-fs is there to be seen.".to_owned(),
    ]
}
