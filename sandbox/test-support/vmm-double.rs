//! Stands in for bulkhead-vmm in the tests of a pod's life, where a real VM would take seconds:
//! keeps the VMM's side of its contract (descriptors, configuration, events, vsock's line
//! protocol), and joins each vsock port to a Unix socket of the test's instead of a guest.
//!
//! The kernel's parameters tell it what to do: `double.sockets=DIR` where the ports are, as
//! `DIR/<port>`, and `DIR/power`, a connection to which is the guest's power-off; `double.mode=` one of `ready`, `fail`, `panic`, `vanish`, `bye` (shuts down when
//! the agent's port is connected).
//!
//! It saves what stands for a machine, and takes that for a template again only unchanged. Files in
//! DIR change its mind: with `no-save` it doesn't save, with `saving` it writes its pid there and
//! hangs instead, with `refuse` it refuses every template, with `lost` a clone ends at once. Each
//! start is noted in `DIR/starts` by a line, `boot` or `clone`.
//!
//! Each size that it is asked for is noted in `DIR/sizes` by a line, in MiB, and reached at once;
//! with `no-plug` in DIR only as far as half of it.
//!
//! It holds the taps of network cards that are plugged in, and notes them and what is unplugged in
//! `DIR/slots` by a line each, `plug SLOT` or `unplug SLOT`.

use bulkhead_proto::guest::AGENT_PORT;
use bulkhead_proto::vmm::{
    CONFIG_FD, Event, ExitReason, FIRST_SPARE_SLOT, HotplugStatus, KvmKind, PluggedSlot, Request,
    Response, Status, VmConfig,
};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

fn main() -> io::Result<()> {
    assert_eq!(
        std::env::args().count(),
        1,
        "a VMM is started without arguments"
    );
    assert_eq!(
        std::env::vars().count(),
        0,
        "a VMM is started with an empty environment"
    );
    let mut text = String::new();
    // SAFETY: the contract gives this descriptor to this process.
    unsafe { File::from_raw_fd(CONFIG_FD) }.read_to_string(&mut text)?;
    let config: VmConfig = serde_json::from_str(&text)?;
    // SAFETY: as above.
    let mut events = unsafe { File::from_raw_fd(config.events_fd) };
    // SAFETY: as above.
    let control = unsafe { UnixListener::from_raw_fd(config.control_fd) };
    // SAFETY: as above.
    let vsock = unsafe { UnixListener::from_raw_fd(config.vsock_fd) };
    let parameter = |name: &str| {
        let found = config
            .kernel_params
            .iter()
            .find_map(|one| one.strip_prefix(name));
        found.unwrap_or_default().to_owned()
    };
    let (sockets, mode) = (parameter("double.sockets="), parameter("double.mode="));
    let told = |name: &str| Path::new(&sockets).join(name).exists();
    if let Some(template) = &config.template {
        // SAFETY: as above.
        let memory = unsafe { File::from_raw_fd(template.memory_fd) };
        // SAFETY: as above.
        let state = unsafe { File::from_raw_fd(template.state_fd) };
        if told("refuse") || read(memory)? != MEMORY || read(state)? != STATE {
            let message = "the checksum is another".into();
            return tell(
                &mut events,
                &Event::Exited(ExitReason::TemplateRefused { message }),
            );
        }
        if told("lost") {
            return tell(&mut events, &Event::Exited(ExitReason::GuestShutdown));
        }
    }
    let mut starts = File::options()
        .create(true)
        .append(true)
        .open(format!("{sockets}/starts"))?;
    let clone = config.template.is_some();
    starts.write_all(if clone { b"clone\n" } else { b"boot\n" })?;
    match mode.as_str() {
        "vanish" => std::process::exit(7),
        "fail" => {
            let message = "cannot create a VM: the double was told so".into();
            return tell(
                &mut events,
                &Event::Exited(ExitReason::VmmFailed { message }),
            );
        }
        _ => tell(
            &mut events,
            &Event::Running {
                kvm: KvmKind::Vmx,
                setup_us: 1,
            },
        )?,
    }
    if mode == "panic" {
        let console_tail = vec!["Kernel panic - not syncing: the double was told so".into()];
        return tell(
            &mut events,
            &Event::Exited(ExitReason::GuestPanic { console_tail }),
        );
    }
    let (power, mut last) = (format!("{sockets}/power"), events.try_clone()?);
    let _ = std::fs::remove_file(&power);
    let power = UnixListener::bind(power)?;
    std::thread::spawn(move || {
        let _ = power.accept();
        let _ = tell(&mut last, &Event::Exited(ExitReason::GuestShutdown));
        std::process::exit(0);
    });
    if !clone {
        tell(
            &mut events,
            &Event::Ready {
                since_start_us: 2,
                userspace_exits: 0,
            },
        )?;
    }
    let (folder, last) = (sockets.clone(), events.try_clone()?);
    std::thread::spawn(move || serve_control(&control, &folder, last));
    for client in vsock.incoming() {
        let client = client?;
        let (sockets, bye) = (sockets.clone(), mode == "bye");
        let events = events.try_clone()?;
        std::thread::spawn(move || serve(client, &sockets, bye.then_some(events)));
    }
    Ok(())
}

fn tell(events: &mut File, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    events.write_all(&line)
}

