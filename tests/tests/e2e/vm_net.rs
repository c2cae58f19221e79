//! Network cards over tap devices, by the contracts of VMM and agent alone. The network is a
//! namespace of the scenario's own with nothing but the tap.

use crate::vm::boot;
use crate::vm_container;
use crate::vm_slots::{attach, detach, unplug};
use crate::vm_template::status;
use bulkhead_proto::vmm::{NetCounters, PluggedSlot, RateLimit, Request, Response};
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::tap;
use bulkhead_tests::vm::{Vm, VmSpec};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [0x02, 0x42, 0x0a, 0x09, 0, 2];
const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
/// Each way. Where kernel mode is emulated, each copy of a MiB takes a guest some seconds.
const TRANSFER: usize = 1 << 19;
/// A bound for a loaded machine whose KVM emulates kernel mode.
const SLOW: Duration = Duration::from_secs(240);

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {error}");
}

fn request() -> Request {
    Request::PlugNet {
        mac: MAC,
        mtu: 1500,
        any_sender: false,
        to_guest: RateLimit::default(),
        from_guest: RateLimit::default(),
        vhost: false,
    }
}

#[track_caller]
fn plug(vm: &Vm, request: &Request, taps: &[File]) -> PluggedSlot {
    match vm.control_with(request, taps).unwrap() {
        Response::Plugged { slot } => slot,
        other => panic!("{other:?}; {}", vm.logs()),
    }
}

/// All zero for a card whose frames don't pass through the VMM.
fn counters(vm: &Vm, slot: PluggedSlot) -> NetCounters {
    let plugged = status(vm).plugged;
    let card = plugged.iter().find(|device| device.slot == slot.slot);
    card.unwrap().net.unwrap_or_default()
}

/// Runs a script in the guest's own network.
fn in_guest(vm: &Vm, id: &str, script: &str) -> String {
    vm_container::run(vm, id, script, |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        for set in ["bounding", "effective", "permitted"] {
            let capabilities = spec["process"]["capabilities"][set].as_array_mut().unwrap();
            capabilities.extend([json!("CAP_NET_ADMIN"), json!("CAP_NET_RAW")]);
        }
    })
}

/// The tap's address in this namespace, and one in the guest.
fn configure(vm: &Vm, id: &str, tap: &str) {
    ip(&format!("address add {HOST}/24 dev {tap}"));
    ip(&format!("link set {tap} up"));
    let script = format!(
        "busybox ip address add {GUEST}/24 dev eth0; busybox ip link set eth0 up; \
         busybox ip link show eth0 > /out"
    );
    let shown = in_guest(vm, id, &script);
    assert!(shown.contains("02:42:0a:09:00:02"), "{shown}");
    assert!(shown.contains("mtu 1500"), "{shown}");
}

/// A VM with two vCPUs, and a network of this scenario's own.
fn start(checks: &mut Checks, artifacts: &Artifacts) -> Option<Vm> {
    let spec = VmSpec {
        vcpus: 2,
        memory_mib: 192,
        ..VmSpec::default()
    };
    checks.require("boots with two vCPUs", || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        boot(&spec, artifacts)
    })
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(vm) = start(checks, artifacts) else {
        return;
    };
    checks.check("what is no card is refused", || bad_requests(&vm));
    let plugged = checks.require("a card is plugged and configured", || {
        let taps = tap::open("tap0", 1).unwrap();
        let slot = plug(&vm, &request(), &taps);
        assert_eq!(attach(&vm, slot).unwrap(), "eth0");
        configure(&vm, "n0", "tap0");
        slot
    });
    let Some(slot) = plugged else { return };
    checks.check("the guest reaches the host", || {
        let pings = in_guest(
            &vm,
            "n1",
            &format!("busybox ping -c 3 -w 100 {HOST} > /out"),
        );
        assert!(pings.contains("3 packets received"), "{pings}");
        println!("{}", pings.lines().last().unwrap_or_default());
    });
    checks.check("bytes arrive as they were sent, both ways", || {
        transfers(&vm, slot, "one queue pair", ["n2", "n3"]);
    });
    checks.check("frames of another address are dropped", || {
        spoofed(&vm, slot);
    });
    checks.check("several queue pairs come in its place", || {
        detach(&vm, slot).unwrap();
        assert_eq!(unplug(&vm, slot.slot), Response::Ok);
        assert_eq!(status(&vm).plugged, []);
        // Nobody holds the tap any more.
        let gone = Command::new("ip").args(["link", "show", "tap0"]).output();
        assert!(!gone.unwrap().status.success());
        let slot = plug(&vm, &request(), &tap::open("tap1", 2).unwrap());
        attach(&vm, slot).unwrap();
        configure(&vm, "n5", "tap1");
        transfers(&vm, slot, "two queue pairs", ["n6", "n7"]);
    });
}

