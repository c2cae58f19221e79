//! From the JSON configuration and descriptor numbers to owned resources: everything is checked
//! here once, before anything is built.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use bulkhead_proto::vmm::{
    BlockConfig, CONFIG_FD, HOTPLUG_BLOCK_MIB, MAX_HOTPLUG_MIB, MAX_VCPUS, VmConfig,
};
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::arch::x86_64::layout;
use crate::devices;

/// Largest configuration accepted, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Least guest memory that the kernel and the agent boot in, in MiB.
pub const MIN_MEMORY_MIB: u32 = 32;
/// VIRTIO_BLK_T_GET_ID answers 20 bytes (virtio 1.3 §5.2.6.1).
const MAX_SERIAL: usize = 20;

/// Why a configuration was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The descriptor could not be read.
    #[error("reading the configuration from descriptor {CONFIG_FD}: {0}")]
    Read(#[source] std::io::Error),
    /// Not JSON, an unknown key, or a value of the wrong type.
    #[error("the configuration on descriptor {CONFIG_FD} is not valid: {0}")]
    Parse(#[source] serde_json::Error),
    /// A value outside its range.
    #[error("{key} = {value}: must be {allowed}")]
    OutOfRange {
        /// Name of the key.
        key: &'static str,
        /// The value that was given.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A descriptor that isn't open, or is named twice.
    #[error("{key} = {fd}: {reason}; the parent must pass each descriptor open and once")]
    Descriptor {
        /// Name of the key.
        key: &'static str,
        /// The number that was given.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
}

/// The machine's resources, owned by this process alone.
pub struct Resources {
    /// For log lines.
    pub sandbox_id: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// How much more can be plugged, in MiB.
    pub hotplug_mib: u32,
    /// Length in bytes of the region for that, see [`layout::hotplug_region`].
    pub hotplug_region: u64,
    /// /dev/kvm.
    pub kvm: Kvm,
    /// The guest kernel.
    pub kernel: File,
    /// Appended to the command line.
    pub kernel_params: Vec<String>,
    /// Block devices in slot order.
    pub block: Vec<BlockResource>,
    /// Where clients dial the guest.
    pub vsock: UnixListener,
    /// The folder served over virtio-fs.
    pub share: Option<OwnedFd>,
    /// Console output.
    pub console_log: Option<File>,
    /// Bytes of console output kept in the log.
    pub console_limit: u64,
    /// Print everything, from the first instruction on.
    pub console_verbose: bool,
    /// Where requests come from.
    pub control: UnixListener,
    /// A saved machine to continue.
    pub template: Option<TemplateFiles>,
}

/// A saved machine's files.
pub struct TemplateFiles {
    /// Guest memory.
    pub memory: File,
    /// All else.
    pub state: File,
}

/// A block device's backing.
pub struct BlockResource {
    /// Serial number shown to the guest.
    pub serial: String,
    /// The backing, or an empty slot.
    pub file: Option<File>,
    /// Refuse writes.
    pub read_only: bool,
}

/// Reads the configuration from [`CONFIG_FD`] and takes ownership of all that it names; every
/// other descriptor above 2 is closed. The second value is where events go.
///
/// # Errors
/// [`ConfigError`], before anything is built.
pub fn take() -> Result<(Resources, File), ConfigError> {
    if !is_open(CONFIG_FD) {
        return Err(ConfigError::Descriptor {
            key: "configuration",
            fd: CONFIG_FD,
            reason: "not open".into(),
        });
    }
    // SAFETY: open, and nothing else in this process has taken it: this runs once, first in main.
    let file = unsafe { File::from_raw_fd(CONFIG_FD) };
    let mut text = Vec::new();
    file.take(MAX_CONFIG)
        .read_to_end(&mut text)
        .map_err(ConfigError::Read)?;
    let config: VmConfig = serde_json::from_slice(&text).map_err(ConfigError::Parse)?;
    validate(&config)?;
    let mut claims = Claims::default();
    let events = claims.take("events_fd", config.events_fd)?.into();
    let resources = claim(config, &mut claims)?;
    claims.close_everything_else();
    Ok((resources, events))
}

fn validate(config: &VmConfig) -> Result<(), ConfigError> {
    let out_of_range = |key, value: &dyn ToString, allowed: String| {
        Err(ConfigError::OutOfRange {
            key,
            value: value.to_string(),
            allowed,
        })
    };
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return out_of_range("vcpus", &config.vcpus, format!("1 to {MAX_VCPUS}"));
    }
    if config.memory_mib < MIN_MEMORY_MIB {
        return out_of_range(
            "memory_mib",
            &config.memory_mib,
            format!("at least {MIN_MEMORY_MIB}"),
        );
    }
    if config.hotplug_mib > MAX_HOTPLUG_MIB || !config.hotplug_mib.is_multiple_of(HOTPLUG_BLOCK_MIB)
    {
        return out_of_range(
            "hotplug_mib",
            &config.hotplug_mib,
            format!("a multiple of {HOTPLUG_BLOCK_MIB}, at most {MAX_HOTPLUG_MIB}"),
        );
    }
    let others = devices::count(0, true, true, true);
    let most = (layout::FIRST_SPARE_IRQ - layout::FIRST_DEVICE_IRQ) as usize - others;
    if config.block.len() > most {
        return out_of_range("block", &config.block.len(), format!("at most {most}"));
    }
    for block in &config.block {
        check_serial("block.serial", &block.serial)?;
    }
    Ok(())
}

/// Whether a block device can have this serial number, the value of `key`.
///
/// # Errors
/// [`ConfigError::OutOfRange`].
pub fn check_serial(key: &'static str, serial: &str) -> Result<(), ConfigError> {
    if serial.len() <= MAX_SERIAL && serial.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(ConfigError::OutOfRange {
        key,
        value: serial.to_owned(),
        allowed: format!("at most {MAX_SERIAL} printable ASCII characters"),
    })
}

/// Turns every number of the configuration into an owner, each only once.
fn claim(config: VmConfig, claims: &mut Claims) -> Result<Resources, ConfigError> {
    let block = config
        .block
        .into_iter()
        .map(
            |BlockConfig {
                 serial,
                 fd,
                 read_only,
             }| {
                let file = fd.map(|fd| claims.take("block.fd", fd)).transpose()?;
                Ok(BlockResource {
                    serial,
                    file: file.map(File::from),
                    read_only,
                })
            },
        )
        .collect::<Result<_, ConfigError>>()?;
    let memory_bytes = u64::from(config.memory_mib) << 20;
    Ok(Resources {
        sandbox_id: config.sandbox_id,
        vcpus: config.vcpus,
        memory_bytes,
        hotplug_mib: config.hotplug_mib,
        hotplug_region: layout::hotplug_region(memory_bytes, u64::from(config.hotplug_mib) << 20),
        kvm: kvm(claims.take("kvm_fd", config.kvm_fd)?),
        kernel: claims.take("kernel_fd", config.kernel_fd)?.into(),
        kernel_params: config.kernel_params,
        block,
        vsock: claims.take("vsock_fd", config.vsock_fd)?.into(),
        share: config
            .share_fd
            .map(|fd| claims.take("share_fd", fd))
            .transpose()?,
        console_log: config
            .console
            .log_fd
            .map(|fd| claims.take("console.log_fd", fd))
            .transpose()?
            .map(File::from),
        console_limit: config.console.limit_bytes,
        console_verbose: config.console.verbose,
        control: claims.take("control_fd", config.control_fd)?.into(),
        template: config
            .template
            .map(|template| {
                Ok(TemplateFiles {
                    memory: claims
                        .take("template.memory_fd", template.memory_fd)?
                        .into(),
                    state: claims.take("template.state_fd", template.state_fd)?.into(),
                })
            })
            .transpose()?,
    })
}

fn kvm(descriptor: OwnedFd) -> Kvm {
    // SAFETY: ownership of the descriptor moves from the OwnedFd to the Kvm. Whether it is /dev/kvm
    // is what the first call will tell.
    unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) }
}

