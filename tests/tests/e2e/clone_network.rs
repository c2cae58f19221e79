//! What clones' networks draw at random: a connection's initial sequence number, and vsock ports.

use crate::templates::{Templates, assert_cloned};
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::spec;
use std::path::Path;
use std::process::Command;

/// The program that looks, from inside a container.
const PROGRAM: &str = env!("CARGO_BIN_EXE_network-secrets");
const CLONES: usize = 3;
/// Sequence numbers (of 64 ns each) that a connection's clock may be off: half a second.
const CLOCK: u32 = 1 << 23;
/// Ports that one guest may have chosen before the one that is seen.
const PORTS: u32 = 1000;

/// What one clone's network has drawn.
struct Drawn {
    /// One for each of three connections.
    tcp: Vec<u32>,
    vsock: u32,
}

pub fn run(checks: &mut Checks, templates: &Templates<'_>) {
    let drawn = checks.require("three clones open connections", || {
        (0..CLONES)
            .map(|number| drawn_by(templates, &format!("network{number}")))
            .collect::<Vec<_>>()
    });
    let Some(drawn) = drawn else { return };
    let each_pair = |differ: &dyn Fn(&Drawn, &Drawn)| {
        for (index, one) in drawn.iter().enumerate() {
            drawn[..index].iter().for_each(|other| differ(one, other));
        }
    };
    checks.check(
        "clones count TCP sequences from secrets of their own",
        || {
            each_pair(&|one, other| {
                let mut pairs = one.tcp.iter().zip(&other.tcp);
                // Two of them may come close by chance, but not three.
                let same = pairs.all(|(one, other)| near(*one, *other, CLOCK));
                assert!(!same, "{:x?} and {:x?}", one.tcp, other.tcp);
            });
        },
    );
    checks.check("clones choose vsock ports of their own", || {
        each_pair(&|one, other| {
            assert!(
                !near(one.vsock, other.vsock, PORTS),
                "{} and {}",
                one.vsock,
                other.vsock
            );
        });
    });
}

/// Whether two numbers of a circle of 2^32 are at most `distance` apart.
fn near(one: u32, other: u32, distance: u32) -> bool {
    one.wrapping_sub(other).min(other.wrapping_sub(one)) <= distance
}

fn drawn_by(templates: &Templates<'_>, id: &str) -> Drawn {
    let argv = ["/network-secrets"];
    let mut pod = templates.pod(id, &argv);
    let mut spec = spec(&argv);
    for set in ["bounding", "effective", "permitted"] {
        let capabilities = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        capabilities.push("CAP_NET_ADMIN".into());
    }
    pod.bundle.set_spec(&spec).unwrap();
    install(PROGRAM, &pod.bundle.path().join("rootfs"));
    let output = pod.run();
    assert_cloned(&pod.log());
    let values = |name: &str| -> Vec<u32> {
        let lines = output.lines().filter_map(|line| line.strip_prefix(name));
        lines.map(|value| value.parse().unwrap()).collect()
    };
    let (tcp, vsock) = (values("tcp "), values("vsock "));
    assert_eq!((tcp.len(), vsock.len()), (3, 1), "{output}");
    Drawn {
        tcp,
        vsock: vsock[0],
    }
}

/// Copies a program to the root, and the libraries that it is linked with.
pub fn install(program: &str, rootfs: &Path) {
    let name = Path::new(program).file_name().unwrap();
    std::fs::copy(program, rootfs.join(name)).unwrap();
    let libraries = Command::new("ldd").arg(program).output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    for library in libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let copy = rootfs.join(library.trim_start_matches('/'));
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        std::fs::copy(library, copy).unwrap();
    }
}
