//! Terminals: `ctr run -t` below a pty of ours, and resizing.

use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::fifo::{ReadFifo, WriteFifo};
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, process};
use containerd_shim_protos::api;
use std::process::Command;
use std::time::Duration;

const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(60);

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    through_ctr(checks, artifacts);
    resized(checks, artifacts);
}

fn through_ctr(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(containerd) = checks.require("containerd with a busybox image", || {
        let containerd = Containerd::start(artifacts, &Release::debian(), "").unwrap();
        containerd.import_busybox().unwrap();
        containerd
    }) else {
        return;
    };
    checks.check(
        "ctr run -t: a terminal of the caller's size, one stream, the exit code",
        || {
            let script = "tty; stty size; echo to stderr >&2; exit 9";
            let run = containerd.run_command(&["--rm", "--tty"], "tty", &["sh", "-c", script]);
            // script(1) gives ctr a pty of its own; its size is set before ctr looks at it.
            let words: Vec<String> = std::iter::once(run.get_program())
                .chain(run.get_args())
                .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''")))
                .collect();
            let inner = format!("stty rows 33 cols 101; {}", words.join(" "));
            let output = Command::new("script")
                // It takes another shell where the environment names one.
                .env_remove("SHELL")
                .args(["--quiet", "--return", "--command", &inner, "/dev/null"])
                .stdin(std::process::Stdio::null())
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(output.status.code(), Some(9), "{text}");
            let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
            assert!(
                lines.iter().any(|line| line.ends_with("/dev/pts/0")),
                "tty: {text}"
            );
            assert!(lines.contains(&"33 101"), "size: {text}");
            assert!(lines.contains(&"to stderr"), "stderr: {text}");
            assert!(
                text.contains("\r\n"),
                "a terminal ends lines with CR LF: {text:?}"
            );
        },
    );
}

fn resized(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "resize", "").unwrap();
    let Some(shim) = checks.require("a container to exec terminals in", || {
        let shim = bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    }) else {
        return;
    };
    checks.check(
        "ResizePty reaches the exec's terminal, input and echo pass through it",
        || {
            let mut stdin = WriteFifo::make(&bundle.beside("tty-in")).unwrap();
            let out = ReadFifo::make(&bundle.beside("tty-out")).unwrap();
            let mut shell = process(&["sh", "-c", "read line; stty size; echo got $line; exit 4"]);
            shell["terminal"] = true.into();
            shell["consoleSize"] = serde_json::json!({ "height": 10, "width": 20 });
            shim.exec(V, "tty", &shell, [&stdin.path(), &out.path(), ""])
                .unwrap();
            shim.start_process(V, "tty").unwrap();
            let request = api::ResizePtyRequest {
                id: bundle.id().to_owned(),
                exec_id: "tty".into(),
                width: 120,
                height: 40,
                ..Default::default()
            };
            let _: api::Empty = shim.call(V, "ResizePty", &request).unwrap();
            stdin.write("a line\n").unwrap();
            assert_eq!(shim.wait(V, "tty").unwrap().exit_status, 4);
            shim.delete(V, "tty").unwrap();
            let text = out.read(SLOW);
            assert!(text.contains("40 120"), "{text:?}");
            assert!(text.contains("got a line"), "{text:?}");
            assert!(
                text.starts_with("a line\r\n"),
                "the terminal echoes: {text:?}"
            );
        },
    );
    checks.check("control-C on a terminal interrupts: 130", || {
        let mut stdin = WriteFifo::make(&bundle.beside("int-in")).unwrap();
        let out = ReadFifo::make(&bundle.beside("int-out")).unwrap();
        let mut shell = process(&["sh", "-c", "echo ready; exec sleep 100000"]);
        shell["terminal"] = true.into();
        shim.exec(V, "int", &shell, [&stdin.path(), &out.path(), ""])
            .unwrap();
        shim.start_process(V, "int").unwrap();
        std::thread::sleep(Duration::from_secs(5));
        stdin.write("\u{3}").unwrap();
        assert_eq!(shim.wait(V, "int").unwrap().exit_status, 130);
        shim.delete(V, "int").unwrap();
        assert!(out.read(SLOW).contains("ready"));
    });
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}
