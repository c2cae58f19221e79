//! What a VM is made from, opened and checked before anything is changed on the host.

use crate::config::Config;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// KVM's device.
pub const KVM: &str = "/dev/kvm";

/// Offset and value of EROFS's magic (struct erofs_super_block in the kernel's fs/erofs).
const EROFS_MAGIC_OFFSET: u64 = 1024;
const EROFS_MAGIC: u32 = 0xE0F5_E1E2;

/// Something a VM needs is missing or isn't what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No /dev/kvm.
    #[error(
        "/dev/kvm does not exist: load KVM's module (modprobe kvm_intel or kvm_amd), switch \
         virtualisation on in the firmware, or use a host that offers nested virtualisation"
    )]
    NoKvm,
    /// No right to open it.
    #[error("no right to open /dev/kvm read-write: run as root or as a member of the group kvm")]
    KvmDenied,
    /// Opening it failed otherwise.
    #[error("cannot open /dev/kvm: {0}: look at the kernel's log for KVM's reason")]
    Kvm(io::Error),
    /// A file can't be opened.
    #[error("cannot open the {what} {path}: {cause}: set `{key}` in the configuration", path = .path.display())]
    Open {
        /// Which file.
        what: &'static str,
        /// Its key in the configuration.
        key: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// A file isn't what it should be.
    #[error("the {what} {path} is not usable: {problem}", path = .path.display())]
    Content {
        /// Which file.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it and what it should be.
        problem: String,
    },
}

/// The opened and checked parts of a VM.
#[derive(Debug)]
pub struct Images {
    /// /dev/kvm, read-write.
    pub kvm: File,
    /// The guest kernel, read-only.
    pub kernel: File,
    /// The guest root image, read-only.
    pub rootfs: File,
}

impl Images {
    /// Opens and checks everything that `config` names, and that the VMM is a program.
    ///
    /// # Errors
    /// The first thing that is missing or wrong.
    pub fn open(config: &Config) -> Result<Self, ImageError> {
        let kvm = open_kvm()?;
        let kernel = open_kernel(&config.kernel)?;
        let rootfs = open_rootfs(&config.rootfs)?;
        check_vmm(&config.vmm)?;
        Ok(Self {
            kvm,
            kernel,
            rootfs,
        })
    }
}

/// Opens KVM's device as a VMM needs it.
///
/// # Errors
/// When it's missing, not allowed, or not KVM's.
pub fn open_kvm() -> Result<File, ImageError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map_err(|cause| match (cause.kind(), cause.raw_os_error()) {
            (ErrorKind::NotFound, _) | (_, Some(libc::ENODEV | libc::ENXIO)) => ImageError::NoKvm,
            (ErrorKind::PermissionDenied, _) => ImageError::KvmDenied,
            _ => ImageError::Kvm(cause),
        })?;
    let kind = file.metadata().map_err(ImageError::Kvm)?.file_type();
    if !kind.is_char_device() {
        return Err(ImageError::Kvm(io::Error::other(
            "it is not a character device",
        )));
    }
    Ok(file)
}

/// Opens the guest kernel and checks that it's a 64-bit ELF executable for x86-64.
///
/// # Errors
/// When it's missing or something else.
pub fn open_kernel(path: &Path) -> Result<File, ImageError> {
    const WHAT: &str = "guest kernel";
    let (file, header) = open_with_header::<20>(WHAT, "kernel", path, 0)?;
    let problem = if header[..4] != *b"\x7fELF" {
        "it is not an ELF file; an uncompressed vmlinux is needed, not a bzImage"
    } else if header[4] != 2 || header[5] != 1 {
        "it is not a 64-bit little-endian ELF file"
    } else if u16::from_le_bytes([header[18], header[19]]) != 62 {
        // e_machine, EM_X86_64.
        "it is not built for x86-64"
    } else {
        return Ok(file);
    };
    Err(ImageError::Content {
        what: WHAT,
        path: path.into(),
        problem: problem.into(),
    })
}

