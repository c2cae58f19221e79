//! The devices without a guest: a fake driver fills their queues as fast as it can, so that what is
//! measured is the device model alone, at the host's full speed.
//!
//! Each case is measured twice. `wall/…` is the time a request takes with so many in flight, from
//! the driver's notification to the device's interrupt and back; its reciprocal is requests a
//! second. `cpu/…` is the CPU time that the device's thread spends on a request. Backings are in
//! the page cache, and the network is a socket of packets.
//!
//! Run by `scripts/dev bench devices`.

mod block;
mod cpu;
mod fs;
mod net;
mod ring;

use criterion::measurement::Measurement;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use std::time::Duration;

/// A way to measure, with its name in the results.
trait Subject: Measurement {
    const NAME: &'static str;
}

impl Subject for criterion::measurement::WallTime {
    const NAME: &'static str = "wall";
}

impl Subject for cpu::DeviceCpu {
    const NAME: &'static str = "cpu";
}

/// The results of one device.
fn group<'a, M: Subject>(criterion: &'a mut Criterion<M>, device: &str) -> BenchmarkGroup<'a, M> {
    criterion.benchmark_group(format!("{}/{device}", M::NAME))
}

/// Measures batches of `depth` requests, which `batch` makes and waits for; figures are of one.
fn measure<M: Measurement>(
    group: &mut BenchmarkGroup<M>,
    name: &str,
    depth: u16,
    mut batch: impl FnMut(),
) {
    group.throughput(Throughput::Elements(depth.into()));
    group.bench_function(BenchmarkId::new(name, depth), |bencher| {
        bencher.iter(&mut batch);
    });
}

fn all<M: Subject>(criterion: &mut Criterion<M>) {
    block::measure_all(criterion);
    net::measure_all(criterion);
    fs::measure_all(criterion);
}

fn criterion<M: Subject>(measurement: M) -> Criterion<M> {
    Criterion::default()
        .with_measurement(measurement)
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .without_plots()
        .configure_from_args()
}

fn main() {
    all(&mut criterion(criterion::measurement::WallTime));
    all(&mut criterion(cpu::DeviceCpu));
    Criterion::default().final_summary();
}
