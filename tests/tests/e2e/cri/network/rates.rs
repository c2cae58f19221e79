//! Limits of a pod's interfaces, by the host's configuration and by the pod's annotations, through
//! every way in which a daemon hands annotations over. What takes so long is measured from outside:
//! the guest's kernel answers echo requests, and a limit's own arithmetic says how long that takes
//! at least, however slow the guest is.

use super::super::client::Client;
use super::super::{IGNORED, Pod, own_network, pod_config};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, Release, SANDBOX_IMAGE};
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::packets::echoes;
use bulkhead_tests::runner::Checks;
use std::net::Ipv4Addr;
use std::time::Duration;

const SETTINGS: &str = "memory_mib = 160\n";
/// Frames a second; one may come at once.
const FRAMES: u32 = 4;
/// Bytes a second; 64 KiB may come at once.
const BYTES: u32 = 12 << 10;
const AT_ONCE: u32 = 64 << 10;
/// Echo requests for a limit of frames, and for one of bytes, and their lengths. With headers of
/// Ethernet and IPv4 a long one has 1434 bytes. Answers that wait for a limit, all but 45 of the
/// long ones, must be fewer than a guest's kernel keeps: it drops those beyond the buffer of its
/// ICMP socket, some 57 of them.
const FEW: u16 = 24;
const MANY: u16 = 84;
const LONG: usize = 1400;
const LONG_FRAME: u32 = 1434;
/// For answers to all of them.
const PATIENCE: Duration = Duration::from_secs(90);

pub fn debian(checks: &mut Checks, artifacts: &Artifacts) {
    through(checks, artifacts, &Release::debian(), "podsandbox");
}

pub fn current(checks: &mut Checks, artifacts: &Artifacts) {
    match Release::current() {
        Some(release) => through(checks, artifacts, &release, "podsandbox"),
        None => checks.check("found", || panic!("the current containerd has gone")),
    }
}

pub fn sandboxer(checks: &mut Checks, artifacts: &Artifacts) {
    match Release::current() {
        Some(release) => through(checks, artifacts, &release, "shim"),
        None => checks.check("found", || panic!("the current containerd has gone")),
    }
}

/// How long answers take.
struct Taken {
    /// To [`FEW`] short requests, and to [`MANY`] long ones.
    few: Duration,
    many: Duration,
}

fn through(checks: &mut Checks, artifacts: &Artifacts, release: &Release, sandboxer: &str) {
    let name = format!("containerd {}, {sandboxer}", release.version().unwrap());
    let Some((containerd, client)) = checks.require(&name, || {
        own_network();
        let containerd =
            Containerd::start_with_sandboxer(artifacts, release, SETTINGS, sandboxer).unwrap();
        containerd.import_busybox_as(SANDBOX_IMAGE).unwrap();
        let client = Client::connect(&containerd.socket());
        (containerd, client)
    }) else {
        return;
    };
    let pods = Cgroup::make("pods").unwrap();
    let before = Snapshot::take(&IGNORED);
    let host = Host {
        containerd: &containerd,
        client: &client,
        pods: &pods,
    };
    let free = checks.require("without a limit", || {
        host.measure("free", &[], |ip| Taken {
            few: shortest(ip, FEW, 8),
            many: shortest(ip, MANY, LONG),
        })
    });
    if let Some(free) = free {
        host.limited(checks, &free);
    }
    checks.check("what is no limit is refused, by its name", || {
        let error = host.run("odd", &[("io.bulkhead.network.speed", "1")]);
        let error = error.err().unwrap();
        assert!(error.contains("io.bulkhead.network.speed"), "{error}");
        assert!(error.contains("no such setting"), "{error}");
    });
    drop(client);
    checks.check("nothing is left", || before.assert_nothing_added(&IGNORED));
}

/// Least time that answers to so many requests took, of three.
#[track_caller]
fn shortest(ip: Ipv4Addr, count: u16, length: usize) -> Duration {
    (0..3).map(|_| taken(ip, count, length)).min().unwrap()
}

