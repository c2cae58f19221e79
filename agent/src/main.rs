//! `bulkhead-agent`: PID 1 of every Bulkhead guest.
//!
//! It listens on three vsock ports: on one it serves the `Agent` service of `agent.proto` (ttrpc), on
//! the second it accepts the byte streams of processes, on the third connections to servers on the
//! guest's loopback. It runs on a single thread for its whole
//! life: that keeps its memory small, and it makes a plain `clone` safe, since no other thread can
//! hold a lock at that moment. Every system call and every page it touches before it is ready
//! delays each container, so whatever can wait does (see [`init`]).
//!
//! ```text
//! bulkhead-agent                                   PID 1 of a guest
//! bulkhead-agent --listen-unix DIR [--cgroup DIR]  outside a guest, for tests: Unix sockets
//!                                                  DIR/agent.sock, DIR/stream.sock and
//!                                                  DIR/forward.sock
//! ```

// Rust's own start-up asks the kernel for about twenty things that this program doesn't need.
#![cfg_attr(not(test), no_main)]

mod capabilities;
mod cgroups;
mod container;
mod error;
mod generation;
mod init;
mod log;
mod namespaces;
mod network;
mod process;
mod reaper;
mod rootfs;
mod seccomp;
mod server;
mod slots;
mod spares;
mod spec;
mod storage;
mod streams;
mod syscalls;
mod transport;
mod users;
mod warm;

use crate::error::{Context, Failure, Kind};
use crate::init::Surroundings;
use std::ffi::{CStr, c_char, c_int};

/// Entered by the C library's start-up code.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code))]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    let arguments: Vec<String> = (1..count)
        .map(|index| {
            // SAFETY: argv has argc entries, each a C string that lives as long as the process.
            let argument = unsafe { CStr::from_ptr(*argv.add(index)) };
            argument.to_string_lossy().into_owned()
        })
        .collect();
    match run(&arguments) {
        Ok(()) => 0,
        Err(failure) => {
            // In a guest the kernel panics as soon as PID 1 returns; this line tells why.
            if rustix::process::getpid().is_init() {
                let _ = log::to_kernel();
            }
            log::error(failure);
            1
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Failure> {
    let surroundings = parse(arguments)?;
    let null = init::standard_descriptors().context(|| "open /dev/null")?;
    let doors = server::listen(&surroundings)?;
    init::ignore_broken_pipes();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the event loop")?;
    runtime.block_on(server::serve(surroundings, doors, null))
}

fn parse(arguments: &[String]) -> Result<Surroundings, Failure> {
    let mut words = arguments.iter().map(String::as_str);
    let usage = |problem: String| {
        Failure::new(
            Kind::InvalidArgument,
            format!("{problem}; usage: bulkhead-agent [--listen-unix DIR [--cgroup DIR]]"),
        )
    };
    let mut folder = None;
    let mut cgroup = None;
    while let Some(word) = words.next() {
        let slot = match word {
            "--listen-unix" => &mut folder,
            "--cgroup" => &mut cgroup,
            // The kernel hands PID 1 the words of its command line that nothing else took.
            _ if rustix::process::getpid().is_init() => continue,
            other => return Err(usage(format!("unknown argument {other:?}"))),
        };
        let value = words
            .next()
            .ok_or_else(|| usage(format!("{word} needs a value")))?;
        *slot = Some(value.into());
    }
    match (folder, cgroup) {
        (Some(sockets), cgroup) => Ok(Surroundings::Outside { sockets, cgroup }),
        (None, None) if rustix::process::getpid().is_init() => Ok(Surroundings::Guest),
        (None, _) => Err(usage("not started as PID 1 of a guest".to_owned())),
    }
}
