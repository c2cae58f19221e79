//! TCP between a guest and its host: throughput by iperf3, and how long a small message and its
//! answer take; in guests of Bulkhead's and QEMU's, interleaved, and in a container of runc's.

mod link;

use crate::guests::placement::{self, Placement};
use crate::guests::report::{Figure, Report, Row, Sample, figure};
use crate::guests::{
    Card, Counts, Devices, Guest, Room, Subject, Window, progress, runc, subjects,
};
use crate::host::Machine;
use crate::profile::{self, Symbols};
use bulkhead_proto::guest::TCP_SEGMENTS;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::iperf;
use bulkhead_tests::stats::Quartiles;
use link::{ECHO_PORT, GUEST, HOST, Link, NAMESPACE, PAIR_HOST, TAP};
use std::time::{Duration, Instant};

/// What can be said on the command line.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    scripts/dev bench net\n  \
    scripts/dev bench net --json >net.json\n  \
    scripts/dev bench net --runs 1 --only bulkhead --vcpus 2\n  \
    scripts/dev bench net --profile --only bulkhead,qemu_microvm")]
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
    /// Print which guest kernel functions the instructions of each case go to, and measure nothing.
    #[arg(long)]
    profile: bool,
    /// vCPUs of each guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    vcpus: u8,
    /// Pairs of queues of its card; one for each vCPU unless given.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    pairs: Option<u8>,
    /// How much TCP carries each way, in MiB.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    mib: u32,
    /// Longest that one boot or one case may take, in seconds.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
}

const MIB: f64 = 1_048_576.0;
/// Bytes of a small message.
const MESSAGE: u32 = 64;
/// Messages that are answered.
const ROUNDS: u32 = 50;
/// The same under runc.
const RUNC_ROUNDS: u32 = 2000;
/// Every how many instructions a sample is taken. A prime, so as not to keep step with loops.
const PROFILE_PERIOD: u64 = 101;

const RATE: Figure = figure("mib_per_s", "MiB a second, as iperf3 says", 2, false);
const ROUND: Figure = figure(
    "round_trip_us",
    "microseconds from a message's sending to its answer, median",
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
    "instructions_per_frame",
    "guest kernel instructions a frame, of both directions",
    0,
    false,
);
const INSTRUCTIONS_ROUND: Figure = figure(
    "instructions_per_round",
    "guest kernel instructions a message and its answer",
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
    "exits_per_frame",
    "returns of KVM to the monitor, a frame of both directions, but for accesses to ports",
    2,
    false,
);
const EXITS_ROUND: Figure = figure(
    "exits_per_round",
    "returns of KVM to the monitor, a message and its answer, but for accesses to ports",
    2,
    true,
);
const PORT_EXITS: Figure = figure(
    "port_exits_per_frame",
    "returns of KVM for accesses to ports, a frame: Bulkhead saves and loads registers there for a \
     guest kernel that is emulated, which QEMU leaves undone",
    2,
    false,
);
const FRAMES: Figure = figure(
    "frames_per_mib",
    "frames a MiB, of both directions; one whose segmentation is left to others is one",
    1,
    false,
);
const DEVICE: Figure = figure(
    "device_cpu_ms_per_mib",
    "milliseconds of CPU time on the host a MiB of all threads that run no vCPU",
    3,
    true,
);
const DEVICE_ROUND: Figure = figure(
    "device_cpu_us_per_round",
    "microseconds of CPU time on the host a message and its answer, of the same threads",
    1,
    true,
);
const VCPU: Figure = figure(
    "vcpu_cpu_ms_per_mib",
    "milliseconds of CPU time on the host a MiB of the threads that run vCPUs",
    1,
    false,
);
const FIGURES: [Figure; 13] = [
    RATE,
    ROUND,
    INSTRUCTIONS,
    INSTRUCTIONS_EACH,
    INSTRUCTIONS_ROUND,
    EXITS,
    EXITS_EACH,
    EXITS_ROUND,
    PORT_EXITS,
    FRAMES,
    DEVICE,
    DEVICE_ROUND,
    VCPU,
];

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    ToHost,
    ToGuest,
    PingPong,
}

