//! The guest kernel's command line. What each parameter is for is written down in
//! `guest-kernel/README.md`.

use bulkhead_proto::guest::{AGENT_PATH, EMULATED_SWITCH, XSTATE_SWITCH};
use bulkhead_proto::vmm::KvmKind;
use thiserror::Error;

use crate::arch::x86_64::layout::{COMMAND_LINE_MAX, FIRST_DEVICE_IRQ, MMIO_BASE};
use crate::virtio::mmio::MMIO_SIZE;
use crate::xstate::FIRST_PORT;

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

/// What the command line depends on.
#[derive(Debug, Clone, Copy)]
pub struct Words {
    /// How KVM runs guest kernel mode.
    pub kind: KvmKind,
    /// The VMM saves extended registers for the kernel.
    pub xstate: bool,
    /// Number of virtio-mmio windows.
    pub devices: usize,
    /// Everything that the kernel says goes to a console.
    pub verbose: bool,
    /// One of the devices is the memory device.
    pub hotplug: bool,
}

/// Builds the command line, with the words of `extra` at its end.
///
/// # Errors
/// When one of `extra` is malformed or the line gets too long.
pub fn build(words: Words, extra: &[String]) -> Result<String, CommandLineError> {
    let Words {
        kind,
        xstate,
        devices,
        verbose,
        hotplug,
    } = words;
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
    }
    if xstate {
        words.push(format!("{XSTATE_SWITCH}={FIRST_PORT:#x}"));
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

    fn words(kind: KvmKind) -> Words {
        Words {
            kind,
            xstate: false,
            devices: 1,
            verbose: false,
            hotplug: false,
        }
    }

    #[test]
    fn each_device_is_named_with_its_window_and_line() {
        let words = Words {
            devices: 2,
            hotplug: true,
            ..words(KvmKind::Vmx)
        };
        let line = build(words, &["debug".into()]).unwrap();
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5 "));
        assert!(line.contains("virtio_mmio.device=4K@0xd0001000:6 "));
        assert!(line.ends_with(" debug"));
        assert!(!line.contains("bulkhead."));
        assert!(line.contains(HOTPLUG));
    }

    #[test]
    fn an_emulated_host_gets_its_switches() {
        let emulated = words(KvmKind::Emulated);
        let line = build(emulated, &[]).unwrap();
        assert!(line.contains(EMULATED_SWITCH));
        assert!(!line.contains(XSTATE_SWITCH));
        assert!(!line.contains(HOTPLUG));
        let xstate = Words {
            xstate: true,
            ..emulated
        };
        let line = build(xstate, &[]).unwrap();
        assert!(line.contains(" bulkhead.xstate_port=0x5c0 "));
    }

    #[test]
    fn bad_parameters_are_refused() {
        let refused = |extra: String| build(words(KvmKind::Vmx), &[extra]).is_err();
        assert!(refused("a b".into()));
        assert!(refused(String::new()));
        assert!(refused("x".repeat(COMMAND_LINE_MAX)));
    }
}
