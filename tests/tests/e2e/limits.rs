//! cgroup limits: visible inside, and kept.

use bulkhead_tests::Artifacts;
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use containerd_shim_protos::api::Status;
use serde_json::json;
use std::time::Duration;

const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(90);

/// Runs an exec to its end: exit status and output of both streams.
fn exec(bundle: &Bundle, shim: &Shim<'_>, id: &str, script: &str) -> (u32, String) {
    let out = ReadFifo::make(&bundle.beside(id)).unwrap();
    let script = format!("exec 2>&1; {script}");
    shim.exec(
        V,
        id,
        &process(&["sh", "-c", &script]),
        ["", &out.path(), ""],
    )
    .unwrap();
    shim.start_process(V, id).unwrap();
    let status = shim.wait(V, id).unwrap().exit_status;
    let _ = shim.delete(V, id);
    (status, out.read(SLOW))
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "limits", "memory_mib = 160\nvcpus = 2\n").unwrap();
    // A shell as process 1 reaps what execs leave behind, so that it doesn't count against pids.
    let mut limited = spec(&["sh", "-c", "sleep 100000; true"]);
    limited["linux"]["resources"] = json!({
        "memory": { "limit": 8 << 20 },
        "cpu": { "quota": 50000, "period": 100000, "shares": 512 },
        "pids": { "limit": 6 },
        "blockIO": { "weight": 500 }
    });
    limited["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({ "type": "cgroup" }));
    let mount = json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "ro"]
    });
    limited["mounts"].as_array_mut().unwrap().push(mount);
    bundle.set_spec(&limited).unwrap();
    let Some(shim) = checks.require(
        "a container with limits starts, in a VM with two vCPUs",
        || {
            let shim = bundle.start().unwrap();
            shim.create(V, [""; 3]).unwrap();
            shim.start_process(V, "").unwrap();
            shim
        },
    ) else {
        return;
    };
    checks.check(
        "limits stand in the container's cgroup; its hostname; two CPUs are online",
        || {
            let files = ["memory.max", "cpu.max", "pids.max", "io.weight"]
                .map(|f| format!("/sys/fs/cgroup/{f}"));
            let script = format!(
                "cat {} /sys/devices/system/cpu/online /proc/sys/kernel/hostname /proc/self/cgroup",
                files.join(" ")
            );
            let (status, output) = exec(&bundle, &shim, "show", &script);
            assert_eq!(status, 0, "{output}");
            let lines: Vec<&str> = output.lines().collect();
            assert_eq!(
                lines,
                [
                    "8388608",
                    "50000 100000",
                    "6",
                    "default 4950",
                    "0-1",
                    "direct",
                    "0::/"
                ]
            );
        },
    );
    checks.check("cpu: a busy loop is throttled", || {
        let script =
            "i=0; while [ $i -lt 1500000 ]; do i=$((i+1)); done; cat /sys/fs/cgroup/cpu.stat";
        let (status, output) = exec(&bundle, &shim, "busy", script);
        assert_eq!(status, 0, "{output}");
        let throttled = output
            .lines()
            .find_map(|line| line.strip_prefix("nr_throttled "));
        let throttled: u64 = throttled.and_then(|count| count.parse().ok()).unwrap();
        assert!(throttled > 0, "{output}");
    });
    checks.check(
        "memory: what takes too much is killed, and the container lives on",
        || {
            // What is throttled takes twice as long, which is no part of this.
            shim.update(V, &json!({ "cpu": { "quota": -1, "period": 100000 } }))
                .unwrap();
            let script = "dd if=/dev/zero of=/dev/null bs=40M count=1; echo dd ended with $?";
            let (_, output) = exec(&bundle, &shim, "hog", script);
            assert!(output.contains("dd ended with 137"), "{output}");
            let state = shim.state(V, "").unwrap();
            assert_eq!(state.status.enum_value(), Ok(Status::RUNNING), "{state:?}");
        },
    );
    checks.check("pids: one process too many can't be forked", || {
        let script = "for i in 1 2 3 4 5 6; do sleep 2 & done; wait";
        let (status, output) = exec(&bundle, &shim, "forks", script);
        assert!(status != 0 && output.contains("fork"), "{status}: {output}");
    });
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        assert_eq!(shim.wait(V, "").unwrap().exit_status, 137);
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}
