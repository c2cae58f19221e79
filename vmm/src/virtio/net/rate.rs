//! Limits of bytes and frames a second.

use bulkhead_proto::vmm::RateLimit;
use std::io;
use std::time::{Duration, Instant};
use vmm_sys_util::timerfd::TimerFd;

/// The part of a second whose worth may come at once.
const BURST: f64 = 0.1;
/// At least a frame whose segmentation is left to others may come at once, in bytes.
const LEAST_BURST: f64 = 65_536.0;
/// Waiting shorter than this isn't worth a wake-up.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// What may pass now.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    capacity: f64,
    /// Less than none after a frame that was longer than what was left.
    level: f64,
}

impl Bucket {
    fn new(per_second: u64, least: f64) -> Option<Self> {
        let per_second = (per_second > 0).then_some(per_second as f64)?;
        let capacity = (per_second * BURST).max(least);
        Some(Self {
            per_second,
            capacity,
            level: capacity,
        })
    }

    fn fill(&mut self, passed: Duration) {
        self.level = (self.level + passed.as_secs_f64() * self.per_second).min(self.capacity);
    }

    /// How long until there is something in it again.
    fn wait(&self) -> Option<Duration> {
        (self.level <= 0.0)
            .then(|| Duration::from_secs_f64(((1.0 - self.level) / self.per_second).min(60.0)))
    }
}

/// One direction's limit.
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
    filled: Instant,
    /// Rings when frames may pass again. Never read: it is watched edge-triggered.
    timer: Option<TimerFd>,
}

impl Limiter {
    /// Keeps `limit` from now on.
    ///
    /// # Errors
    /// When there is a limit, and no timer to be had.
    pub fn new(limit: RateLimit) -> io::Result<Self> {
        let bytes = Bucket::new(limit.bytes_per_second, LEAST_BURST);
        let frames = Bucket::new(limit.frames_per_second, 1.0);
        let limited = bytes.is_some() || frames.is_some();
        let timer = limited.then(TimerFd::new).transpose();
        Ok(Self {
            bytes,
            frames,
            filled: Instant::now(),
            timer: timer.map_err(|error| io::Error::from_raw_os_error(error.errno()))?,
        })
    }

    /// What rings when frames may pass again.
    pub fn timer(&self) -> Option<&TimerFd> {
        self.timer.as_ref()
    }

    /// Whether a frame may pass. If not, the timer rings when one may.
    pub fn allows(&mut self) -> bool {
        let Some(timer) = &mut self.timer else {
            return true;
        };
        let now = Instant::now();
        let passed = now.saturating_duration_since(self.filled);
        self.filled = now;
        let mut wait: Option<Duration> = None;
        for bucket in [&mut self.bytes, &mut self.frames].into_iter().flatten() {
            bucket.fill(passed);
            wait = wait.max(bucket.wait());
        }
        let Some(wait) = wait else {
            return true;
        };
        if let Err(error) = timer.reset(wait.max(LEAST_WAIT), None) {
            // Better too much than never again.
            tracing::warn!("setting a rate limit's timer failed: {error}");
            return true;
        }
        false
    }

    /// A frame of `bytes` bytes has passed.
    pub fn passed(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.level -= bytes as f64;
        }
        if let Some(bucket) = &mut self.frames {
            bucket.level -= 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_limit_everything_passes() {
        let mut limiter = Limiter::new(RateLimit::default()).unwrap();
        for _ in 0..1000 {
            assert!(limiter.allows());
            limiter.passed(65_536);
        }
        assert!(limiter.timer().is_none());
    }

    #[test]
    fn a_debt_is_paid_before_the_next_frame() {
        let mut bucket = Bucket::new(1_000_000, LEAST_BURST).unwrap();
        assert_eq!(bucket.wait(), None);
        bucket.level -= 150_000.0;
        let wait = bucket.wait().unwrap().as_secs_f64();
        assert!((0.05..0.0501).contains(&wait), "{wait}");
        bucket.fill(Duration::from_millis(51));
        assert_eq!(bucket.wait(), None);
        bucket.fill(Duration::from_secs(9));
        assert_eq!(bucket.level, bucket.capacity);
    }

    #[test]
    fn frames_pass_at_their_rate() {
        let limit = RateLimit {
            frames_per_second: 100,
            ..RateLimit::default()
        };
        let mut limiter = Limiter::new(limit).unwrap();
        let begin = Instant::now();
        let mut passed = 0;
        while passed < 30 {
            if limiter.allows() {
                limiter.passed(1);
                passed += 1;
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Ten at once, and one each 10 ms after that.
        assert!(
            begin.elapsed() >= Duration::from_millis(190),
            "{:?}",
            begin.elapsed()
        );
    }
}
