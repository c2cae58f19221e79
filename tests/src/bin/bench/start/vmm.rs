//! Bulkhead's VMM alone, by its contract: from its process's start to the agent.

use super::Context;
use crate::{hold, pod};
use bulkhead_proto::agent::IdentifyRequest;
use bulkhead_proto::guest::AGENT_PORT;
use bulkhead_proto::vmm::Event;
use bulkhead_sandbox::config::Config;
use bulkhead_tests::error::{Context as _, Error, Result};
use bulkhead_tests::figures::{Figure, Sample, ms_between};
use bulkhead_tests::footprint::Footprint;
use bulkhead_tests::perf::{Seen, Watch, What, now_ns};
use bulkhead_tests::vm::{TemplatePaths, Vm, VmSpec};
use protobuf::Message;
use std::fs::File;
use std::io::Read;
use std::os::fd::IntoRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A VMM that has just been let go.
struct Started {
    vm: Vm,
    watch: Option<Watch>,
    /// When, as [`now_ns`].
    began: u64,
}

impl Started {
    fn new(context: &Context, template: Option<TemplatePaths>) -> Result<Self> {
        let plain = VmSpec::default();
        let spec = VmSpec {
            launcher: hold::launcher()?,
            template,
            // As a pod of the default configuration has it: a template fits no other machine.
            hotplug_mib: Config::default()
                .memory_max_mib
                .saturating_sub(plain.memory_mib),
            ..plain
        };
        let prepared = spec.prepare(&context.artifacts)?;
        let pid = prepared.pid();
        hold::wait_until_held(pid)?;
        let watch = context.watch(pid);
        // Into the pipe: the VMM finds it there once it begins.
        let vm = prepared.run()?;
        let began = hold::release(pid)?;
        Ok(Self { vm, watch, began })
    }

    /// Waits until the VMM tells that the vCPUs of a saved machine go on; milliseconds since it
    /// began. The first instruction says nothing there: a saved guest is idle, and its vCPU halted
    /// until its next timer or the host's first request.
    fn wait_running(&self, context: &Context) -> Result<f64> {
        match self.vm.event(context.boot_limit)? {
            Some(Event::Running { .. }) => Ok(ms_between(self.began, now_ns())),
            other => Err(Error::Unexpected(format!(
                "the saved machine did not go on: {other:?}; {}",
                self.vm.logs()
            ))),
        }
    }

    /// What is known now that the agent is ready.
    fn sample(&self, context: &Context) -> Result<Sample> {
        let mut sample = Sample::new();
        sample.insert(Figure::VmmToAgentMs, ms_between(self.began, now_ns()));
        if let Some(watch) = &self.watch {
            let instructions = context.counted(watch.instructions()?);
            add(&mut sample, Figure::AgentInstructions, instructions);
            add_seen(&mut sample, context, self.began, &watch.seen());
        }
        add_footprint(&mut sample, self.vm.pid())?;
        Ok(sample)
    }
}

/// One cold boot, up to the agent's ready message.
///
/// # Errors
/// When the VM doesn't get ready.
pub fn cold(context: &Context) -> Result<Sample> {
    let started = Started::new(context, None)?;
    started.vm.wait_ready(context.boot_limit)?;
    started.sample(context)
}

/// One start from the template, up to the agent's acknowledgement of its new identity.
///
/// # Errors
/// When the agent doesn't acknowledge.
pub fn template(context: &Context) -> Result<Sample> {
    let started = Started::new(context, Some(pod::saved_machine()?))?;
    let running = started.wait_running(context)?;
    identify(&started.vm, context.boot_limit)?;
    let mut sample = started.sample(context)?;
    sample.insert(Figure::VmmToGuestMs, running);
    Ok(sample)
}

