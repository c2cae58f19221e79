//! PID 1 of a bench's guest: does what the host writes on the control disk, one command after the
//! other.
//!
//! | command | what it does |
//! |---|---|
//! | `run PROGRAM ARGUMENT...` | runs it; the output is what it prints |
//! | `write FILE TEXT` | writes into a file that exists, of sysfs or proc |
//! | `create FILE TEXT` | writes a new file |
//! | `mount TYPE SOURCE FOLDER` | makes the folder and mounts there |
//! | `disk SERIAL` | the output is the node of the disk with this serial number |
//! | `ping-pong ADDRESS BYTES COUNT` | sends so many bytes over TCP and waits for as many, again and again; the output is the microseconds of each round |
//! | `off` | ends the machine |
//!
//! With arguments it is an ordinary program that carries out the command which they are.

// Rust's own start-up aborts without standard streams, and the kernel gives it none: /dev is empty.
#![no_main]

use bulkhead_bench_guest::{
    ANSWER_AT, Answer, BLOCK, COMMAND_AT, Command, MAX_OUTPUT, OUTPUT_AT, REST, SERIAL, Stage,
    WORDS_AT,
};
use nix::mount::{MsFlags, mount};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Stdio;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, String>;

/// Between two looks for a command.
const PAUSE: Duration = Duration::from_millis(30);

/// Entered by the C library's start-up code.
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.is_empty() {
        return match carry_out(&arguments) {
            Ok(output) => i32::from(std::io::stdout().write_all(&output).is_err()),
            Err(why) => {
                eprintln!("bulkhead-bench-guest: {why}");
                1
            }
        };
    }
    let ended = match serve() {
        Ok(()) => "told to end".to_owned(),
        Err(error) => error,
    };
    let _ = fs::write("/dev/kmsg", format!("<0>bulkhead-bench-guest: {ended}\n"));
    // Reset is the only way out of such a machine.
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    1
}

fn serve() -> Result<()> {
    for (kind, folder) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/mnt"),
    ] {
        // The kernel may have mounted the third one.
        let _ = mount_at(kind, kind, folder);
    }
    // Programs that are run expect the three standard streams to be open.
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|error| format!("open /dev/null: {error}"))?;
    while null.try_clone().is_ok_and(|copy| copy.into_raw_fd() < 2) {}
    let mut control = Control::open()?;
    loop {
        let command = control.next()?;
        if command.words.first().is_some_and(|verb| verb == "off") {
            return Ok(());
        }
        control.answer(command.number, Stage::Begun)?;
        std::thread::sleep(REST);
        let done = carry_out(&command.words);
        control.answer(command.number, Stage::Ended)?;
        std::thread::sleep(REST);
        let (mut output, stage): (_, fn(u32) -> Stage) = match done {
            Ok(output) => (output, Stage::Done),
            Err(why) => (why.into_bytes(), Stage::Failed),
        };
        output.truncate(MAX_OUTPUT);
        control.finish(command.number, &output, stage)?;
    }
}

fn carry_out(words: &[String]) -> Result<Vec<u8>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["run", program, ref arguments @ ..] => run(program, arguments),
        ["write", file, text] => {
            let opened = File::options().write(true).open(file);
            let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
            written.map_err(|error| format!("write {text:?} to {file}: {error}"))?;
            Ok(Vec::new())
        }
        ["create", file, text] => {
            let written = fs::write(file, text);
            written.map_err(|error| format!("create {file}: {error}"))?;
            Ok(Vec::new())
        }
        ["mount", kind, source, folder] => mount_at(kind, source, folder).map(|()| Vec::new()),
        ["disk", serial] => Ok(disk(serial)?.into_bytes()),
        ["ping-pong", address, bytes, count] => match (bytes.parse(), count.parse()) {
            (Ok(bytes), Ok(count)) => ping_pong(address, bytes, count),
            _ => Err(format!("not numbers: {bytes} {count}")),
        },
        _ => Err(format!("no such command: {words:?}")),
    }
}

