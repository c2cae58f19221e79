//! `ctr run --cni`: a container without a pod, whose network is wired between its creation and its
//! start. ctr has fixed places for CNI's files, so they are made in a mount namespace of the test's.

use super::servers;
use bulkhead_tests::containerd::{CNI_PLUGINS, Containerd};
use bulkhead_tests::runner::Checks;
use nix::mount::{MsFlags, mount};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;

const NETWORK: &str = r#"{ "cniVersion": "0.4.0", "name": "lone", "plugins": [
    { "type": "bridge", "bridge": "lone0", "isGateway": true,
      "ipam": { "type": "host-local", "dataDir": "/opt/ipam",
                "ranges": [[{ "subnet": "10.90.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } }
] }
"#;

/// Puts a copy of /etc, with a network's configuration, and an /opt with the plugins in place of
/// the host's, for this mount namespace.
pub fn prepare() {
    let tmpfs = |at: &Path| {
        let none = None::<&str>;
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    };
    let opt = Path::new("/opt");
    tmpfs(opt);
    let etc = opt.join("etc");
    let copied = Command::new("cp").args(["-a", "/etc"]).arg(opt).status();
    assert!(copied.unwrap().success());
    std::fs::create_dir_all(etc.join("cni/net.d")).unwrap();
    std::fs::write(etc.join("cni/net.d/10-lone.conflist"), NETWORK).unwrap();
    let none = None::<&str>;
    mount(Some(&etc), "/etc", none, MsFlags::MS_BIND, none).unwrap();
    std::fs::create_dir_all(opt.join("cni")).unwrap();
    std::os::unix::fs::symlink(CNI_PLUGINS, opt.join("cni/bin")).unwrap();
}

/// Takes these away again.
pub fn clean_up() {
    for place in ["/etc", "/opt"] {
        nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

pub fn run(checks: &mut Checks, containerd: &Containerd) {
    checks.check("ctr run --cni: the network comes before the start", || {
        // The bridge is made by the first container's plugin.
        let look = "ip -o address show dev eth0 && ping -c 1 -w 30 10.90.0.1";
        let seen = containerd.run(&["--rm", "--cni"], "lone-1", &["sh", "-c", look]);
        let seen = seen.unwrap().success();
        assert!(seen.contains("inet 10.90.0.2/24"), "{seen}");
        let server = servers::echo(IpAddr::V4(Ipv4Addr::new(10, 90, 0, 1)));
        let talk = format!("echo abc | nc {} {}", server.ip(), server.port());
        let seen = containerd.run(&["--rm", "--cni"], "lone-2", &["sh", "-c", &talk]);
        assert_eq!(seen.unwrap().success(), "bcd\u{b}");
    });
    checks.check("ctr run without a network has a loopback", || {
        let look = "ping -c 1 -w 30 127.0.0.1 >/dev/null && ls /sys/class/net";
        let seen = containerd.run(&["--rm"], "lone-3", &["sh", "-c", look]);
        assert_eq!(seen.unwrap().success(), "lo\n");
    });
    checks.check("ctr run --net-host is refused", || {
        let seen = containerd.run(&["--rm", "--net-host"], "lone-4", &["true"]);
        let seen = seen.unwrap();
        assert_ne!(seen.code, Some(0));
        assert!(seen.stderr.contains("host's own"), "{seen:?}");
    });
}
