//! Where a task's output can go besides FIFOs: files and log programs, and how much of it.

use bulkhead_tests::Artifacts;
use bulkhead_tests::Error;
use bulkhead_tests::fifo::{ReadFifo, WriteFifo};
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use containerd_shim_protos::api;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(120);

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "streams", "").unwrap();
    let log = bundle.beside("task.log");
    bundle
        .set_spec(&spec(&["sh", "-c", "echo to the log; exec sleep 100000"]))
        .unwrap();
    let Some(shim) = checks.require("a container that logs to a file:// URI starts", || {
        let shim = bundle.start().unwrap();
        let uri = format!("file://{}", log.display());
        shim.create(V, ["", &uri, &uri]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    }) else {
        return;
    };
    checks.check("its output is in the file", || {
        wait_for(&log, "to the log\n");
    });
    binary_log(checks, &bundle, &shim);
    bad_uris(checks, &bundle, &shim);
    volume(checks, &bundle, &shim);
    late_reader(checks, &bundle, &shim);
    no_stdin(checks, &bundle, &shim);
    detached_stdin(checks, &bundle, &shim);
    slow_reader(checks, &bundle, &shim);
    reader_gone(checks, &bundle, &shim);
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}

fn wait_for(path: &std::path::Path, text: &str) {
    let end = Instant::now() + SLOW;
    loop {
        let found = std::fs::read_to_string(path).unwrap_or_default();
        if found == text {
            return;
        }
        assert!(Instant::now() < end, "{} holds {found:?}", path.display());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn binary_log(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check("binary://: the program gets both streams, its arguments and the names", || {
        let program = bundle.beside("logger");
        let result = bundle.beside("logged");
        // fd 3 and 4 are the streams, closing 5 means ready (containerd's runtime/v2 README).
        let script = format!(
            "#!/bin/sh\nexec 5>&-\n{{ echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $*\"; cat <&3; cat <&4; }} >{0}.part\nmv {0}.part {0}\n",
            result.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?tag=blue", program.display());
        let speak = process(&["sh", "-c", "echo out; echo err >&2"]);
        shim.exec(V, "log", &speak, ["", &uri, &uri]).unwrap();
        shim.start_process(V, "log").unwrap();
        assert_eq!(shim.wait(V, "log").unwrap().exit_status, 0);
        shim.delete(V, "log").unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !result.exists() {
            assert!(Instant::now() < end, "the log program did not end");
            std::thread::sleep(Duration::from_millis(50));
        }
        let text = std::fs::read_to_string(&result).unwrap();
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        let wanted = format!("{} tag blue", bulkhead_tests::namespace());
        assert!(first.contains(&wanted), "{text}");
        assert_eq!(lines.collect::<Vec<_>>(), ["out", "err"], "{text}");
    });
}

fn bad_uris(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    for (name, uri, text) in [
        ("an unknown scheme", "gopher://x/y", "gopher"),
        (
            "a log program that is not there",
            "binary:///no/such/logger",
            "/no/such/logger",
        ),
        ("a FIFO that is not there", "/no/such/fifo", "/no/such/fifo"),
        (
            "a log file that can't be made",
            "file:///proc/no-folder/log",
            "/proc/no-folder",
        ),
    ] {
        checks.check(&format!("{name} is refused by name"), || {
            let id = "bad-uri";
            let added = shim.exec(V, id, &process(&["true"]), ["", uri, ""]);
            let result = added.and_then(|_| shim.start_process(V, id).map(|_| ()));
            match result {
                Err(Error::Rpc { message, .. }) => assert!(message.contains(text), "{message}"),
                other => panic!("not refused: {other:?}"),
            }
            let _ = shim.delete(V, id);
            assert!(bundle.path().exists());
        });
    }
}

/// What goes through stdin and back: more than all buffers on the way together, many times over.
const VOLUME: usize = 6 << 20;

/// That many bytes in numbered lines of 16.
fn numbered_lines(bytes: usize) -> String {
    (0..bytes / 16)
        .map(|line| format!("{line:015}\n"))
        .collect()
}

fn close_stdin(bundle: &Bundle, shim: &Shim<'_>, exec: &str) {
    let request = api::CloseIORequest {
        id: bundle.id().to_owned(),
        exec_id: exec.into(),
        stdin: true,
        ..Default::default()
    };
    let _: api::Empty = shim.call(V, "CloseIO", &request).unwrap();
}

fn volume(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check("6 MiB through stdin and back are the same bytes", || {
        let mut stdin = WriteFifo::make(&bundle.beside("in")).unwrap();
        let out = ReadFifo::make(&bundle.beside("out")).unwrap();
        shim.exec(
            V,
            "volume",
            // In blocks of a pipe's size: cat's are small, and a system call is dear where guest
            // kernels are emulated.
            &process(&["dd", "bs=64k"]),
            [&stdin.path(), &out.path(), ""],
        )
        .unwrap();
        shim.start_process(V, "volume").unwrap();
        let text = numbered_lines(VOLUME);
        stdin.write(&text).unwrap();
        // A client closes its end first; the shim holds one until CloseIO.
        drop(stdin);
        close_stdin(bundle, shim, "volume");
        assert_eq!(shim.wait(V, "volume").unwrap().exit_status, 0);
        shim.delete(V, "volume").unwrap();
        assert!(out.read(SLOW) == text, "what came back differs");
    });
}

fn no_stdin(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check("a stream that isn't asked for is /dev/null", || {
        let out = ReadFifo::make(&bundle.beside("null-out")).unwrap();
        let script = "readlink /proc/self/fd/0; cat; echo to nobody >&2; echo end";
        let process = process(&["sh", "-c", script]);
        shim.exec(V, "null", &process, ["", &out.path(), ""])
            .unwrap();
        shim.start_process(V, "null").unwrap();
        assert_eq!(shim.wait(V, "null").unwrap().exit_status, 0);
        shim.delete(V, "null").unwrap();
        assert_eq!(out.read(SLOW), "/dev/null\nend\n");
    });
}

fn detached_stdin(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check(
        "stdin lives through a client that leaves and one that comes",
        || {
            let mut first = WriteFifo::make(&bundle.beside("attach-in")).unwrap();
            let path = first.path();
            let log = bundle.beside("attach.log");
            let uri = format!("file://{}", log.display());
            let script = "while read line; do echo got $line; done; echo end";
            let process = process(&["sh", "-c", script]);
            shim.exec(V, "attach", &process, [&path, &uri, ""]).unwrap();
            shim.start_process(V, "attach").unwrap();
            first.write("one\n").unwrap();
            drop(first);
            wait_for(&log, "got one\n");
            let mut second = std::fs::File::options().write(true).open(&path).unwrap();
            std::io::Write::write_all(&mut second, b"two\n").unwrap();
            drop(second);
            wait_for(&log, "got one\ngot two\n");
            close_stdin(bundle, shim, "attach");
            assert_eq!(shim.wait(V, "attach").unwrap().exit_status, 0);
            shim.delete(V, "attach").unwrap();
            wait_for(&log, "got one\ngot two\nend\n");
        },
    );
}

/// A FIFO with both ends held here, so that nobody reads it until this side does.
fn held_fifo(path: &std::path::Path) -> std::fs::File {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut options = std::fs::File::options();
    options.read(true).write(true).open(path).unwrap()
}

/// More than a pipe holds, less than all buffers between a process and its reader.
const UNREAD: usize = 150 << 10;

fn slow_reader(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check(
        "a process that ends before its output is read loses none",
        || {
            let path = bundle.beside("slow");
            let text = numbered_lines(UNREAD);
            std::fs::write(bundle.path().join("rootfs/unread"), &text).unwrap();
            let mut reader = held_fifo(&path);
            let uri = path.display().to_string();
            shim.exec(V, "slow", &process(&["cat", "/unread"]), ["", &uri, ""])
                .unwrap();
            shim.start_process(V, "slow").unwrap();
            assert_eq!(shim.wait(V, "slow").unwrap().exit_status, 0);
            let read = std::thread::scope(|scope| {
                let slowly = scope.spawn(|| {
                    let mut all = vec![0; UNREAD];
                    for part in all.chunks_mut(UNREAD / 10) {
                        std::io::Read::read_exact(&mut reader, part).unwrap();
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    all
                });
                shim.delete(V, "slow").unwrap();
                slowly.join().unwrap()
            });
            assert!(read == text.as_bytes(), "what was read differs");
        },
    );
}

fn reader_gone(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check(
        "a reader that is gone holds up nobody else, nor the end",
        || {
            let path = bundle.beside("gone");
            let reader = held_fifo(&path);
            let uri = path.display().to_string();
            shim.exec(V, "gone", &process(&["yes"]), ["", &uri, ""])
                .unwrap();
            shim.start_process(V, "gone").unwrap();
            drop(reader);
            shim.exec(V, "other", &process(&["true"]), [""; 3]).unwrap();
            shim.start_process(V, "other").unwrap();
            assert_eq!(shim.wait(V, "other").unwrap().exit_status, 0);
            shim.delete(V, "other").unwrap();
            shim.kill(V, "gone", 9, false).unwrap();
            assert_eq!(shim.wait(V, "gone").unwrap().exit_status, 137);
            shim.delete(V, "gone").unwrap();
        },
    );
}

fn late_reader(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check(
        "output written before anyone reads, and before the exit, is not lost",
        || {
            let path = bundle.beside("late");
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
            // A holder, as containerd is one, that doesn't read yet.
            let mut reader = std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            let uri = path.display().to_string();
            shim.exec(
                V,
                "late",
                &process(&["echo", "said before anyone listened"]),
                ["", &uri, ""],
            )
            .unwrap();
            shim.start_process(V, "late").unwrap();
            assert_eq!(shim.wait(V, "late").unwrap().exit_status, 0);
            let mut bytes = [0; 28];
            std::io::Read::read_exact(&mut reader, &mut bytes).unwrap();
            assert_eq!(&bytes, b"said before anyone listened\n");
            shim.delete(V, "late").unwrap();
        },
    );
}