fn mount_at(kind: &str, source: &str, folder: &str) -> Result<()> {
    let _ = fs::create_dir_all(folder);
    let done = mount(
        Some(source),
        folder,
        Some(kind),
        MsFlags::empty(),
        None::<&str>,
    );
    done.map_err(|error| format!("mount {kind} {source} on {folder}: {error}"))
}

/// The node of a disk.
fn disk(serial: &str) -> Result<String> {
    let folder = fs::read_dir("/sys/block").map_err(|error| format!("read /sys/block: {error}"))?;
    for entry in folder.flatten() {
        let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end() == serial {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(format!("there is no disk with serial number {serial}"))
}

fn run(program: &str, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = std::process::Command::new(program)
        .args(arguments)
        .env("PATH", "/bin")
        .env("TMPDIR", "/tmp")
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("run {program}: {error}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut why = format!("{program} ended with {}: ", output.status).into_bytes();
    why.extend(output.stderr);
    why.extend(output.stdout);
    Err(String::from_utf8_lossy(&why).into_owned())
}

fn ping_pong(address: &str, bytes: usize, count: usize) -> Result<Vec<u8>> {
    let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    let mut stream = TcpStream::connect(address).map_err(failed("connect"))?;
    stream.set_nodelay(true).map_err(failed("TCP_NODELAY"))?;
    let mut message = vec![7; bytes];
    let mut rounds = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        stream.write_all(&message).map_err(failed("send"))?;
        stream.read_exact(&mut message).map_err(failed("receive"))?;
        rounds.push(begin.elapsed().as_micros().to_string());
    }
    Ok(rounds.join(" ").into_bytes())
}

/// Memory that direct transfers take.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

struct Control {
    disk: File,
    buffer: Box<Aligned>,
    /// Of the command that was taken last.
    number: u32,
}

impl Control {
    fn open() -> Result<Self> {
        let node = disk(SERIAL)?;
        let disk = File::options()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_DIRECT)
            .open(&node)
            .map_err(|error| format!("open {node}: {error}"))?;
        Ok(Self {
            disk,
            buffer: Box::new(Aligned([0; BLOCK])),
            number: 0,
        })
    }

    /// Waits for the next command.
    fn next(&mut self) -> Result<Command> {
        loop {
            self.read(COMMAND_AT)?;
            match Command::announced(&self.buffer.0) {
                Some((number, length)) if number > self.number => {
                    self.number = number;
                    let mut words = Vec::with_capacity(length);
                    while words.len() < length {
                        self.read(WORDS_AT + words.len() as u64)?;
                        let left = (length - words.len()).min(BLOCK);
                        words.extend_from_slice(&self.buffer.0[..left]);
                    }
                    return Command::decode(number, &words)
                        .ok_or_else(|| "a command is no text".to_owned());
                }
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    fn read(&mut self, at: u64) -> Result<()> {
        let read = self.disk.read_exact_at(&mut self.buffer.0, at);
        read.map_err(|error| format!("read the control disk: {error}"))
    }

    fn write(&mut self, at: u64) -> Result<()> {
        let written = self.disk.write_all_at(&self.buffer.0, at);
        written.map_err(|error| format!("write the control disk: {error}"))
    }

    fn answer(&mut self, number: u32, stage: Stage) -> Result<()> {
        self.buffer.0 = Answer { number, stage }.encode();
        self.write(ANSWER_AT)
    }

    /// The output, and then that it's there.
    fn finish(&mut self, number: u32, output: &[u8], stage: fn(u32) -> Stage) -> Result<()> {
        for (index, part) in output.chunks(BLOCK).enumerate() {
            self.buffer.0 = [0; BLOCK];
            self.buffer.0[..part.len()].copy_from_slice(part);
            self.write(OUTPUT_AT + (index * BLOCK) as u64)?;
        }
        self.answer(number, stage(output.len() as u32))
    }
}
