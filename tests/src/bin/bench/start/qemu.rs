//! QEMU's microvm machine with the same kernel and root image.
//!
//! Hosts mostly lack the vhost module that QEMU's vsock needs, so the agent's knock can't arrive
//! here; that it knocks is seen in the guest from outside, in the same way for QEMU and Bulkhead.

use super::Context;
use super::vmm::{add_footprint, add_seen, first_entry};
use crate::guests::tail;
use crate::hold;
use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::error::{Context as _, Error, Result};
use bulkhead_tests::figures::{Figure, Sample, ms_between};
use bulkhead_tests::perf::{Seen, Watch, now_ns};
use bulkhead_vmm::command_line::{self, Words};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Debian's package qemu-system-x86 has it.
pub const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// Begins the agent's first line on the console: it misses the share, which it looks for right
/// after it has knocked.
const AGENT_LINE: &str = "bulkhead-agent:";

/// Everything that this machine can leave out is left out; a serial port stays, since the guest's
/// early console writes to one, as under Bulkhead.
pub const MACHINE: &str = "microvm,accel=kvm,acpi=off,x-option-roms=off,pit=on,pic=on,rtc=off,\
    isa-serial=on,auto-kernel-cmdline=on";

/// Some KVMs refuse the MSR of the feature that is turned off, and QEMU would end.
pub const CPU: &str = "host,arch-capabilities=off";

/// A QEMU that has just been let go. Dropping it kills it.
struct Qemu {
    child: Child,
    folder: TempDir,
    watch: Option<Watch>,
    /// When, as [`now_ns`].
    began: u64,
}

impl Qemu {
    fn start(context: &Context) -> Result<Self> {
        let folder = TempDir::with_prefix("bulkhead-qemu.").context(|| "make a folder".into())?;
        let command = command(context, &console_of(&folder))?;
        let child = hold::held(&command)?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(words_of(&folder)).context(|| "make a log".into())?)
            .spawn()
            .context(|| format!("start {PROGRAM}"))?;
        let mut qemu = Self {
            child,
            folder,
            watch: None,
            began: 0,
        };
        let pid = qemu.child.id();
        hold::wait_until_held(pid)?;
        qemu.watch = context.watch(pid);
        qemu.began = hold::release(pid)?;
        Ok(qemu)
    }

    /// With how it has ended, if it has, and with its last words and the guest's.
    fn explained(&mut self, error: Error) -> Error {
        let ended = match self.child.try_wait() {
            Ok(Some(status)) => format!("QEMU has ended, {status}"),
            _ => "QEMU runs".to_owned(),
        };
        let told = format!(
            "{error}; {ended}; it says: {}; console: {}",
            tail(&words_of(&self.folder)),
            tail(&self.console())
        );
        Error::Unexpected(told)
    }

    /// What the guest has printed.
    fn console(&self) -> PathBuf {
        console_of(&self.folder)
    }
}

fn console_of(folder: &TempDir) -> PathBuf {
    folder.path().join("console")
}

/// What QEMU itself says.
fn words_of(folder: &TempDir) -> PathBuf {
    folder.path().join("stderr")
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One start that is ended at the first guest instruction.
///
/// # Errors
/// When there is none.
pub fn short(context: &Context) -> Result<Sample> {
    let mut qemu = Qemu::start(context)?;
    first_entry(context, qemu.watch.as_ref(), qemu.began).map_err(|error| qemu.explained(error))
}

/// One boot, up to the agent's knock.
///
/// # Errors
/// When the guest doesn't come that far.
pub fn boot(context: &Context) -> Result<Sample> {
    let mut qemu = Qemu::start(context)?;
    let pid = qemu.child.id();
    let (began, console) = (qemu.began, qemu.console());
    let watch = qemu.watch.take();
    let mut seen: Vec<Seen> = Vec::new();
    let by_mark = context.kvm == KvmKind::Emulated && watch.is_some();
    let pause = Duration::from_millis(if by_mark { 20 } else { 2 });
    let knocked = wait_until(context, &mut qemu, pause, || {
        seen.extend(watch.iter().flat_map(|watch| watch.seen()));
        if by_mark {
            let knock = seen.iter().find(|seen| context.marks.is_knock(seen));
            return knock.map(|knock| knock.at_ns);
        }
        let text = std::fs::read(&console).unwrap_or_default();
        String::from_utf8_lossy(&text)
            .contains(AGENT_LINE)
            .then(now_ns)
    })?;
    let mut sample = Sample::new();
    sample.insert(Figure::VmmToAgentMs, ms_between(began, knocked));
    add_seen(&mut sample, context, began, &seen);
    if let Some(instructions) = sample.get(&Figure::KnockInstructions).copied() {
        sample.insert(Figure::AgentInstructions, instructions);
    }
    add_footprint(&mut sample, pid)?;
    for (from, to) in [
        (Figure::AgentPrivateKib, Figure::PrivateKib),
        (Figure::AgentSharedKib, Figure::SharedKib),
    ] {
        sample.insert(to, sample[&from]);
    }
    Ok(sample)
}

/// The kernel's command line under QEMU, which names its devices there by itself.
///
/// Where kernel mode is emulated nobody saves AVX's registers under QEMU, so glibc's functions are
/// kept from them by a variable: what the kernel doesn't know goes into the first program's
/// environment.
///
/// # Errors
/// When it gets too long.
pub fn kernel_command_line(kind: KvmKind) -> Result<String> {
    let mut extra = Vec::new();
    if kind == KvmKind::Emulated {
        extra.push("GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-AVX512F,-AVX512VL,-AVX512BW".into());
    }
    let words = Words {
        kind,
        xstate: false,
        devices: 0,
        verbose: false,
        hotplug: false,
    };
    command_line::build(words, &extra).map_err(|error| Error::Unexpected(error.to_string()))
}

fn command(context: &Context, console: &Path) -> Result<Command> {
    let words = kernel_command_line(context.kvm)?;
    let artifacts = &context.artifacts;
    let root = format!(
        "id=root,file={},format=raw,if=none,readonly=on",
        artifacts.rootfs().display()
    );
    let mut command = Command::new(PROGRAM);
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-M", MACHINE, "-cpu", CPU])
        .args(["-smp", "1", "-m", "128"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(artifacts.kernel())
        .args(["-append", &words, "-drive", &root])
        .args(["-device", "virtio-blk-device,drive=root"])
        .args(["-device", "virtio-rng-device"]);
    Ok(command)
}

/// Asks `done` again and again, with a pause between, as long as QEMU runs.
fn wait_until(
    context: &Context,
    qemu: &mut Qemu,
    pause: Duration,
    mut done: impl FnMut() -> Option<u64>,
) -> Result<u64> {
    let end = Instant::now() + context.boot_limit;
    loop {
        if let Some(at) = done() {
            return Ok(at);
        }
        let what = "the agent's knock under QEMU";
        if !matches!(qemu.child.try_wait(), Ok(None)) {
            return Err(qemu.explained(Error::Unexpected(format!("{what} never came"))));
        }
        if Instant::now() > end {
            return Err(qemu.explained(Error::TimedOut {
                what: what.into(),
                seconds: context.boot_limit.as_secs(),
                detail: String::new(),
            }));
        }
        std::thread::sleep(pause);
    }
}