/// The descriptor numbers that have found an owner.
#[derive(Default)]
struct Claims(HashSet<RawFd>);

impl Claims {
    fn take(&mut self, key: &'static str, fd: RawFd) -> Result<OwnedFd, ConfigError> {
        let refuse = |reason: &str| {
            Err(ConfigError::Descriptor {
                key,
                fd,
                reason: reason.into(),
            })
        };
        if fd <= CONFIG_FD {
            return refuse("numbers up to 3 have a fixed use");
        }
        if !is_open(fd) {
            return refuse("not open");
        }
        if !self.0.insert(fd) {
            return refuse("named twice");
        }
        // SAFETY: open, above the standard descriptors, and this set shows that it has no other
        // owner; nothing has been opened by this process yet.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Whatever else was inherited is a mistake of the parent's, and would be a gift to a guest
    /// that breaks out.
    fn close_everything_else(&self) {
        let mut keep: Vec<RawFd> = self.0.iter().copied().collect();
        keep.sort_unstable();
        let mut first = CONFIG_FD;
        for fd in keep {
            close_range(first, fd - 1);
            first = fd + 1;
        }
        close_range(first, RawFd::MAX);
    }
}

fn close_range(first: RawFd, last: RawFd) {
    if first > last {
        return;
    }
    // SAFETY: the range holds no descriptor that this process has an owner for.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result != 0 {
        tracing::warn!(first, last, error = %std::io::Error::last_os_error(), "close_range");
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD touches no memory and reports a closed descriptor as an error.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::vmm::ConsoleConfig;

    fn config() -> VmConfig {
        VmConfig {
            sandbox_id: "test".into(),
            vcpus: 1,
            memory_mib: 128,
            hotplug_mib: 0,
            kvm_fd: 4,
            kernel_fd: 5,
            kernel_params: Vec::new(),
            block: Vec::new(),
            vsock_fd: 6,
            share_fd: None,
            console: ConsoleConfig {
                log_fd: None,
                limit_bytes: 0,
                verbose: false,
            },
            control_fd: 7,
            events_fd: 8,
            template: None,
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let mut wrong = config();
        wrong.vcpus = 33;
        assert_eq!(
            validate(&wrong).unwrap_err().to_string(),
            "vcpus = 33: must be 1 to 32"
        );
        wrong = config();
        wrong.memory_mib = 16;
        assert!(validate(&wrong).unwrap_err().to_string().contains("16"));
        for hotplug_mib in [3, MAX_HOTPLUG_MIB + 2] {
            wrong = config();
            wrong.hotplug_mib = hotplug_mib;
            let error = validate(&wrong).unwrap_err().to_string();
            assert!(error.starts_with("hotplug_mib = "), "{error}");
        }
        wrong = config();
        wrong.block = vec![
            BlockConfig {
                serial: "a".repeat(21),
                fd: None,
                read_only: true
            };
            1
        ];
        assert!(validate(&wrong).is_err());
        assert!(validate(&config()).is_ok());
    }

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_open() {
        let file = File::open("/dev/null").unwrap();
        let fd = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
        let mut claims = Claims::default();
        let owner = claims.take("kernel_fd", fd).unwrap();
        let twice = claims.take("vsock_fd", fd).unwrap_err().to_string();
        assert!(twice.contains("named twice"), "{twice}");
        assert!(claims.take("kvm_fd", 2).is_err());
        assert!(claims.take("kvm_fd", 1_000_000).is_err());
        drop(owner);
    }
}