impl Case {
    const ALL: [Self; 3] = [Self::ToHost, Self::ToGuest, Self::PingPong];

    fn name(self) -> &'static str {
        match self {
            Self::ToHost => "tcp_to_host",
            Self::ToGuest => "tcp_to_guest",
            Self::PingPong => "tcp_ping_pong",
        }
    }

    fn meaning(self, mib: u32) -> String {
        match self {
            Self::ToHost => format!("{mib} MiB by one TCP stream from the guest"),
            Self::ToGuest => format!("{mib} MiB by one TCP stream to the guest"),
            Self::PingPong => format!(
                "{ROUNDS} messages of {MESSAGE} bytes over TCP, each sent when the last was answered"
            ),
        }
    }

    /// The command, after the program, that does it in a machine whose host is at `host`.
    fn words(self, host: &str, amount: Amount) -> Vec<String> {
        let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let (length, limit) = match amount {
            Amount::Nothing => ("4K", ["--bytes".to_owned(), "4K".to_owned()]),
            Amount::Mib(mib) => ("128K", ["--bytes".to_owned(), format!("{mib}M")]),
            Amount::Second => ("128K", ["--time".to_owned(), "1".to_owned()]),
        };
        let mut words: Vec<String> =
            own(&["iperf3", "--client", host, "--json", "--length", length]);
        words.extend(limit);
        match self {
            Self::ToHost => words,
            Self::ToGuest => {
                words.push("--reverse".into());
                words
            }
            Self::PingPong => {
                let rounds = match amount {
                    Amount::Nothing => 1,
                    Amount::Mib(_) => ROUNDS,
                    Amount::Second => RUNC_ROUNDS,
                };
                vec![
                    "ping-pong".into(),
                    format!("{host}:{ECHO_PORT}"),
                    MESSAGE.to_string(),
                    rounds.to_string(),
                ]
            }
        }
    }
}

/// How much of a case is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Amount {
    /// As little as can be: what the program costs by itself.
    Nothing,
    /// So many MiB.
    Mib(u32),
    /// As much as goes in a second.
    Second,
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When it can't begin, or something failed; the figures of the rest are printed before.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let limit = Duration::from_secs(arguments.timeout);
    let room = Room::new(artifacts, limit, arguments.vcpus)?;
    let machine = Machine::look(artifacts)?;
    let mut bench = Bench {
        link: Link::new(room.placement.as_ref())?,
        room,
        subjects: subjects(&arguments.only),
        pairs: arguments.pairs.unwrap_or(arguments.vcpus),
        mib: arguments.mib,
        rows: Case::ALL
            .map(|case| Row::new(case.name(), case.meaning(arguments.mib), true))
            .into(),
        failures: Vec::new(),
    };
    if arguments.profile {
        return bench.profile();
    }
    if bench.subjects.contains(&Subject::Runc) {
        bench.link.make_pair()?;
    }
    for round in 1..=arguments.runs {
        eprintln!("round {round} of {}", arguments.runs);
        for subject in bench.subjects.clone() {
            eprintln!("    {}", subject.name());
            let begin = Instant::now();
            let done = match subject {
                Subject::Runc => bench.measure_runc(),
                _ => bench.measure(subject),
            };
            if let Err(error) = done {
                eprintln!("{} failed: {error}", subject.name());
                bench.failures.push(format!("{}: {error}", subject.name()));
            }
            progress(subject.name(), begin);
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
        rows: bench.rows,
        notes: notes(arguments, bench.pairs, bench.room.placement.as_ref()),
        repeat: format!(
            "scripts/dev bench net --runs {} --vcpus {} --pairs {} --mib {}",
            arguments.runs, arguments.vcpus, bench.pairs, arguments.mib
        ),
        failures: bench.failures,
    };
    report.print(arguments.json)
}

struct Bench {
    link: Link,
    room: Room,
    subjects: Vec<Subject>,
    /// Of queues.
    pairs: u8,
    mib: u32,
    /// One for each case.
    rows: Vec<Row>,
    failures: Vec<String>,
}