/// The same card with its frames moved by the host's kernel.
pub fn vhost(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(vm) = start(checks, artifacts) else {
        return;
    };
    let open = || -> File {
        let mut options = File::options();
        options.read(true).write(true);
        options.open("/dev/vhost-net").unwrap()
    };
    checks.check("what vhost-net can't do is refused", || {
        let taps = |name| tap::open(name, 1).unwrap();
        let limit = RateLimit {
            frames_per_second: 9,
            ..RateLimit::default()
        };
        let limited = with_vhost(limit);
        let file = || tempfile::tempfile().unwrap();
        let pair = |name, other: File| {
            let mut files = taps(name);
            files.push(other);
            files
        };
        for (request, files, why) in [
            (
                with_vhost(RateLimit::default()),
                taps("tap7"),
                "1 descriptors",
            ),
            (
                with_vhost(RateLimit::default()),
                pair("tap8", file()),
                "/dev/vhost-net",
            ),
            (limited, pair("tap9", open()), "rate limits"),
        ] {
            match vm.control_with(&request, &files).unwrap() {
                Response::Error { message } => assert!(message.contains(why), "{message}"),
                other => panic!("{other:?} instead of {why:?}"),
            }
        }
        assert_eq!(status(&vm).plugged, []);
    });
    for (pairs, names) in [(1, ["v0", "v1", "v2", "v3"]), (2, ["w0", "w1", "w2", "w3"])] {
        let name = format!("{pairs} queue pairs by the host's kernel");
        checks.check(&name, || {
            let tap = format!("tap{pairs}");
            let mut files = tap::open(&tap, pairs).unwrap();
            files.extend((0..pairs).map(|_| open()));
            let slot = plug(&vm, &with_vhost(RateLimit::default()), &files);
            drop(files);
            assert_eq!(attach(&vm, slot).unwrap(), "eth0");
            assert_eq!(tap::vhosts_of(vm.pid()), pairs);
            configure(&vm, names[0], &tap);
            let pings = format!("busybox ping -c 3 -w 100 {HOST} > /out");
            let pings = in_guest(&vm, names[1], &pings);
            assert!(pings.contains("3 packets received"), "{pings}");
            transfers(&vm, slot, &name, [names[2], names[3]]);
            detach(&vm, slot).unwrap();
            assert_eq!(unplug(&vm, slot.slot), Response::Ok);
            let gone = Command::new("ip").args(["link", "show", &tap]).output();
            assert!(!gone.unwrap().status.success());
            assert_eq!(tap::vhosts_of(vm.pid()), 0);
        });
    }
}

fn with_vhost(limit: RateLimit) -> Request {
    Request::PlugNet {
        mac: MAC,
        mtu: 1500,
        any_sender: false,
        to_guest: RateLimit::default(),
        from_guest: limit,
        vhost: true,
    }
}

fn bad_requests(vm: &Vm) {
    let with = |change: fn(&mut [u8; 6], &mut u16)| {
        let (mut mac, mut mtu) = (MAC, 1500);
        change(&mut mac, &mut mtu);
        Request::PlugNet {
            mac,
            mtu,
            any_sender: false,
            to_guest: RateLimit::default(),
            from_guest: RateLimit::default(),
            vhost: false,
        }
    };
    let file = || tempfile::tempfile().unwrap();
    for (request, files, why) in [
        (with(|mac, _| mac[0] = 1), vec![file()], "a unicast address"),
        (with(|_, mtu| *mtu = 67), vec![file()], "at least 68"),
        (request(), vec![], "0 descriptors"),
        (request(), vec![file()], "must be a tap's"),
    ] {
        match vm.control_with(&request, &files).unwrap() {
            Response::Error { message } => assert!(message.contains(why), "{message}"),
            other => panic!("{other:?} instead of {why:?}"),
        }
    }
    assert_eq!(status(vm).plugged, []);
}

/// [`TRANSFER`] bytes to the guest and as many back, in containers of these names.
fn transfers(vm: &Vm, slot: PluggedSlot, what: &str, ids: [&str; 2]) {
    let bytes: Vec<u8> = (0..TRANSFER as u32).map(|at| (at / 7) as u8).collect();
    let expected: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let before = (counters(vm, slot), status(vm).userspace_exits);

    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let begin = Instant::now();
    let sender = {
        let listener = listener.try_clone().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_write_timeout(Some(SLOW)).unwrap();
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let script = format!("busybox nc {HOST} {port} < /dev/null | busybox sha256sum > /out");
    let sum = in_guest(vm, ids[0], &script);
    sender.join().unwrap();
    assert!(sum.starts_with(&expected), "{sum} instead of {expected}");
    let to_guest = begin.elapsed().as_secs_f64();
    let between = (counters(vm, slot), status(vm).userspace_exits);

    let begin = Instant::now();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SLOW)).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let script = format!("busybox yes | busybox head -c {TRANSFER} | busybox nc {HOST} {port}");
    in_guest(vm, ids[1], &script);
    let received = receiver.join().unwrap();
    assert!(received.len() == TRANSFER && received.chunks(2).all(|line| line == b"y\n"));
    let from_guest = begin.elapsed().as_secs_f64();
    let after = (counters(vm, slot), status(vm).userspace_exits);

    println!(
        "{what}, {TRANSFER} bytes: to the guest {to_guest:.1} s, {} frames, {} exits; back \
         {from_guest:.1} s, {} frames, {} exits; containers included",
        between.0.received_frames - before.0.received_frames,
        between.1 - before.1,
        after.0.sent_frames - between.0.sent_frames,
        after.1 - between.1,
    );
    assert_eq!(after.0.spoofed_frames, before.0.spoofed_frames);
}

fn spoofed(vm: &Vm, slot: PluggedSlot) {
    let before = counters(vm, slot);
    let script = format!(
        "busybox ip link set eth0 address 02:42:0a:09:00:99; \
         busybox ping -c 1 -w 5 {HOST} > /out || echo nobody answers >> /out; \
         busybox ip link set eth0 address 02:42:0a:09:00:02"
    );
    let output = in_guest(vm, "n4", &script);
    assert!(output.contains("nobody answers"), "{output}");
    let after = counters(vm, slot);
    assert!(after.spoofed_frames > before.spoofed_frames, "{after:?}");
}
