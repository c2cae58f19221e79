//! A thin pool of the device mapper's, as containerd's devmapper snapshotter needs one.

use crate::error::{Context, Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Size of the pool. Its file is sparse.
const DATA: u64 = 512 << 20;

/// Room for what is where in the pool: far more than it takes.
const METADATA: u64 = 8 << 20;

/// Size of a block in the pool, in sectors of 512 bytes.
const BLOCK: u64 = 128;

/// Why there can be no thin pool here, if there can't.
pub fn obstacle() -> Option<String> {
    // Loaded by the kernel itself only once somebody makes a pool.
    let _ = Command::new("modprobe")
        .args(["--quiet", "dm-thin-pool"])
        .output();
    match run("dmsetup", &["targets"]) {
        Ok(targets) if targets.lines().any(|line| line.starts_with("thin-pool")) => None,
        Ok(targets) => Some(format!(
            "this kernel has no thin pools, only {targets:?} (scripts/dev test --svm has one that does)"
        )),
        Err(error) => Some(format!(
            "no device mapper here (scripts/dev test --svm has one): {error}"
        )),
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.context(|| format!("run {program}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(Error::Unexpected(format!(
            "{program} {arguments:?}: {} {}",
            output.status,
            text(&output.stderr)
        ))),
    }
}

/// A pool on two files. Dropping it removes it, with all devices on it.
#[derive(Debug)]
pub struct ThinPool {
    name: String,
    loops: Vec<String>,
}

impl ThinPool {
    /// Makes one with its files in `folder`.
    ///
    /// # Errors
    /// When a device can't be made.
    pub fn make(folder: &Path) -> Result<Self> {
        // The device mapper's names are the host's; a process's number may be of a namespace.
        let unique = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
            .context(|| "name the pool".into())?;
        let name = format!("bulkhead-test-{}", unique.get(..8).unwrap_or_default());
        let mut pool = Self {
            name,
            loops: Vec::new(),
        };
        for (file, size) in [("pool-metadata", METADATA), ("pool-data", DATA)] {
            let path: PathBuf = folder.join(file);
            let made = File::create(&path).and_then(|file| file.set_len(size));
            made.context(|| format!("make {}", path.display()))?;
            let path = path.display().to_string();
            let device = run("losetup", &["--find", "--show", &path])?;
            pool.loops.push(device);
        }
        let table = format!(
            "0 {} thin-pool {} {BLOCK} 0 1 skip_block_zeroing",
            DATA / 512,
            pool.loops.join(" ")
        );
        run("dmsetup", &["create", &pool.name, "--table", &table])?;
        Ok(pool)
    }

    /// Its name below /dev/mapper.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Removes it, with all devices on it.
    ///
    /// # Errors
    /// When somebody still has one of them.
    pub fn remove(mut self) -> Result<()> {
        self.take_away()
    }

    fn take_away(&mut self) -> Result<()> {
        let listed = run("dmsetup", &["ls"])?;
        let names: Vec<&str> = listed
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        let on_it = format!("{}-", self.name);
        for name in names.iter().filter(|name| name.starts_with(&on_it)) {
            run("dmsetup", &["remove", "--retry", name])?;
        }
        if names.contains(&self.name.as_str()) {
            run("dmsetup", &["remove", "--retry", &self.name])?;
        }
        for device in std::mem::take(&mut self.loops) {
            run("losetup", &["--detach", &device])?;
        }
        Ok(())
    }
}

impl Drop for ThinPool {
    fn drop(&mut self) {
        // Taken away already.
        if self.loops.is_empty() {
            return;
        }
        if let Err(error) = self.take_away() {
            eprintln!("a thin pool or a loop device stays: {error}");
        }
    }
}
