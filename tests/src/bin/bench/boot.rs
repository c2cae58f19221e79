//! From the VMM's start to the agent's ready message.

use crate::{profile, usage};
use bulkhead_proto::vmm::{Event, KvmKind, Request, Response};
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::perf::EmulateTracepoint;
use bulkhead_tests::vm::VmSpec;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// What can be said on the command line.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON: the medians of all runs.
    #[arg(long)]
    json: bool,
    /// Print which guest kernel functions the instructions went to, from one more run.
    #[arg(long)]
    profile: bool,
    /// Number of boots.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Memory that can be plugged, in MiB: 0 for a machine without that device, 3968 for one as
    /// the default configuration has it.
    #[arg(long, default_value_t = 0)]
    hotplug_mib: u32,
    /// Longest that one boot may take, in seconds.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
}

/// One boot, or the median of several. `None` is what this host can't tell.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Guest kernel instructions, where KVM emulates them all.
    guest_instructions: Option<u64>,
    /// Returns of KVM_RUN to the VMM.
    userspace_exits: u64,
    /// Milliseconds from the VMM's configuration to its ready event.
    wall_ms: f64,
    /// Milliseconds of CPU time of the VMM itself; see `usage::vmm_cpu_ms`.
    vmm_cpu_ms: f64,
    /// KiB of private memory of the VMM beyond guest memory.
    vmm_private_kib: u64,
    /// Size of vmlinux.
    kernel_bytes: u64,
    /// Size of the guest root image.
    rootfs_bytes: u64,
    /// How this host's KVM runs guest kernel mode.
    kvm_kind: KvmKind,
}

/// Runs the benchmark and prints its result.
///
/// # Errors
/// When a VM doesn't get ready.
pub fn measure(artifacts: &Artifacts, arguments: &Arguments) -> Result<()> {
    let tracepoint = EmulateTracepoint::find();
    if let Err(error) = &tracepoint {
        eprintln!("guest instructions can't be counted here: {error}");
    }
    let tracepoint = tracepoint.ok();
    let timeout = Duration::from_secs(arguments.timeout);
    let mut boots = Vec::new();
    for run in 1..=arguments.runs {
        eprintln!("boot {run} of {}: waiting for the agent", arguments.runs);
        boots.push(boot(artifacts, tracepoint, arguments)?);
    }
    let median = median_of(&boots);
    if arguments.json {
        let text = serde_json::to_string_pretty(&median).map_err(std::io::Error::from);
        println!("{}", text.context(|| "encode the figures".into())?);
    } else {
        print_table(&boots, &median);
    }
    if arguments.profile {
        let tracepoint = tracepoint.ok_or_else(|| {
            Error::Unexpected("a profile needs the tracepoint kvm:kvm_emulate_insn".into())
        })?;
        profile::print(artifacts, tracepoint, timeout)?;
    }
    Ok(())
}

fn boot(
    artifacts: &Artifacts,
    tracepoint: Option<EmulateTracepoint>,
    arguments: &Arguments,
) -> Result<Figures> {
    let spec = VmSpec {
        hotplug_mib: arguments.hotplug_mib,
        ..VmSpec::default()
    };
    // The VMM waits for its configuration: counting begins before it does anything.
    let prepared = spec.prepare(artifacts)?;
    let counter = tracepoint
        .map(|tracepoint| tracepoint.count(prepared.pid()))
        .transpose()?;
    let vm = prepared.run()?;
    let (ready, at) = vm.wait_ready(Duration::from_secs(arguments.timeout))?;
    let counted = counter.map(|counter| counter.read()).transpose()?;
    let Event::Ready {
        userspace_exits, ..
    } = ready
    else {
        return Err(Error::Unexpected(format!("not the ready event: {ready:?}")));
    };
    let vmm_cpu_ms = usage::vmm_cpu_ms(vm.pid())?;
    // The region for what is plugged lies beside the memory, and the kernel sees one mapping.
    let guest_mib = u64::from(spec.memory_mib) + u64::from(spec.hotplug_mib).next_multiple_of(128);
    let vmm_private_kib = usage::private_kib(vm.pid(), guest_mib << 20)?;
    let kvm_kind = match vm.control(&Request::Status {})? {
        Response::Status(status) => status.kvm,
        other => {
            return Err(Error::Unexpected(format!(
                "status was answered by {other:?}"
            )));
        }
    };
    Ok(Figures {
        // Elsewhere KVM emulates a few instructions only, and their number says nothing.
        guest_instructions: counted.filter(|_| kvm_kind == KvmKind::Emulated),
        userspace_exits,
        wall_ms: at.duration_since(vm.started()).as_secs_f64() * 1000.0,
        vmm_cpu_ms,
        vmm_private_kib,
        kernel_bytes: size(&artifacts.kernel())?,
        rootfs_bytes: size(&artifacts.rootfs())?,
        kvm_kind,
    })
}

fn size(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)
        .context(|| format!("stat {}", path.display()))?
        .len())
}

fn median_of(boots: &[Figures]) -> Figures {
    fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
        values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
        values[values.len() / 2]
    }
    let of = |value: fn(&Figures) -> f64| median(boots.iter().map(value).collect());
    let whole = |value: fn(&Figures) -> u64| median(boots.iter().map(value).collect());
    let counts: Option<Vec<u64>> = boots.iter().map(|boot| boot.guest_instructions).collect();
    Figures {
        guest_instructions: counts.map(median),
        userspace_exits: whole(|boot| boot.userspace_exits),
        wall_ms: (of(|boot| boot.wall_ms) * 10.0).round() / 10.0,
        vmm_cpu_ms: (of(|boot| boot.vmm_cpu_ms) * 10.0).round() / 10.0,
        vmm_private_kib: whole(|boot| boot.vmm_private_kib),
        ..boots[0].clone()
    }
}

fn print_table(boots: &[Figures], median: &Figures) {
    let row = |name: &str, value: &dyn Fn(&Figures) -> String| {
        let each: Vec<String> = boots.iter().map(value).collect();
        println!("{name:<20} {:>14}   ({})", value(median), each.join(", "));
    };
    let count = |value: Option<u64>| value.map_or_else(|| "null".into(), |v| v.to_string());
    println!(
        "{:<20} {:>14}   (each of {} runs)",
        "",
        "median",
        boots.len()
    );
    row("guest_instructions", &|boot| count(boot.guest_instructions));
    row("userspace_exits", &|boot| boot.userspace_exits.to_string());
    row("wall_ms", &|boot| format!("{:.1}", boot.wall_ms));
    row("vmm_cpu_ms", &|boot| format!("{:.1}", boot.vmm_cpu_ms));
    row("vmm_private_kib", &|boot| boot.vmm_private_kib.to_string());
    println!("{:<20} {:>14}", "kernel_bytes", median.kernel_bytes);
    println!("{:<20} {:>14}", "rootfs_bytes", median.rootfs_bytes);
    println!(
        "{:<20} {:>14}",
        "kvm_kind",
        format!("{:?}", median.kvm_kind).to_lowercase()
    );
}
