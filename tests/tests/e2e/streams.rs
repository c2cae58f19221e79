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
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}

fn wait_for(path: &std::path::Path, text: &str) {
    let end = Instant::now() + Duration::from_secs(30);
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
        assert!(first.contains("e2e tag blue"), "{text}");
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

fn volume(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check("256 KiB through stdin and back are the same bytes", || {
        let mut stdin = WriteFifo::make(&bundle.beside("in")).unwrap();
        let out = ReadFifo::make(&bundle.beside("out")).unwrap();
        shim.exec(
            V,
            "volume",
            &process(&["cat"]),
            [&stdin.path(), &out.path(), ""],
        )
        .unwrap();
        shim.start_process(V, "volume").unwrap();
        let text: String = (0..256 * 1024 / 16)
            .map(|line| format!("{line:015}\n"))
            .collect();
        stdin.write(&text).unwrap();
        // A client closes its end first; the shim holds one until CloseIO.
        drop(stdin);
        let request = api::CloseIORequest {
            id: bundle.id().to_owned(),
            exec_id: "volume".into(),
            stdin: true,
            ..Default::default()
        };
        let _: api::Empty = shim.call(V, "CloseIO", &request).unwrap();
        assert_eq!(shim.wait(V, "volume").unwrap().exit_status, 0);
        shim.delete(V, "volume").unwrap();
        assert!(out.read(SLOW) == text, "what came back differs");
    });
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
