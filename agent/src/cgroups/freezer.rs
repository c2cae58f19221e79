//! Freezing a container's processes.

use super::{Cgroup, count_of};
use crate::error::{Context, Failure, Kind};
use std::time::Duration;

/// How long processes may take to stand still; one that waits for a file system can't be frozen
/// before it has its answer.
const WITHIN: Duration = Duration::from_secs(60);

impl Cgroup {
    /// Whether its processes stand still, or are about to.
    pub fn is_frozen(&self) -> Result<bool, Failure> {
        let state = self.read("cgroup.freeze");
        let state = state.context(|| format!("read the state of {}", self.path.display()))?;
        Ok(state.trim_end() == "1")
    }

    /// Returns once all of its processes stand still; when they don't in time, they all go on.
    pub async fn freeze(&self) -> Result<(), Failure> {
        self.switch("1")?;
        if self.settle(1).await {
            return Ok(());
        }
        self.switch("0")?;
        Err(Failure::new(
            Kind::Internal,
            format!(
                "not all processes of {} came to a halt within {} s; they go on",
                self.path.display(),
                WITHIN.as_secs()
            ),
        ))
    }

    /// Lets its processes go on.
    pub async fn thaw(&self) -> Result<(), Failure> {
        self.switch("0")?;
        self.settle(0).await;
        Ok(())
    }

    fn switch(&self, state: &str) -> Result<(), Failure> {
        self.write("cgroup.freeze", state)
            .context(|| format!("freeze or thaw {}", self.path.display()))
    }

    async fn settle(&self, frozen: u64) -> bool {
        let deadline = tokio::time::Instant::now() + WITHIN;
        let mut pause = Duration::from_millis(1);
        loop {
            let events = self.read("cgroup.events").unwrap_or_default();
            if count_of(&events, "frozen") == frozen {
                return true;
            }
            if tokio::time::Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}
