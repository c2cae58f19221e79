//! What a template was made from, and the key that follows from it.
//!
//! A template may be used by exactly those starts that would boot the same machine: the same
//! kernel, root image and VMM, the same shape, on the same kind of host. All of that is the
//! [`Identity`]; its SHA-256 is the [`Key`], which is the template's name in the store. So nothing
//! is ever invalidated: what has changed has another key, and two versions of Bulkhead that share a
//! store don't see each other's templates.

use crate::cache::{Key, hex};
use crate::config::{Config, Console};
use crate::images::Images;
use crate::sizing::MachineSize;
use crate::vmm::DEVICES;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Version of what the host keeps of a template. To be raised when the contract with VMM or agent
/// changes in a way that makes older templates useless.
pub const FORMAT: u32 = 1;

/// Most bytes of /proc/cpuinfo that are read; the first CPU's lines are a fraction of that. On a
/// host with many CPUs the whole file takes milliseconds to write.
const CPUINFO_BYTES: usize = 16 * 1024;

/// The lines of /proc/cpuinfo that tell one kind of CPU from another. `flags` is among them because
/// a hypervisor may hide or show features without changing the model.
const CPU_LINES: [&str; 6] = [
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "microcode",
    "flags",
];

/// A file as it was at one moment.
///
/// Hashing a kernel and a root image of some twenty megabytes at each start would cost more than
/// the start itself. The inode's change time, which the kernel sets and no program can set back,
/// moves with every write, truncation, rename and change of attributes; device and inode number
/// tell files apart that exist at the same time, and size, path and modification time those that
/// followed each other under one number. Two versions written within one tick of the kernel's
/// clock (some milliseconds), in place and of equal length, would look alike; an installation that
/// renames new files into place doesn't produce that. What does happen, a copy or a `touch` of the
/// same content, costs one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileIdentity {
    /// Where it is, links resolved.
    pub path: String,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Modification time: seconds since the epoch and nanoseconds.
    pub modified: (i64, i64),
    /// Time of the inode's last change: seconds since the epoch and nanoseconds.
    pub changed: (i64, i64),
}

impl FileIdentity {
    /// Of an open file: what is identified is what will be used, whatever happens to the path.
    fn of(file: &File) -> io::Result<Self> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self::new(&path, &file.metadata()?))
    }

    /// Of the file at `path` now.
    ///
    /// # Errors
    /// When there is none.
    pub fn at(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        Ok(Self::new(&path, &path.metadata()?))
    }

    fn new(path: &Path, metadata: &Metadata) -> Self {
        Self {
            path: path.to_string_lossy().into_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file at its path is still the same.
    pub fn is_current(&self) -> bool {
        Self::at(Path::new(&self.path)).is_ok_and(|now| now == *self)
    }
}

/// The machine that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// How much can be plugged beyond that, in MiB.
    pub hotplug_mib: u32,
    /// What the configuration appends to the guest kernel's command line.
    pub kernel_params: Vec<String>,
    /// Whether the guest's console is the verbose one.
    pub verbose: bool,
    /// The devices, in a wording of their own.
    pub devices: String,
}

/// The host's part: saved CPU state fits the same CPUs under the same kernel's KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Kernel release (uname -r).
    pub kernel: String,
    /// SHA-256 of the first CPU's vendor, family, model, stepping, microcode and features, in hex.
    pub cpu: String,
}

/// All that a template depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// See [`FORMAT`].
    pub format: u32,
    /// Version of the library that had the template made, and with it of the VMM.
    pub version: String,
    /// The machine.
    pub shape: Shape,
    /// The guest kernel.
    pub kernel: FileIdentity,
    /// The guest root image, and with it the agent.
    pub rootfs: FileIdentity,
    /// The VMM program.
    pub vmm: FileIdentity,
    /// The host.
    pub host: Host,
}

impl Identity {
    /// Of the machine that would be booted from `images` with this configuration and size.
    pub(crate) fn of(config: &Config, images: &Images, size: MachineSize) -> io::Result<Self> {
        Ok(Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            shape: Shape {
                vcpus: size.vcpus,
                memory_mib: size.memory_mib,
                hotplug_mib: size.hotplug_mib,
                kernel_params: config.kernel_params.clone(),
                verbose: config.console == Console::Verbose,
                devices: DEVICES.into(),
            },
            kernel: FileIdentity::of(&images.kernel)?,
            rootfs: FileIdentity::of(&images.rootfs)?,
            vmm: FileIdentity::at(&config.vmm)?,
            host: Host::read()?,
        })
    }

    /// The key: the SHA-256 of this identity's JSON.
    pub fn key(&self) -> Key {
        // Strings and numbers can't fail to be written; were it otherwise, the empty text's key
        // would find a template that the VMM refuses.
        let text = serde_json::to_vec(self).unwrap_or_default();
        Key::of(Sha256::digest(text).into())
    }

    /// Whether a start could still use what was made for this identity: no file of it has changed,
    /// nor the host.
    pub fn is_current(&self) -> bool {
        self.format == FORMAT
            && self.version == env!("CARGO_PKG_VERSION")
            && Host::read().is_ok_and(|host| host == self.host)
            && [&self.kernel, &self.rootfs, &self.vmm]
                .iter()
                .all(|file| file.is_current())
    }
}

