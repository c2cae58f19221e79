//! One guest, the same kernel and the same root image, under either virtual machine monitor: what
//! `bench io` and `bench net` measure in.

mod control;
mod counters;
pub mod placement;
mod qemu;
pub mod report;
pub mod runc;
mod vmm;

pub use counters::{Counts, vcpu_threads};

use crate::host;
use bulkhead_bench_guest::{MAX_MARKS, Stage};
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::perf::{EmulateTracepoint, Sampler};
use clap::ValueEnum;
use control::Control;
use counters::Counters;
use placement::Placement;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Memory of each guest in MiB.
pub const MEMORY_MIB: u32 = 256;

/// Serial number of the disk that is measured.
pub const DATA_SERIAL: &str = "bench-data";

/// The address of the guests' network card.
pub const MAC: [u8; 6] = [0x02, 0x42, 0x0a, 0x09, 0, 2];

/// Between two looks at the guest's answer: short against [`bulkhead_bench_guest::REST`].
const PAUSE: Duration = Duration::from_millis(1);

/// Who is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Subject {
    /// Bulkhead's monitor, by its contract.
    Bulkhead,
    /// QEMU's microvm machine.
    QemuMicrovm,
    /// A container on the host's kernel.
    Runc,
}

impl Subject {
    /// All, in the order in which they are printed.
    pub const ALL: [Self; 3] = [Self::Bulkhead, Self::QemuMicrovm, Self::Runc];

    /// As in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead",
            Self::QemuMicrovm => "qemu_microvm",
            Self::Runc => "runc",
        }
    }
}

/// What all measurements share.
pub struct Room {
    /// What was built.
    pub artifacts: Artifacts,
    /// How guest kernel mode runs.
    pub kvm: KvmKind,
    /// Longest that a boot or a command may take.
    pub limit: Duration,
    /// vCPUs of each guest.
    pub vcpus: u8,
    /// Where the monitors' threads run; none if the scheduler decides.
    pub placement: Option<Placement>,
}

impl Room {
    /// Looks at the host.
    ///
    /// # Errors
    /// When the root image is missing, or no guest runs here.
    pub fn new(artifacts: &Artifacts, limit: Duration, vcpus: u8) -> Result<Self> {
        for file in [artifacts.bench_rootfs(), artifacts.fio()] {
            std::fs::metadata(&file)
                .context(|| format!("look at {} (scripts/dev bench makes it)", file.display()))?;
        }
        let placement = Placement::of_host(vcpus)?;
        if let Some(placement) = &placement {
            placement.put_ourselves()?;
        }
        Ok(Self {
            kvm: host::kvm_kind(artifacts)?,
            artifacts: artifacts.clone(),
            limit,
            vcpus,
            placement,
        })
    }
}

/// What a guest has besides its root.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    /// A raw file to measure on, as the disk [`DATA_SERIAL`].
    pub data: Option<PathBuf>,
    /// A file to be copied into the shared folder, as `data`.
    pub shared: Option<PathBuf>,
    /// A network card.
    pub card: Option<Card>,
}

/// A network card over a tap device.
#[derive(Debug, Clone)]
pub struct Card {
    /// Name of the tap device.
    pub tap: String,
    /// Pairs of queues.
    pub pairs: u8,
}

/// Either monitor.
trait Monitor {
    /// Its process.
    fn pid(&self) -> u32;
    /// Processes that work for it.
    fn helpers(&self) -> Vec<u32>;
    /// Lets it begin.
    fn begin(&mut self) -> Result<()>;
    /// What the guest has to be told of before it has all its devices: a command.
    fn announce(&mut self) -> Result<Option<Vec<String>>>;
    /// An error once it has ended, with its last words.
    fn check(&mut self) -> Result<()>;
}

/// A running guest. Dropping it ends it.
pub struct Guest {
    // Ends before its folder goes.
    monitor: Box<dyn Monitor>,
    counters: Counters,
    control: Control,
    placement: Option<Placement>,
    limit: Duration,
    _folder: TempDir,
}