impl Bench {
    fn boot(&self, subject: Subject) -> Result<Measured> {
        self.link.renew_tap(self.pairs > 1)?;
        let devices = Devices {
            card: Some(Card {
                tap: TAP.into(),
                pairs: self.pairs,
            }),
            ..Devices::default()
        };
        let mut guest = Guest::boot(&self.room, subject, &devices)?;
        guest.call(&["write", "/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"])?;
        // As Bulkhead's agent does.
        if self.room.kvm == KvmKind::Emulated {
            guest.call(&["write", TCP_SEGMENTS.0, TCP_SEGMENTS.1])?;
        }
        for words in [
            "link set lo up",
            &format!("address add {GUEST}/24 dev eth0"),
            "link set eth0 up",
        ] {
            let mut call = vec!["run", "/bin/busybox", "ip"];
            call.extend(words.split(' '));
            guest.call(&call)?;
        }
        Ok(Measured { guest })
    }

    fn measure(&mut self, subject: Subject) -> Result<()> {
        let begin = Instant::now();
        let mut measured = self.boot(subject)?;
        progress("boot", begin);
        for (case, row) in Case::ALL.into_iter().zip(&mut self.rows) {
            let begin = Instant::now();
            // Each once for its pages, and once for its cost: QEMU asks for huge ones for its guest's
            // memory, and we don't, so what touches much for the first time costs us more.
            measured.run(case, Amount::Mib(self.mib), None)?;
            measured.run(case, Amount::Nothing, None)?;
            let nothing = measured.run(case, Amount::Nothing, None)?;
            progress("nothing", begin);
            let begin = Instant::now();
            let all = measured.run(case, Amount::Mib(self.mib), None)?;
            row.add(subject, sample(case, &all, &nothing)?);
            progress(case.name(), begin);
        }
        Ok(())
    }

    fn measure_runc(&mut self) -> Result<()> {
        for (case, row) in Case::ALL.into_iter().zip(&mut self.rows) {
            let mut words = case.words(PAIR_HOST, Amount::Second);
            if case == Case::PingPong {
                words.insert(0, "bench-guest".into());
            }
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let output = runc::run(&self.room.artifacts, &words, |spec| {
                let namespaces = spec["linux"]["namespaces"].as_array_mut();
                for namespace in namespaces.into_iter().flatten() {
                    if namespace["type"] == "network" {
                        namespace["path"] = format!("/run/netns/{NAMESPACE}").into();
                    }
                }
            })?;
            row.add(Subject::Runc, rates(case, &output)?);
        }
        Ok(())
    }

    fn profile(&self) -> Result<()> {
        let symbols = Symbols::read(&self.room.artifacts)?;
        for subject in &self.subjects {
            if *subject == Subject::Runc {
                continue;
            }
            let mut measured = self.boot(*subject)?;
            for case in Case::ALL {
                measured.run(case, Amount::Nothing, None)?;
                for (amount, what) in [(Amount::Nothing, "nothing"), (Amount::Mib(self.mib), "all")]
                {
                    let ran = measured.run(case, amount, Some(PROFILE_PERIOD))?;
                    println!(
                        "\n{} ({what}), {}: {:?}, {} frames",
                        case.name(),
                        subject.name(),
                        ran.window.counts,
                        ran.frames
                    );
                    profile::print_functions(&symbols, &ran.window.by_address);
                }
            }
        }
        Ok(())
    }
}

/// A guest whose card is up.
struct Measured {
    guest: Guest,
}

/// What a command has done.
struct Ran {
    output: String,
    window: Window,
    frames: u64,
}

