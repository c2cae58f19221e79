//! Where `scripts/dev build` has put what is tested.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Environment variable that names the folder; scripts/dev sets it.
pub const FOLDER_ENV: &str = "BULKHEAD_OUT";

/// Environment variable with the folder of public programs that test file systems, pjdfstest and
/// fsx; scripts/dev sets it when it could build them.
pub const FILE_SYSTEM_PROGRAMS_ENV: &str = "BULKHEAD_FS_PROGRAMS";

/// That folder, if the programs are there.
pub fn file_system_programs() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os(FILE_SYSTEM_PROGRAMS_ENV)?);
    let there = |name: &&str| folder.join(name).is_file();
    ["pjdfstest", "fsx"].iter().all(there).then_some(folder)
}

/// The products of the build.
#[derive(Debug, Clone)]
pub struct Artifacts {
    folder: PathBuf,
}

impl Artifacts {
    /// Takes the folder from [`FOLDER_ENV`], or target/bulkhead of this workspace.
    ///
    /// # Errors
    /// When one of the files is missing.
    pub fn find() -> Result<Self> {
        let folder = std::env::var_os(FOLDER_ENV)
            .map_or_else(|| workspace().join("target/bulkhead"), PathBuf::from);
        let found = Self { folder };
        for file in [
            found.kernel(),
            found.rootfs(),
            found.program("bulkhead-vmm"),
        ] {
            if !file.is_file() {
                return Err(Error::Unexpected(format!(
                    "{} is missing; run scripts/dev build",
                    file.display()
                )));
            }
        }
        Ok(found)
    }

    /// The guest kernel, an uncompressed vmlinux.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// The kernel's symbols, if the kernel's build has left them there.
    pub fn system_map(&self) -> PathBuf {
        self.folder.join("System.map")
    }

    /// The guest root image.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs.erofs")
    }

    /// The root image of the guest in which I/O and network are measured; there is one once
    /// `scripts/dev bench io` or `net` was called.
    pub fn bench_rootfs(&self) -> PathBuf {
        self.folder.join("bench.erofs")
    }

    /// The static fio of that image.
    pub fn fio(&self) -> PathBuf {
        self.folder.join("bench-fio")
    }

    /// PID 1 of that image.
    pub fn bench_guest(&self) -> PathBuf {
        self.folder.join("bench-guest")
    }

    /// Folder of the templates that all tests share but those of templates themselves: each kind
    /// of machine then boots once for a whole run.
    pub fn templates(&self) -> PathBuf {
        self.folder.join("test-templates")
    }

    /// Folder of the host's programs.
    pub fn programs(&self) -> PathBuf {
        self.folder.join("bin")
    }

    /// One of the host's programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }
}

/// The workspace's root.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}