impl Guest {
    /// Boots one and waits until it takes commands.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn boot(room: &Room, subject: Subject, devices: &Devices) -> Result<Self> {
        let folder = TempDir::with_prefix("bh-guest.").context(|| "make a folder".into())?;
        let control = Control::create(folder.path())?;
        let mut monitor: Box<dyn Monitor> = match subject {
            Subject::Bulkhead => Box::new(vmm::Vmm::prepare(room, devices, control.path())?),
            _ => Box::new(qemu::Qemu::prepare(
                room,
                devices,
                control.path(),
                folder.path(),
            )?),
        };
        let counters = Counters::attach(monitor.pid(), &monitor.helpers(), room.kvm);
        monitor.begin()?;
        let mut guest = Self {
            monitor,
            counters,
            control,
            placement: room.placement.clone(),
            limit: room.limit,
            _folder: folder,
        };
        if let Some(words) = guest.monitor.announce()? {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            guest.call(&words)?;
        }
        Ok(guest)
    }

    /// Has the guest do something; see the table in `tests/bench-guest/src/main.rs`.
    ///
    /// # Errors
    /// When it can't, or not in time.
    pub fn call(&mut self, words: &[&str]) -> Result<String> {
        Ok(self.call_marked(words, 0, None)?.0)
    }

    /// The same, for a program that makes so many marks, one after the other. Returns its output and
    /// what was between them; before the first and after the last one, too. With a period every so
    /// many instructions are looked at.
    ///
    /// # Errors
    /// When it can't, or not in time, or a mark is missing.
    pub fn call_marked(
        &mut self,
        words: &[&str],
        marks: usize,
        period: Option<u64>,
    ) -> Result<(String, Vec<Window>)> {
        let end = Instant::now() + self.limit;
        self.control.clear_marks()?;
        self.control.send(words)?;
        self.wait(end, |_| true, |_| Ok(()))?;
        // By now the monitor has all its threads: before, they would take after the one that starts
        // them.
        if let Some(placement) = &self.placement {
            placement.apply(self.monitor.pid(), &self.monitor.helpers())?;
        }
        let mut windows = Windows::begin(&self.counters, self.monitor.pid(), period)?;
        let ended = |stage| stage != Stage::Begun;
        self.wait(end, ended, |guest| {
            windows.look(&guest.counters, &guest.control)
        })?;
        windows.look(&self.counters, &self.control)?;
        let windows = windows.end(&self.counters)?;
        let last = |stage| matches!(stage, Stage::Done(_));
        let stage = self.wait(end, last, |_| Ok(()))?;
        let output = self.control.output(stage)?;
        if windows.len() != marks + 1 {
            let message = format!("{} marks instead of {marks}", windows.len() - 1);
            return Err(Error::Unexpected(message));
        }
        Ok((output, windows))
    }

    /// Waits until the last command is as far as `wanted` says; looks at what `meanwhile` says again
    /// and again.
    fn wait(
        &mut self,
        end: Instant,
        wanted: impl Fn(Stage) -> bool,
        mut meanwhile: impl FnMut(&Self) -> Result<()>,
    ) -> Result<Stage> {
        let mut looks: u32 = 0;
        loop {
            match self.control.stage()? {
                Some(stage @ Stage::Failed(_)) => return Ok(stage),
                Some(stage) if wanted(stage) => return Ok(stage),
                _ => {}
            }
            meanwhile(self)?;
            looks += 1;
            // Whether it's still there takes system calls.
            if looks.is_multiple_of(100) {
                self.monitor.check()?;
            }
            if Instant::now() > end {
                return Err(Error::TimedOut {
                    what: "the guest's answer".into(),
                    seconds: self.limit.as_secs(),
                    detail: "; raise --timeout".into(),
                });
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// The node of the disk with this serial number.
    ///
    /// # Errors
    /// When there is none.
    pub fn disk(&mut self, serial: &str) -> Result<String> {
        self.call(&["disk", serial])
    }
}

/// What was done between two marks.
#[derive(Debug, Default)]
pub struct Window {
    /// What it cost.
    pub counts: Counts,
    /// How many sampled instructions were at which address.
    pub by_address: HashMap<u64, u64>,
}

/// Those of a command under way.
struct Windows {
    samplers: Vec<Sampler>,
    ended: Vec<Window>,
    by_address: HashMap<u64, u64>,
    before: Counts,
}

impl Windows {
    fn begin(counters: &Counters, pid: u32, period: Option<u64>) -> Result<Self> {
        let samplers = match period {
            None => Vec::new(),
            Some(period) => {
                let tracepoint = EmulateTracepoint::find()?;
                let threads = vcpu_threads(pid)?;
                let sample = |thread| tracepoint.sample(thread, period);
                threads.into_iter().map(sample).collect::<Result<_>>()?
            }
        };
        Ok(Self {
            samplers,
            ended: Vec::new(),
            by_address: HashMap::new(),
            before: counters.read()?,
        })
    }

    fn look(&mut self, counters: &Counters, control: &Control) -> Result<()> {
        for sampler in &mut self.samplers {
            sampler.drain(&mut self.by_address);
        }
        let next = self.ended.len();
        if next < MAX_MARKS && control.marked(next)? {
            self.next(counters)?;
        }
        Ok(())
    }

    fn next(&mut self, counters: &Counters) -> Result<()> {
        let now = counters.read()?;
        self.ended.push(Window {
            counts: now - self.before,
            by_address: std::mem::take(&mut self.by_address),
        });
        self.before = now;
        Ok(())
    }

    fn end(mut self, counters: &Counters) -> Result<Vec<Window>> {
        self.next(counters)?;
        Ok(self.ended)
    }
}

/// On standard error.
pub fn progress(what: &str, begin: Instant) {
    eprintln!("        {what}: {:.1} s", begin.elapsed().as_secs_f64());
}

/// Those that were asked for and can be had.
pub fn subjects(only: &[Subject]) -> Vec<Subject> {
    let programs = [
        (Subject::QemuMicrovm, crate::start::qemu::PROGRAM),
        (Subject::Runc, runc::PROGRAM),
    ];
    Subject::ALL
        .into_iter()
        .filter(|subject| only.is_empty() || only.contains(subject))
        .filter(|subject| {
            let missing = programs
                .iter()
                .find(|(of, program)| of == subject && !Path::new(program).exists());
            if let Some((_, program)) = missing {
                eprintln!("{} is left out: {program} is missing", subject.name());
            }
            missing.is_none()
        })
        .collect()
}

/// An error that tells the end of a monitor, with what it has left to be read.
fn ended(what: &str, status: &str, words: &str) -> Error {
    Error::Unexpected(format!("{what} ended: {status}; {words}"))
}

/// The last lines of a file.
pub fn tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(6).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}
