//! A moment by the host's clock, and whether another surely came after it.

use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;

/// How far the clock may have been set back between two moments in all, in nanoseconds: less than
/// what [`super::store::SETTLED`] leaves.
const SET_BACK: i128 = 1_000_000_000;

/// A moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Moment {
    /// By the clock that files' times come from, in nanoseconds since the epoch.
    real: u64,
    /// Since the boot, in nanoseconds: nobody can set that.
    since_boot: u64,
    /// The boot.
    boot: String,
}

impl Moment {
    pub fn now() -> io::Result<Self> {
        use rustix::time::{ClockId, clock_gettime};
        let read = |clock| -> io::Result<u64> {
            let time = Duration::try_from(clock_gettime(clock)).map_err(io::Error::other)?;
            u64::try_from(time.as_nanos()).map_err(io::Error::other)
        };
        Ok(Self {
            real: read(ClockId::Realtime)?,
            since_boot: read(ClockId::Boottime)?,
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
        })
    }

    pub fn nanoseconds(&self) -> i128 {
        self.real.into()
    }

    /// Whether this moment is of the same boot as `earlier`, and the clock hasn't been set back by
    /// a second or more since then.
    pub fn follows(&self, earlier: &Self) -> bool {
        let ahead = |one: &Self| i128::from(one.real) - i128::from(one.since_boot);
        self.boot == earlier.boot
            && self.since_boot >= earlier.since_boot
            && ahead(self) >= ahead(earlier) - SET_BACK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_follows_unless_the_clock_was_set_back_or_the_host_booted() {
        let earlier = Moment::now().unwrap();
        let later = Moment::now().unwrap();
        assert!(later.follows(&earlier) && earlier.follows(&earlier));
        let changed = |change: fn(&mut Moment)| {
            let mut moment = later.clone();
            change(&mut moment);
            moment
        };
        assert!(!changed(|one| one.real -= 2_000_000_000).follows(&earlier));
        assert!(changed(|one| one.real += 2_000_000_000).follows(&earlier));
        assert!(!changed(|one| one.boot.push('x')).follows(&earlier));
    }
}