impl Measured {
    fn run(&mut self, case: Case, amount: Amount, period: Option<u64>) -> Result<Ran> {
        let mut words = case.words(HOST, amount);
        if case != Case::PingPong {
            words[0] = "/bin/iperf3".into();
            words.insert(0, "run".into());
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let before = link::frames()?;
        let (output, mut windows) = self.guest.call_marked(&words, 0, period)?;
        Ok(Ran {
            output,
            window: windows.pop().unwrap_or_default(),
            frames: link::frames()? - before,
        })
    }
}

/// What it tells by itself.
fn rates(case: Case, output: &str) -> Result<Sample> {
    if case != Case::PingPong {
        let carried = iperf::parse(output)?;
        let rate = (carried.seconds > 0.0).then(|| carried.bytes as f64 / MIB / carried.seconds);
        return Ok(vec![(&RATE, rate)]);
    }
    Ok(vec![(&ROUND, Some(median_round(output)?))])
}

/// The median of the microseconds that a ping-pong prints.
fn median_round(output: &str) -> Result<f64> {
    let rounds: std::result::Result<Vec<f64>, _> =
        output.split_whitespace().map(str::parse::<f64>).collect();
    rounds
        .ok()
        .and_then(|rounds| Some(Quartiles::of(&rounds)?.median))
        .ok_or_else(|| Error::Unexpected(format!("not a ping-pong's times: {output:?}")))
}

fn sample(case: Case, all: &Ran, nothing: &Ran) -> Result<Sample> {
    let counts: Counts = all.window.counts - nothing.window.counts;
    let frames = all.frames.saturating_sub(nothing.frames) as f64;
    let by = |count: Option<u64>, units: f64| {
        count
            .filter(|_| units > 0.0)
            .map(|count| count as f64 / units)
    };
    let mut sample = rates(case, &all.output)?;
    sample.extend([
        (&INSTRUCTIONS_EACH, by(counts.instructions, frames)),
        (&EXITS_EACH, by(counts.exits, frames)),
        (&PORT_EXITS, by(counts.port_exits, frames)),
    ]);
    if case == Case::PingPong {
        let rounds = f64::from(ROUNDS - 1);
        sample.extend([
            (&INSTRUCTIONS_ROUND, by(counts.instructions, rounds)),
            (&EXITS_ROUND, by(counts.exits, rounds)),
            (&DEVICE_ROUND, by(Some(counts.device_ns), rounds * 1e3)),
        ]);
    } else {
        let bytes = iperf::parse(&all.output)?.bytes - iperf::parse(&nothing.output)?.bytes;
        let mib = bytes as f64 / MIB;
        sample.extend([
            (&INSTRUCTIONS, by(counts.instructions, mib)),
            (&EXITS, by(counts.exits, mib)),
            (&FRAMES, Some(frames / mib)),
            (&DEVICE, by(Some(counts.device_ns), mib * 1e6)),
            (&VCPU, by(Some(counts.vcpu_ns), mib * 1e6)),
        ]);
    }
    Ok(sample)
}

fn notes(arguments: &Arguments, pairs: u8, placement: Option<&Placement>) -> Vec<String> {
    vec![
        format!(
            "Both virtual machines: {} vCPU, {} MiB, the same guest kernel, root image and kernel \
             parameters but for the devices; a tap device of the same kind, with {} pair(s) of queues, in \
             a network namespace in which iperf3's server runs, with the congestion control `reno` whatever the \
             host has.",
            arguments.vcpus,
            crate::guests::MEMORY_MIB,
            pairs,
        ),
        "QEMU: its microvm machine, virtio 1 over MMIO with QEMU's defaults (offloads, mergeable buffers, \
         event indices, indirect descriptors), without vhost."
            .to_owned(),
        "Counts are those of a whole run of a program less those of one that carries 4 KiB, or one \
         message, in the same guest just before: its start and its connections are in both. Both have run \
         once before, for the guest's pages."
            .to_owned(),
        "Device CPU time: of all threads that run no vCPU, user and kernel mode together, the host's TCP \
         included as far as it runs on their behalf; it leaves out what a vCPU's thread does itself for an \
         exit, of which the number of exits tells."
            .to_owned(),
        placement::note(placement),
        "runc: the same programs in a network namespace behind a pair of virtual devices, for a second \
         each, or 2,000 messages."
            .to_owned(),
    ]
}
