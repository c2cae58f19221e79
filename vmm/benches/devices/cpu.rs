//! CPU time of the devices' threads: the process's, less that of the thread that drives them.

use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Nanoseconds of CPU time of all threads but the calling one.
pub struct DeviceCpu;

fn of_other_threads() -> Duration {
    let read = |clock| Duration::from(clock_gettime(clock).expect("clocks of one's own are there"));
    let own = read(ClockId::CLOCK_THREAD_CPUTIME_ID);
    read(ClockId::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(own)
}

impl Measurement for DeviceCpu {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        of_other_threads()
    }

    fn end(&self, began: Duration) -> Duration {
        of_other_threads().saturating_sub(began)
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        // Criterion can't make statistics of nothing at all.
        value.as_nanos().max(1) as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &Nanoseconds
    }
}

/// As times on the clock are shown, but requests for each CPU second instead of each second.
struct Nanoseconds;

impl ValueFormatter for Nanoseconds {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(
        &self,
        _typical: f64,
        throughput: &Throughput,
        values: &mut [f64],
    ) -> &'static str {
        let Throughput::Elements(requests) = throughput else {
            return "ns";
        };
        for value in values {
            *value /= *requests as f64 * 1000.0;
        }
        "CPU us/request"
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}
