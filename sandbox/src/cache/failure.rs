//! Notes of what couldn't be made, so that not every start tries again.

use super::{now, read_json};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// How long nobody tries again to make what couldn't be made.
const FAILURE_HOLDS: Duration = Duration::from_secs(600);

/// Why it failed the last time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failure {
    /// When, in seconds since the epoch.
    at: u64,
    reason: String,
}

/// Why it failed a short while ago, as noted at `path`.
pub(crate) fn recent_failure(path: &Path) -> Option<String> {
    let failure: Failure = read_json(path)?;
    let age = now().checked_sub(failure.at)?;
    (age < FAILURE_HOLDS.as_secs()).then_some(failure.reason)
}

/// Notes a failure at `path`.
pub(crate) fn note_failure(path: &Path, reason: &str) {
    let failure = Failure {
        at: now(),
        // Log tails and all: the first lines say it.
        reason: reason.lines().take(4).collect::<Vec<_>>().join("; "),
    };
    let written = serde_json::to_vec(&failure)
        .map_err(io::Error::from)
        .and_then(|text| fs::write(path, text));
    if let Err(error) = written {
        tracing::debug!(%error, "the failure is not noted; the next start tries again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_holds_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("failed");
        assert_eq!(recent_failure(&path), None);
        note_failure(&path, "no\nroom");
        assert_eq!(recent_failure(&path).unwrap(), "no; room");
        let write = |at: u64| {
            let reason = "old".into();
            let text = serde_json::to_vec(&Failure { at, reason }).unwrap();
            fs::write(&path, text).unwrap();
        };
        write(now() - FAILURE_HOLDS.as_secs() - 1);
        assert_eq!(recent_failure(&path), None);
        // A clock that was set back must not hold it for ever.
        write(now() + 1000);
        assert_eq!(recent_failure(&path), None);
    }
}