/// Opens the guest root image and checks that it's an EROFS file system.
///
/// # Errors
/// When it's missing or something else.
pub fn open_rootfs(path: &Path) -> Result<File, ImageError> {
    const WHAT: &str = "guest root image";
    let (file, magic) = open_with_header::<4>(WHAT, "rootfs", path, EROFS_MAGIC_OFFSET)?;
    let found = u32::from_le_bytes(magic);
    if found != EROFS_MAGIC {
        let problem = format!(
            "it is no EROFS file system: its magic is {found:#010x} instead of {EROFS_MAGIC:#010x}"
        );
        return Err(ImageError::Content {
            what: WHAT,
            path: path.into(),
            problem,
        });
    }
    Ok(file)
}

/// Checks that the VMM is a file that may be executed.
///
/// # Errors
/// When it's missing or not executable.
pub fn check_vmm(path: &Path) -> Result<(), ImageError> {
    const WHAT: &str = "virtual machine monitor";
    let failed = |cause| ImageError::Open {
        what: WHAT,
        key: "vmm",
        path: path.into(),
        cause,
    };
    let metadata = path.metadata().map_err(failed)?;
    if !metadata.is_file() {
        let problem = "it is not a regular file".into();
        return Err(ImageError::Content {
            what: WHAT,
            path: path.into(),
            problem,
        });
    }
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).map_err(|errno| failed(errno.into()))
}

fn open_with_header<const N: usize>(
    what: &'static str,
    key: &'static str,
    path: &Path,
    offset: u64,
) -> Result<(File, [u8; N]), ImageError> {
    let open = |cause| ImageError::Open {
        what,
        key,
        path: path.into(),
        cause,
    };
    let content = |problem: String| ImageError::Content {
        what,
        path: path.into(),
        problem,
    };
    // Non-blocking, so that a FIFO in the file's place doesn't hang the call.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(open)?;
    if !file.metadata().map_err(open)?.is_file() {
        return Err(content("it is not a regular file".into()));
    }
    let mut header = [0; N];
    file.read_exact_at(&mut header, offset)
        .map_err(|cause| match cause.kind() {
            ErrorKind::UnexpectedEof => content(format!(
                "it is cut short: it has no {N} bytes at offset {offset}"
            )),
            _ => content(format!("it cannot be read: {cause}")),
        })?;
    Ok((file, header))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_kernel_must_be_a_64_bit_elf() {
        let own = open_kernel(Path::new("/proc/self/exe"));
        assert!(
            own.is_ok(),
            "this test's own program is an x86-64 ELF file: {own:?}"
        );
        for (bytes, wanted) in [
            (&b"MZ\0\0 a bzImage, perhaps, or not"[..], "not an ELF file"),
            (&b"\x7fELF"[..], "cut short"),
            (
                &b"\x7fELF\x01\x01............................"[..],
                "64-bit",
            ),
            (
                &b"\x7fELF\x02\x01.............................."[..],
                "x86-64",
            ),
        ] {
            let file = file(bytes);
            let error = open_kernel(file.path()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
            assert!(
                error.contains(&file.path().display().to_string()),
                "{error}"
            );
        }
    }

    #[test]
    fn a_root_image_must_be_erofs() {
        let mut image = vec![0; 4096];
        let error = open_rootfs(file(&image).path()).unwrap_err().to_string();
        assert!(error.contains("no EROFS"), "{error}");
        image[1024..1028].copy_from_slice(&EROFS_MAGIC.to_le_bytes());
        assert!(open_rootfs(file(&image).path()).is_ok());
        let error = open_rootfs(file(&image[..1000]).path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("cut short"), "{error}");
        let error = open_rootfs(Path::new("/nonexistent/rootfs.erofs"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/nonexistent/rootfs.erofs") && error.contains("`rootfs`"),
            "{error}"
        );
        let error = open_rootfs(Path::new("/tmp")).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}
