//! The guest kernel's command line. What each parameter is for is written down in
//! `guest-kernel/README.md`.

use bulkhead_proto::guest::{AGENT_PATH, EMULATED_SWITCH, NO_AVX};
use bulkhead_proto::vmm::KvmKind;
use thiserror::Error;

use crate::arch::x86_64::layout::{COMMAND_LINE_MAX, FIRST_DEVICE_IRQ, MMIO_BASE};
use crate::virtio::mmio::MMIO_SIZE;

/// On every host.
const ALWAYS: &[&str] = &[
    "root=/dev/vda",
    "rootfstype=erofs",
    "reboot=k,f",
    "tsc=reliable",
    "earlyprintk=serial,0x3f8,115200,keep",
];

/// Where guest kernel mode is emulated. The time-stamp counter is the host's there, whatever the
/// VMM sets: of the guest's clocks only KVM's goes on from where a template was saved.
const EMULATED: &[&str] = &[EMULATED_SWITCH, "mitigations=off", "clocksource=kvm-clock"];

/// Where memory can be plugged. Linux then puts up to three times as much as it booted with where
/// only pages are that can be moved out of the way, and more in turns with memory for all uses: what
/// nobody needs any more can be unplugged again.
const HOTPLUG: &str = "memory_hotplug.online_policy=auto-movable";

/// Why there is no command line.
#[derive(Debug, Error)]
pub enum CommandLineError {
    /// It would not fit.
    #[error(
        "the guest kernel's command line has {length} bytes, the kernel takes {}; shorten kernel_params",
        COMMAND_LINE_MAX - 1
    )]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// A parameter that would be read as several, or as none.
    #[error("kernel parameter {parameter:?}: must be printable ASCII without spaces")]
    Malformed {
        /// The parameter.
        parameter: String,
    },
}

/// Builds the command line for `devices` virtio-mmio windows; with `hotplug` one of them is the
/// memory device's.
///
/// # Errors
/// When one of `extra` is malformed or the line gets too long.
pub fn build(
    kind: KvmKind,
    devices: usize,
    verbose: bool,
    hotplug: bool,
    extra: &[String],
) -> Result<String, CommandLineError> {
    if let Some(parameter) = extra
        .iter()
        .find(|parameter| parameter.is_empty() || !parameter.bytes().all(|b| b.is_ascii_graphic()))
    {
        return Err(CommandLineError::Malformed {
            parameter: parameter.clone(),
        });
    }

    // First, so that it holds when the early console is registered and replays the log.
    let mut words = vec![if verbose { "ignore_loglevel" } else { "quiet" }.to_owned()];
    words.extend(ALWAYS.iter().map(|word| word.to_string()));
    words.push(format!("init={AGENT_PATH}"));
    if kind == KvmKind::Emulated {
        words.extend(EMULATED.iter().map(|word| word.to_string()));
        // What the kernel doesn't know goes into the agent's environment.
        words.push(format!("{}={}", NO_AVX.0, NO_AVX.1));
    }
    if verbose {
        words.push("console=hvc0".into());
    }
    if hotplug {
        words.push(HOTPLUG.into());
    }
    for slot in 0..devices as u64 {
        words.push(format!(
            "virtio_mmio.device=4K@{:#x}:{}",
            MMIO_BASE + slot * MMIO_SIZE,
            u64::from(FIRST_DEVICE_IRQ) + slot
        ));
    }
    words.extend(extra.iter().cloned());

    let line = words.join(" ");
    if line.len() >= COMMAND_LINE_MAX {
        return Err(CommandLineError::TooLong { length: line.len() });
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_is_named_with_its_window_and_line() {
        let line = build(KvmKind::Vmx, 2, false, true, &["debug".into()]).unwrap();
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5 "));
        assert!(line.contains("virtio_mmio.device=4K@0xd0001000:6 "));
        assert!(line.ends_with(" debug"));
        assert!(!line.contains("emulated"));
        assert!(line.contains(HOTPLUG));
    }

    #[test]
    fn an_emulated_host_gets_its_switch() {
        let line = build(KvmKind::Emulated, 1, false, false, &[]).unwrap();
        assert!(line.contains("bulkhead.emulated_ring0"));
        assert!(!line.contains(HOTPLUG));
    }

    #[test]
    fn bad_parameters_are_refused() {
        assert!(build(KvmKind::Vmx, 1, false, false, &["a b".into()]).is_err());
        assert!(build(KvmKind::Vmx, 1, false, false, &[String::new()]).is_err());
        assert!(
            build(
                KvmKind::Vmx,
                1,
                false,
                false,
                &["x".repeat(COMMAND_LINE_MAX)]
            )
            .is_err()
        );
    }
}