#[track_caller]
fn taken(ip: Ipv4Addr, count: u16, length: usize) -> Duration {
    let taken = echoes(ip, count, length, PATIENCE).unwrap();
    taken.unwrap_or_else(|| panic!("{ip} has not answered all {count} requests"))
}

struct Host<'a> {
    containerd: &'a Containerd,
    client: &'a Client,
    pods: &'a Cgroup,
}

impl Host<'_> {
    fn run(&self, name: &str, annotations: &[(&str, &str)]) -> Result<Pod<'_>, String> {
        let mut config = pod_config(self.containerd, self.pods, name);
        config.annotations = (annotations.iter())
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        match self.client.run_pod(&config) {
            Ok(id) => Ok(Pod {
                client: self.client,
                config,
                id,
            }),
            Err(status) => Err(status.message().to_owned()),
        }
    }

    /// What `measure` finds on a pod, whose neighbours know it already.
    #[track_caller]
    fn measure<T>(
        &self,
        name: &str,
        annotations: &[(&str, &str)],
        measure: impl FnOnce(Ipv4Addr) -> T,
    ) -> T {
        let pod = self.run(name, annotations);
        let pod = pod.unwrap_or_else(|error| panic!("{error}: {}", self.containerd.log_tail(12)));
        let status = self.client.pod_status(&pod.id).unwrap();
        let ip = status.network.unwrap_or_default().ip.parse().unwrap();
        taken(ip, 1, 8);
        let measured = measure(ip);
        self.client.stop_pod(&pod.id).unwrap();
        self.client.remove_pod(&pod.id).unwrap();
        measured
    }

    fn limited(&self, checks: &mut Checks, free: &Taken) {
        let frames = FRAMES.to_string();
        let bytes = BYTES.to_string();
        // One may pass at once, and another is on its way when the clock begins.
        let few = Duration::from_secs_f64(f64::from(u32::from(FEW) - 2) / f64::from(FRAMES));
        let all = u32::from(MANY - 1) * LONG_FRAME;
        let many = Duration::from_secs_f64(f64::from(all - AT_ONCE) / f64::from(BYTES));
        let slow = |what: &str, taken: Duration, least: Duration, free: Duration| {
            println!("{what}: {taken:.1?}, at least {least:.1?}; without a limit {free:.1?}");
            assert!(taken >= least, "{taken:?} is faster than {least:?}");
            assert!(
                free * 2 < taken,
                "without a limit it takes {free:?}, with one {taken:?}"
            );
        };
        let few_of = |ip| taken(ip, FEW, 8);
        for direction in ["to_guest", "from_guest"] {
            let name = format!("io.bulkhead.network.{direction}_frames_per_second");
            checks.check(&format!("an annotation limits frames {direction}"), || {
                let pod = format!("frames-{}", &direction[..2]);
                let taken = self.measure(&pod, &[(&name, &frames)], few_of);
                slow("frames", taken, few, free.few);
            });
            let name = format!("io.bulkhead.network.{direction}_bytes_per_second");
            checks.check(&format!("an annotation limits bytes {direction}"), || {
                let pod = format!("bytes-{}", &direction[..2]);
                let many_of = |ip| taken(ip, MANY, LONG);
                let taken = self.measure(&pod, &[(&name, &bytes)], many_of);
                slow("bytes", taken, many, free.many);
            });
        }
        checks.check("the host's limit holds, whatever a pod asks for", || {
            let settings =
                format!("{SETTINGS}[network]\nfrom_guest_frames_per_second = {FRAMES}\n");
            self.containerd.configure_shims(&settings).unwrap();
            let more = ("io.bulkhead.network.from_guest_frames_per_second", "100000");
            let taken = self.measure("more", &[more], few_of);
            slow("frames", taken, few, free.few);
        });
        self.containerd.configure_shims(SETTINGS).unwrap();
    }
}
