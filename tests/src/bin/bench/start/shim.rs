//! A container in a microVM of Bulkhead, through the shim.

use super::Context;
use super::vmm::add;
use crate::pod::{FirstOutput, HeldStart};
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::figures::{Figure, Sample, ms_between};
use bulkhead_tests::footprint::{Footprint, descendants};
use bulkhead_tests::perf::{Seen, What};
use bulkhead_tests::shim::Bundle;

/// The VMM's program; the kernel knows it by its first 15 bytes.
const VMM: &str = "bulkhead-vmm";

/// Starts a container from `bundle`, to its first output, and ends it.
///
/// # Errors
/// When it doesn't start or end.
pub fn container(context: &Context, bundle: &Bundle, cold: bool) -> Result<Sample> {
    let held = HeldStart::new(bundle)?;
    let watch = context.watch(held.pid());
    let output = FirstOutput::of_fifo(&bundle.beside("out"))?;
    let (pod, began) = held.release()?;
    let mut sample = Sample::new();
    let run = pod.run(Some(&output));
    let first = run.and_then(|()| output.wait(context.boot_limit))?;
    let seen = watch.as_ref().map_or_else(Vec::new, |watch| watch.seen());
    sample.insert(Figure::CommandToOutputMs, ms_between(began, first));
    let vmm_began = seen
        .iter()
        .find(|seen| seen.what == What::Exec(VMM.into()))
        .map(|seen| seen.at_ns);
    if let Some(vmm_began) = vmm_began {
        sample.insert(Figure::FirstOutputMs, ms_between(vmm_began, first));
        if let Some(exec) = container_exec(context, &seen, cold) {
            sample.insert(Figure::VmmToFirstExecMs, ms_between(vmm_began, exec.at_ns));
            let instructions = context.counted(exec.instructions);
            add(&mut sample, Figure::FirstExecInstructions, instructions);
        }
    }
    let shim = Footprint::of(pod.shim_pid())?;
    sample.insert(Figure::ShimPrivateKib, shim.private_kib as f64);
    let vmm = vmm_of(pod.shim_pid())?;
    sample.insert(Figure::PrivateKib, vmm.private_kib as f64);
    sample.insert(Figure::SharedKib, vmm.shared_kib as f64);
    drop(watch);
    pod.end()?;
    Ok(sample)
}

/// The first program that the guest executes once its agent has knocked; a template's agent did so
/// before it was saved.
fn container_exec<'a>(context: &Context, seen: &'a [Seen], cold: bool) -> Option<&'a Seen> {
    let mut after_knock = seen.iter();
    if cold {
        after_knock.find(|seen| context.marks.is_knock(seen))?;
    }
    after_knock.find(|seen| context.marks.is_exec(seen))
}

fn vmm_of(shim: u32) -> Result<Footprint> {
    for pid in descendants(shim)? {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == VMM {
            return Footprint::of(pid);
        }
    }
    Err(Error::Unexpected("the shim has no VMM".into()))
}
