//! `bulkhead check`, and what the programs say about themselves.

use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Finished, search_path};
use bulkhead_tests::runner::Checks;
use serde_json::Value;
use std::process::Command;

fn program(artifacts: &Artifacts, name: &str, arguments: &[&str]) -> Finished {
    let config = artifacts.programs().with_file_name("config.toml");
    let mut command = Command::new(artifacts.program(name));
    command
        .args(arguments)
        .env("PATH", search_path(artifacts))
        .env("BULKHEAD_CONFIG", config);
    command.output().unwrap().into()
}

fn run_without_kvm(artifacts: &Artifacts) -> Finished {
    // Masked in a mount namespace of the command's own.
    let script = "mount -t tmpfs tmpfs /dev && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]);
    command
        .arg(artifacts.program("bulkhead"))
        .args(["check", "--json"]);
    command
        .env("PATH", search_path(artifacts))
        .output()
        .unwrap()
        .into()
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    checks.check(
        "json names the kind of KVM and agrees with the exit code",
        || {
            let finished = program(artifacts, "bulkhead", &["check", "--json"]);
            let report: Value = serde_json::from_str(&finished.stdout).unwrap();
            assert_eq!(
                report["ok"],
                Value::Bool(finished.code == Some(0)),
                "{report}"
            );
            let probe = program(artifacts, "bulkhead-vmm", &["--probe"]);
            if probe.code == Some(0) {
                let probe: Value = serde_json::from_str(&probe.stdout).unwrap();
                assert_eq!(report["kvm"]["kind"], probe["kvm"], "{report} {probe}");
                assert_eq!(report["ok"], true, "{report}");
            }
            for check in report["checks"].as_array().unwrap() {
                let told =
                    check["ok"] == true || !check["advice"].is_null() || check["detail"] != "";
                assert!(told, "a failed check says what to do: {check}");
            }
        },
    );
    checks.check("templates are on, in the folder that is configured", || {
        let finished = program(artifacts, "bulkhead", &["check", "--json"]);
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        let all = report["checks"].as_array().unwrap();
        let found = all.iter().find(|check| check["name"] == "templates");
        let found = found.unwrap();
        assert_eq!(found["ok"], true, "{found}");
        let detail = found["detail"].as_str().unwrap();
        assert!(
            detail.starts_with("on; ") && detail.contains("/templates"),
            "{detail}"
        );
        let listed = program(artifacts, "bulkhead", &["template", "list"]).success();
        assert!(listed.contains("/templates: in use"), "{listed}");
    });
    checks.check("text for people", || {
        let finished = program(artifacts, "bulkhead", &["check"]);
        assert!(
            finished.stdout.to_lowercase().contains("kvm"),
            "{finished:?}"
        );
    });
    checks.check("no /dev/kvm is said, with what to do, and fails", || {
        let finished = run_without_kvm(artifacts);
        assert_eq!(finished.code, Some(1), "{finished:?}");
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!(report["ok"], false);
        let all = report["checks"].as_array().unwrap();
        let kvm = all
            .iter()
            .find(|check| check["name"] == "kvm_device")
            .unwrap();
        assert_eq!(kvm["ok"], false, "{kvm}");
        assert!(kvm["detail"].to_string().contains("/dev/kvm"), "{kvm}");
        assert!(
            !kvm["advice"].is_null() || kvm["detail"].to_string().contains(':'),
            "{kvm}"
        );
    });
    for name in ["bulkhead", "bulkhead-vmm", "bulkhead-bench"] {
        checks.check(&format!("{name} --help and --version"), || {
            assert!(
                program(artifacts, name, &["--help"])
                    .success()
                    .contains("Usage")
            );
            assert!(
                program(artifacts, name, &["--version"])
                    .success()
                    .contains("0.")
            );
        });
    }
    checks.check("the shim's -v and -info", || {
        let version = program(artifacts, "containerd-shim-bulkhead-v2", &["-v"]).success();
        assert!(version.contains("containerd-shim-bulkhead-v2"), "{version}");
        let info = program(artifacts, "containerd-shim-bulkhead-v2", &["-info"]);
        assert_eq!(info.code, Some(0), "{info:?}");
        assert!(
            info.stdout.contains("io.containerd.bulkhead.v2"),
            "{info:?}"
        );
    });
    checks.check("unknown arguments are refused with status 2", || {
        let finished = program(artifacts, "bulkhead", &["chekc"]);
        assert_eq!(finished.code, Some(2), "{finished:?}");
        assert!(finished.stderr.contains("chekc"), "{finished:?}");
    });
}