impl Host {
    fn read() -> io::Result<Self> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let mut bytes = Vec::new();
        let mut file = File::open("/proc/cpuinfo")?;
        let mut part = [0; 4096];
        // Up to the blank line after the first CPU.
        while bytes.len() < CPUINFO_BYTES && !bytes.windows(2).any(|two| two == b"\n\n") {
            match file.read(&mut part)? {
                0 => break,
                read => bytes.extend_from_slice(&part[..read]),
            }
        }
        Ok(Self {
            kernel: kernel.trim().to_owned(),
            cpu: hex(&Sha256::digest(first_cpu(&String::from_utf8_lossy(&bytes)))),
        })
    }
}

/// What tells the kind of the first CPU that /proc/cpuinfo describes.
fn first_cpu(cpuinfo: &str) -> String {
    let lines = cpuinfo.lines().take_while(|line| !line.trim().is_empty());
    let telling = lines.filter(|line| {
        let name = line.split(':').next().unwrap_or_default().trim();
        CPU_LINES.contains(&name)
    });
    telling.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn identity(memory_mib: u32) -> Identity {
        let file = FileIdentity::at(Path::new("/proc/self/exe")).unwrap();
        Identity {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            shape: Shape {
                vcpus: 1,
                memory_mib,
                hotplug_mib: 0,
                kernel_params: Vec::new(),
                verbose: false,
                devices: DEVICES.into(),
            },
            kernel: file.clone(),
            rootfs: file.clone(),
            vmm: file,
            host: Host::read().unwrap(),
        }
    }

    #[test]
    fn whatever_differs_gives_another_key() {
        let base = identity(128);
        assert_eq!(base.key(), identity(128).key());
        let changes: [&dyn Fn(&mut Identity); 10] = [
            &|one| one.format += 1,
            &|one| one.version = "9.9.9".into(),
            &|one| one.shape.vcpus = 2,
            &|one| one.shape.memory_mib = 192,
            &|one| one.shape.hotplug_mib = 2,
            &|one| one.shape.kernel_params = vec!["debug".into()],
            &|one| one.shape.verbose = true,
            &|one| one.kernel.changed.1 += 1,
            &|one| one.vmm.inode += 1,
            &|one| one.host.cpu = "other".into(),
        ];
        let mut keys: Vec<Key> = changes
            .iter()
            .map(|change| {
                let mut other = base.clone();
                change(&mut other);
                other.key()
            })
            .collect();
        keys.push(base.key());
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 11);
    }

    #[test]
    fn a_file_that_was_written_replaced_or_touched_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("vmlinux"), dir.path().join("new"));
        std::fs::write(&path, "one").unwrap();
        let opened = FileIdentity::of(&File::open(&path).unwrap()).unwrap();
        let first = FileIdentity::at(&path).unwrap();
        assert_eq!(first, opened);
        assert!(first.is_current());
        // Longer than the coarsest clock of file times.
        let tick = || std::thread::sleep(std::time::Duration::from_millis(20));
        tick();
        std::fs::write(&path, "two").unwrap();
        assert!(!first.is_current());
        let second = FileIdentity::at(&path).unwrap();
        std::fs::write(&other, "two").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(!second.is_current());
        let third = FileIdentity::at(&path).unwrap();
        tick();
        // Setting the modification time back leaves the change time.
        let times = std::fs::FileTimes::new().set_modified(
            std::time::UNIX_EPOCH
                + std::time::Duration::new(
                    u64::try_from(third.modified.0).unwrap(),
                    u32::try_from(third.modified.1).unwrap(),
                ),
        );
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_times(times)
            .unwrap();
        assert!(!third.is_current());
    }

    #[test]
    fn a_cpu_is_told_by_its_own_lines_only() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t\t: 143\nmodel name\t: X\n\
                    cpu MHz\t\t: 2000.1\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel\t\t: 1\n";
        let wanted = "vendor_id\t: GenuineIntel\nmodel\t\t: 143\nflags\t\t: fpu avx2";
        assert_eq!(first_cpu(text), wanted);
        let own = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        assert!(first_cpu(&own).contains("flags"), "{own}");
        assert_eq!(Host::read().unwrap(), Host::read().unwrap());
    }

    proptest! {
        #[test]
        fn only_keys_are_taken_for_keys(text in "\\PC{0,70}") {
            prop_assert!(Key::parse(&text).is_none() || text.len() == 64);
        }

        #[test]
        fn any_cpuinfo_is_read_without_a_panic(text in "[\\PC\n\t:]{0,400}") {
            let found = first_cpu(&text);
            prop_assert!(found.len() <= text.len());
        }
    }
}
