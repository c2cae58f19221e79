//! Which containerd: Debian's, or the current one that scripts/dev builds.

use crate::error::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Environment variable with the folder of a second containerd; scripts/dev sets it when it could
/// build one.
pub const SECOND_ENV: &str = "BULKHEAD_CONTAINERD2";

/// A containerd and ctr that belong together.
#[derive(Debug, Clone)]
pub struct Release {
    pub(super) programs: PathBuf,
}

impl Release {
    /// Debian's package.
    pub fn debian() -> Self {
        Self {
            programs: "/usr/bin".into(),
        }
    }

    /// The current one, built by scripts/dev; `None` where it couldn't be.
    pub fn current() -> Option<Self> {
        let programs = PathBuf::from(std::env::var_os(SECOND_ENV)?);
        programs
            .join("containerd")
            .is_file()
            .then_some(Self { programs })
    }

    /// What `containerd --version` says of itself.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn version(&self) -> Result<String> {
        let output = Command::new(self.programs.join("containerd"))
            .arg("--version")
            .output();
        let output = output.context(|| "run containerd --version".into())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text
            .split_whitespace()
            .nth(2)
            .unwrap_or("unknown")
            .to_owned())
    }

    /// The series that its configuration is written for: 1 for 1.x, else 2.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn series(&self) -> Result<u32> {
        let first = self.version()?.trim_start_matches('v').starts_with("1.");
        Ok(if first { 1 } else { 2 })
    }
}
