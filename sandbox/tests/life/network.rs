//! A pod's network interfaces and the devices that stand for them. The namespace, its interfaces and
//! the taps are real; VMM and agent are doubles.

use crate::common::{Pod, possible, process};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A pod whose container is in a network namespace with one interface, eth0.
struct Joined {
    pod: Pod,
}

impl Joined {
    async fn new() -> Option<Self> {
        if !possible() {
            return None;
        }
        if !Path::new("/dev/net/tun").exists() {
            eprintln!("SKIPPED 1 test: it needs /dev/net/tun");
            return None;
        }
        let this = Self {
            pod: Pod::new("ready").await,
        };
        this.inside("ip link add eth0 type veth peer name far");
        this.inside("ip address add 10.9.0.2/24 dev eth0");
        this.inside("ip link set eth0 up");
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sleep"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "pid"},
                                     {"type": "network", "path": this.pod.netns}]},
        });
        let request = this.pod.request_with("c1", spec);
        this.pod.sandbox.create(request).await.unwrap();
        Some(this)
    }

    /// What a program prints that runs in the namespace.
    #[track_caller]
    fn inside(&self, words: &str) -> String {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.pod.netns.display()));
        let done = command.args(words.split(' ')).output().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{words}: {errors}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// What the VMM was told of its slots.
    fn slots(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.pod.dir.path().join("slots"));
        text.unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(
                Instant::now() < end,
                "{what}: {:?}, {:?}",
                self.slots(),
                self.pod.agent.calls()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn is_redirected(&self) -> bool {
        self.inside("tc qdisc show dev eth0").contains("ingress")
    }

    fn taps(&self) -> Vec<String> {
        let links = self.inside("ip -o link show type tun");
        links.lines().map(str::to_owned).collect()
    }

    async fn end(self) {
        let id = process("c1");
        self.pod.sandbox.start(id.clone()).await.unwrap();
        self.pod.sandbox.signal(id.clone(), 9, true).await.unwrap();
        self.pod.sandbox.wait(id.clone()).await.unwrap();
        self.pod.sandbox.delete(id).await.unwrap();
        assert!(!self.is_redirected());
        assert_eq!(self.taps(), [""; 0]);
        self.pod.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_device_that_the_guest_does_not_let_go_of_stays_until_it_does() {
    let Some(joined) = Joined::new().await else {
        return;
    };
    assert_eq!(joined.slots(), ["plug 32"]);
    assert!(joined.is_redirected());
    let taps = joined.taps();
    assert!(taps.len() == 1 && taps[0].contains(",UP"), "{taps:?}");
    joined.pod.agent.calls();

    joined.pod.agent.clings.store(true, Ordering::Relaxed);
    // A device keeps its address, so it's to be another one.
    joined.inside("ip link set eth0 address 02:00:00:00:00:07");
    let down = |joined: &Joined| joined.taps().iter().all(|tap| !tap.contains(",UP"));
    joined.until("its tap is down", down).await;
    let calls = joined.pod.agent.calls();
    let detached = calls.iter().position(|call| call == "detach 32");
    let told = calls.iter().position(|call| call == "network ");
    assert!(told.is_some() && told < detached, "{calls:?}");
    let id = process("c1");
    let error = joined.pod.sandbox.start(id).await.unwrap_err().to_string();
    assert!(
        error.contains("eth0") && error.contains("does not let go"),
        "{error}"
    );
    assert_eq!(joined.slots(), ["plug 32"]);
    assert!(joined.is_redirected(), "the host would speak for the guest");
    assert_eq!(joined.taps().len(), 1);

    joined.pod.agent.clings.store(false, Ordering::Relaxed);
    joined
        .until("another device", |joined| {
            joined.slots() == ["plug 32", "unplug 32", "plug 32"]
        })
        .await;
    joined
        .until("its tap is up", |joined| {
            let taps = joined.taps();
            taps.len() == 1 && taps[0].contains(",UP") && joined.is_redirected()
        })
        .await;
    joined.end().await;
}

#[tokio::test]
async fn an_interface_that_was_parted_by_others_is_joined_again() {
    let Some(joined) = Joined::new().await else {
        return;
    };
    joined.inside("tc qdisc delete dev eth0 ingress");
    joined.inside("ip address add 10.9.0.3/24 dev eth0");
    joined
        .until("joined again", |joined| {
            joined.slots() == ["plug 32", "unplug 32", "plug 32"] && joined.is_redirected()
        })
        .await;
    joined.end().await;
}