fn read(mut file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What stands for a machine.
const MEMORY: &[u8] = b"the memory of a machine";
const STATE: &[u8] = b"its state";

/// Connections through vsock that are open; a machine with one isn't saved.
static OPEN: AtomicUsize = AtomicUsize::new(0);

fn serve_control(control: &UnixListener, sockets: &str, mut events: File) -> io::Result<()> {
    let mut hotplug = HotplugStatus {
        requested_mib: 0,
        plugged_mib: 0,
    };
    let mut slots = Slots::default();
    for client in control.incoming() {
        let client = client?;
        let (request, files) = receive(&client)?;
        let mut saved = false;
        let response = match request {
            Request::SaveTemplate {} => save(sockets, files).map(|()| {
                saved = true;
                Response::Ok
            }),
            Request::SetHotplug { mib } => {
                resize(sockets, mib, &mut hotplug, &mut events).map(|()| Response::Ok)
            }
            Request::PlugNet { .. } => slots.plug(sockets, files),
            Request::Unplug { slot } => slots.unplug(sockets, slot).map(|()| Response::Ok),
            Request::Status {} => Ok(Response::Status(Status {
                paused: false,
                ready: true,
                kvm: KvmKind::Vmx,
                userspace_exits: 0,
                devices: Vec::new(),
                plugged: Vec::new(),
                hotplug: Some(hotplug),
            })),
            other => Err(io::Error::other(format!("the double can't {other:?}"))),
        };
        let answer = response.unwrap_or_else(|error| Response::Error {
            message: error.to_string(),
        });
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        (&client).write_all(&line)?;
        if saved {
            tell(&mut events, &Event::Exited(ExitReason::Saved))?;
            std::process::exit(0);
        }
    }
    Ok(())
}

/// Network cards, by their slots.
#[derive(Default)]
struct Slots {
    taken: BTreeMap<u32, Vec<File>>,
}

impl Slots {
    fn plug(&mut self, sockets: &str, taps: Vec<File>) -> io::Result<Response> {
        let mut free = FIRST_SPARE_SLOT..;
        let free = free.find(|slot| !self.taken.contains_key(slot));
        let slot = free.ok_or_else(|| io::Error::other("no slot is free"))?;
        self.taken.insert(slot, taps);
        note(sockets, "slots", &format!("plug {slot}"))?;
        Ok(Response::Plugged {
            slot: PluggedSlot {
                slot,
                address: 0xd000_0000,
                irq: 16,
            },
        })
    }

    fn unplug(&mut self, sockets: &str, slot: u32) -> io::Result<()> {
        let taps = self.taken.remove(&slot);
        taps.ok_or_else(|| io::Error::other("nothing is in this slot"))?;
        note(sockets, "slots", &format!("unplug {slot}"))
    }
}

/// Adds a line to a file.
fn note(sockets: &str, file: &str, line: &str) -> io::Result<()> {
    let path = format!("{sockets}/{file}");
    let mut file = File::options().create(true).append(true).open(path)?;
    writeln!(file, "{line}")
}

fn resize(
    sockets: &str,
    mib: u32,
    hotplug: &mut HotplugStatus,
    events: &mut File,
) -> io::Result<()> {
    note(sockets, "sizes", &mib.to_string())?;
    hotplug.requested_mib = mib;
    if Path::new(sockets).join("no-plug").exists() {
        hotplug.plugged_mib = mib / 2;
        return Ok(());
    }
    hotplug.plugged_mib = mib;
    tell(events, &Event::HotplugReached { mib })
}

fn save(sockets: &str, files: Vec<File>) -> io::Result<()> {
    let [mut memory, mut state] =
        <[File; 2]>::try_from(files).map_err(|_| io::Error::other("two descriptors are needed"))?;
    if OPEN.load(Ordering::SeqCst) > 0 {
        return Err(io::Error::other("a vsock connection is open"));
    }
    if Path::new(sockets).join("no-save").exists() {
        return Err(io::Error::other("the double was told not to"));
    }
    memory.write_all(MEMORY)?;
    let saving = Path::new(sockets).join("saving");
    if saving.exists() {
        std::fs::write(saving, std::process::id().to_string())?;
        loop {
            std::thread::park();
        }
    }
    state.write_all(STATE)
}

fn receive(client: &UnixStream) -> io::Result<(Request, Vec<File>)> {
    let mut bytes = [0; 4096];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut parts = [io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(client.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let (length, mut files) = (message.bytes, Vec::new());
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: the kernel has just put these descriptors into this process.
            files.extend(fds.into_iter().map(|fd| unsafe { File::from_raw_fd(fd) }));
        }
    }
    Ok((serde_json::from_slice(&bytes[..length])?, files))
}

fn serve(client: UnixStream, sockets: &str, bye: Option<File>) -> io::Result<()> {
    OPEN.fetch_add(1, Ordering::SeqCst);
    let served = serve_port(client, sockets, bye);
    OPEN.fetch_sub(1, Ordering::SeqCst);
    served
}

fn serve_port(mut client: UnixStream, sockets: &str, bye: Option<File>) -> io::Result<()> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line);
    let port: u32 = line
        .strip_prefix("CONNECT ")
        .and_then(|port| port.trim_end().parse().ok())
        .ok_or_else(|| io::Error::other("no CONNECT line"))?;
    if let Some(mut events) = bye.filter(|_| port == AGENT_PORT) {
        tell(&mut events, &Event::Exited(ExitReason::GuestShutdown))?;
        std::process::exit(0);
    }
    // Dropping the client is the guest's refusal.
    let guest = UnixStream::connect(format!("{sockets}/{port}"))?;
    client.write_all(b"OK 1073741824\n")?;
    let (back_from, back_to) = (guest.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || pump(back_from, back_to));
    pump(client, guest)
}

fn pump(mut from: UnixStream, mut to: UnixStream) -> io::Result<()> {
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}
