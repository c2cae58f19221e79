//! The host's end of what is measured: a network namespace of the bench's own with a tap device for
//! the guests, a pair of virtual devices for runc, and the servers.

use crate::guests::placement::Placement;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::tap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The tap device.
pub const TAP: &str = "tap0";
/// The host's address on it.
pub const HOST: &str = "10.9.0.1";
/// The guest's.
pub const GUEST: &str = "10.9.0.2";
/// The host's address on the pair that leads to runc's container.
pub const PAIR_HOST: &str = "10.9.1.1";
/// The network namespace of that container.
pub const NAMESPACE: &str = "bench";
const PAIR_GUEST: &str = "10.9.1.2";
const PAIR: &str = "pair0";
/// Of what answers every message with the same.
pub const ECHO_PORT: u16 = 5202;
/// Of iperf3's server.
const IPERF_PORT: u16 = 5201;

/// The servers; they end with it.
pub struct Link {
    iperf: Child,
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.iperf.kill();
        let _ = self.iperf.wait();
    }
}

impl Link {
    /// Leaves the host's network for one of its own, and starts the servers there.
    ///
    /// # Errors
    /// When something of it fails.
    pub fn new(placement: Option<&Placement>) -> Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .context(|| "make a network namespace".into())?;
        ip("link set lo up")?;
        // How large the frames are and when they come must not hang on what the host prefers: some
        // paces every stream. Every kernel has this one.
        set("/proc/sys/net/ipv4/tcp_congestion_control", "reno")?;
        let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT));
        let listener = listener.context(|| format!("listen on port {ECHO_PORT}"))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = echo(stream);
            }
        });
        let iperf = Command::new("iperf3")
            .args(["--server", "--port", &IPERF_PORT.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(|| "start iperf3 (Debian's package has it)".into())?;
        let link = Self { iperf };
        if let Some(placement) = placement {
            placement.put(link.iperf.id())?;
        }
        let end = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", IPERF_PORT)).is_err() {
            if Instant::now() > end {
                return Err(Error::Unexpected("iperf3's server does not listen".into()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(link)
    }

    /// A new tap device with its address, with several queues or one.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn renew_tap(&self, several: bool) -> Result<()> {
        // The first time there is none.
        let _ = ip(&format!("link delete {TAP}"));
        let several = if several { " multi_queue" } else { "" };
        ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr{several}"))?;
        quiet(TAP)?;
        ip(&format!("address add {HOST}/24 dev {TAP}"))?;
        ip(&format!("link set {TAP} up"))
    }

    /// A pair of devices with one end in a network namespace for runc's container.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make_pair(&self) -> Result<()> {
        ip(&format!("netns add {NAMESPACE}"))?;
        ip(&format!(
            "link add {PAIR} type veth peer name eth0 netns {NAMESPACE}"
        ))?;
        quiet(PAIR)?;
        ip(&format!("address add {PAIR_HOST}/24 dev {PAIR}"))?;
        ip(&format!("link set {PAIR} up"))?;
        ip(&format!(
            "-n {NAMESPACE} address add {PAIR_GUEST}/24 dev eth0"
        ))?;
        ip(&format!("-n {NAMESPACE} link set eth0 up"))
    }
}

/// Nothing but what is measured: no router solicitations and the like.
fn quiet(device: &str) -> Result<()> {
    set(
        &format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"),
        "1",
    )
}

/// Writes a setting of the kernel's, where it is known.
fn set(path: &str, value: &str) -> Result<()> {
    match std::fs::write(path, value) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| format!("write {path}"))
        }
        _ => Ok(()),
    }
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; 64 << 10];
    loop {
        let length = stream.read(&mut message)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&message[..length])?;
    }
}

fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip").args(words.split(' ')).output();
    let output = output.context(|| "run ip".into())?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Unexpected(format!("ip {words}: {why}")))
}

/// Frames that have passed the tap so far, both ways together; one whose segmentation was left to
/// others counts as one.
///
/// # Errors
/// When the kernel's counters can't be read.
pub fn frames() -> Result<u64> {
    let path = "/proc/thread-self/net/dev";
    let text = std::fs::read_to_string(path).context(|| format!("read {path}"))?;
    tap::frames_of(&text, TAP)
        .ok_or_else(|| Error::Unexpected(format!("{path} lacks {TAP}: {text:?}")))
}