/// One start that is ended as soon as the guest runs, cold or from a template.
///
/// # Errors
/// When it doesn't.
pub fn short(context: &Context, template: Option<TemplatePaths>) -> Result<Sample> {
    let saved = template.is_some();
    let started = Started::new(context, template)?;
    if saved {
        let running = started.wait_running(context)?;
        return Ok(Sample::from_iter([(Figure::VmmToGuestMs, running)]));
    }
    first_entry(context, started.watch.as_ref(), started.began)
}

/// Waits for the first guest instruction; nothing is told where it can't be seen.
///
/// # Errors
/// When it doesn't come.
pub fn first_entry(context: &Context, watch: Option<&Watch>, began: u64) -> Result<Sample> {
    let mut sample = Sample::new();
    if let Some(watch) = watch {
        let first = watch.wait_for("the first guest instruction", context.boot_limit, |seen| {
            is_first(context, seen)
        })?;
        sample.insert(Figure::VmmToGuestMs, ms_between(began, first.at_ns));
    }
    Ok(sample)
}

/// Whether a vCPU's thread runs the guest. The same moment may be told twice, with times that
/// differ by what telling takes.
fn is_first(context: &Context, seen: &Seen) -> bool {
    seen.what == What::FirstEntry || context.marks.is_entry(seen)
}

/// Gives the guest a new identity, as the sandbox library does after each start from a template.
fn identify(vm: &Vm, limit: Duration) -> Result<()> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let request = IdentifyRequest {
        entropy: random_bytes::<64>()?.to_vec(),
        generation_id: random_bytes::<16>()?.to_vec(),
        hostname: "bench".into(),
        wall_seconds: now.as_secs() as i64,
        wall_nanos: now.subsec_nanos(),
        ..Default::default()
    };
    let failed = |error: &dyn std::fmt::Display| {
        Error::Unexpected(format!("identifying the guest: {error}; {}", vm.logs()))
    };
    let stream = vm.dial(AGENT_PORT)?;
    // The client closes the descriptor.
    let client = ttrpc::Client::new(stream.into_raw_fd()).map_err(|error| failed(&error))?;
    let mut call = ttrpc::Request::new();
    call.service = "bulkhead.agent.v1.Agent".into();
    call.method = "Identify".into();
    call.timeout_nano = limit.as_nanos() as i64;
    call.payload = request.write_to_bytes().map_err(|error| failed(&error))?;
    client.request(call).map_err(|error| failed(&error))?;
    Ok(())
}

fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context(|| "read /dev/urandom".into())?;
    Ok(bytes)
}

/// Adds a figure that may be missing.
pub fn add(sample: &mut Sample, figure: Figure, value: Option<u64>) {
    if let Some(value) = value {
        sample.insert(figure, value as f64);
    }
}

/// Adds what a watch has seen of a boot that began at `began`.
pub fn add_seen(sample: &mut Sample, context: &Context, began: u64, seen: &[Seen]) {
    let mut add_first = |figure: Figure, wanted: &dyn Fn(&Seen) -> bool| {
        let first = seen.iter().find(|seen| wanted(seen));
        if let Some(first) = first {
            sample.insert(figure, ms_between(began, first.at_ns));
        }
        first.and_then(|first| first.instructions)
    };
    add_first(Figure::VmmToGuestMs, &|seen| is_first(context, seen));
    add_first(Figure::VmmToKernelMs, &|seen| context.marks.is_entry(seen));
    let instructions = add_first(Figure::VmmToKnockMs, &|seen| context.marks.is_knock(seen));
    add(
        sample,
        Figure::KnockInstructions,
        context.counted(instructions),
    );
}

/// Adds the VMM's memory once the agent is ready.
pub fn add_footprint(sample: &mut Sample, pid: u32) -> Result<()> {
    let footprint = Footprint::of(pid)?;
    sample.insert(Figure::AgentPrivateKib, footprint.private_kib as f64);
    sample.insert(Figure::AgentSharedKib, footprint.shared_kib as f64);
    Ok(())
}
