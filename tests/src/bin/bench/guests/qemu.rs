//! QEMU's microvm machine with the same kernel, root image and devices.

use super::{Card, DATA_SERIAL, Devices, MAC, MEMORY_MIB, Monitor, Room, ended, tail};
use crate::hold;
use crate::start::qemu::{CPU, MACHINE, PROGRAM, kernel_command_line};
use bulkhead_bench_guest::SERIAL;
use bulkhead_proto::guest::SHARE_TAG;
use bulkhead_tests::error::{Context, Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// QEMU's own file server, which comes with Debian 12's qemu-system-common.
const FILE_SERVER: &str = "/usr/lib/qemu/virtiofsd";

/// A child that is killed when it's dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU, held or let go.
pub struct Qemu {
    qemu: Process,
    file_server: Option<Process>,
    folder: PathBuf,
}

impl Qemu {
    /// Starts it, held.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn prepare(room: &Room, devices: &Devices, control: &Path, folder: &Path) -> Result<Self> {
        let file_server = devices
            .shared
            .as_deref()
            .map(|file| serve_files(file, folder))
            .transpose()?;
        let log = |name: &str| {
            let path = folder.join(name);
            std::fs::File::create(&path).context(|| format!("make {}", path.display()))
        };
        let command = command(room, devices, control, folder)?;
        let child = hold::held(&command)?
            .stdin(Stdio::null())
            .stdout(log("qemu.out")?)
            .stderr(log("qemu.log")?)
            .spawn()
            .context(|| format!("start {PROGRAM}"))?;
        let qemu = Self {
            qemu: Process(child),
            file_server,
            folder: folder.to_owned(),
        };
        hold::wait_until_held(qemu.pid())?;
        Ok(qemu)
    }
}

impl Monitor for Qemu {
    fn pid(&self) -> u32 {
        self.qemu.0.id()
    }

    fn helpers(&self) -> Vec<u32> {
        self.file_server
            .iter()
            .map(|process| process.0.id())
            .collect()
    }

    fn begin(&mut self) -> Result<()> {
        hold::release(self.pid()).map(drop)
    }

    fn announce(&mut self) -> Result<Option<Vec<String>>> {
        Ok(None)
    }

    fn check(&mut self) -> Result<()> {
        let status = self.qemu.0.try_wait();
        match status.context(|| "wait for QEMU".into())? {
            None => Ok(()),
            Some(status) => {
                let words = format!(
                    "its log: {}; console: {}",
                    tail(&self.folder.join("qemu.log")),
                    tail(&self.folder.join("console")),
                );
                Err(ended("QEMU", &status.to_string(), &words))
            }
        }
    }
}

/// Starts the file server on a folder that holds a copy of `file`.
fn serve_files(file: &Path, folder: &Path) -> Result<Process> {
    let share = folder.join("share");
    std::fs::create_dir(&share).context(|| format!("make {}", share.display()))?;
    std::fs::copy(file, share.join("data")).context(|| format!("copy {}", file.display()))?;
    let socket = folder.join("fs.sock");
    let log = folder.join("virtiofsd.log");
    let log_file = std::fs::File::create(&log).context(|| format!("make {}", log.display()))?;
    let child = Command::new(FILE_SERVER)
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", share.display())])
        .args(["-o", "cache=auto"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log_file)
        .spawn()
        .context(|| format!("start {FILE_SERVER}"))?;
    let mut server = Process(child);
    let end = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        let gone = server.0.try_wait().ok().flatten();
        if gone.is_some() || Instant::now() > end {
            let why = tail(&log);
            return Err(Error::Unexpected(format!("{FILE_SERVER}: {gone:?}: {why}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(server)
}

fn command(room: &Room, devices: &Devices, control: &Path, folder: &Path) -> Result<Command> {
    let words = kernel_command_line(room.kvm)?;
    let mut command = Command::new(PROGRAM);
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        // Threads are told apart by their names.
        .args(["-name", "bench,debug-threads=on"])
        .args(["-display", "none", "-cpu", CPU])
        .args(["-smp", &room.vcpus.to_string()])
        .args(["-m", &MEMORY_MIB.to_string()])
        // Virtio 1, as Bulkhead's.
        .args(["-global", "virtio-mmio.force-legacy=false"])
        // What serves queues doesn't wait for the rest of QEMU.
        .args(["-object", "iothread,id=queues"])
        .arg("-serial")
        .arg(format!("file:{}", folder.join("console").display()))
        .arg("-kernel")
        .arg(room.artifacts.kernel())
        .args(["-append", &words]);
    // Guest memory is the file server's, too.
    let machine = match &devices.shared {
        None => MACHINE.to_owned(),
        Some(_) => {
            command.args([
                "-object",
                &format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on"),
            ]);
            format!("{MACHINE},memory-backend=memory")
        }
    };
    command.args(["-M", &machine]);
    let mut disk = |id: &str, serial: &str, file: &Path, more: &str| {
        let file = file.display();
        command.args([
            "-drive",
            &format!("id={id},file={file},format=raw,if=none{more}"),
            "-device",
            &format!("virtio-blk-device,drive={id},serial={serial},iothread=queues"),
        ]);
    };
    // The first device is the first disk.
    disk(
        "root",
        "root",
        &room.artifacts.bench_rootfs(),
        ",readonly=on",
    );
    disk("control", SERIAL, control, "");
    if let Some(data) = &devices.data {
        disk("data", DATA_SERIAL, data, "");
    }
    if devices.shared.is_some() {
        let socket = folder.join("fs.sock");
        command.args([
            "-chardev",
            &format!("socket,id=fs,path={}", socket.display()),
            "-device",
            &format!("vhost-user-fs-device,chardev=fs,tag={SHARE_TAG}"),
        ]);
    }
    if let Some(Card { tap, pairs }) = &devices.card {
        let (queues, several) = match pairs {
            1 => (String::new(), ""),
            more => (format!(",queues={more}"), ",mq=on"),
        };
        let mac: Vec<String> = MAC.iter().map(|byte| format!("{byte:02x}")).collect();
        command.args([
            "-netdev",
            &format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off{queues}"),
            "-device",
            &format!(
                "virtio-net-device,netdev=net,mac={}{several}",
                mac.join(":")
            ),
        ]);
    }
    Ok(command)
}
