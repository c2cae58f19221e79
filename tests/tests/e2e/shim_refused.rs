//! What must be refused before any guest boots: one clear error on the call, and nothing left.

use crate::shim_task::assert_refused;
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, spec};
use bulkhead_tests::{Artifacts, Error};
use serde_json::{Value, json};
use std::fs;

const V: TaskVersion = TaskVersion::V3;

/// Starts a shim, creates, and expects a refusal whose message holds each of `texts`. Then nothing
/// may be left but what was there before.
fn create_refused(
    checks: &mut Checks,
    artifacts: &Artifacts,
    name: &str,
    settings: &str,
    spoil: impl FnOnce(&Bundle),
    texts: &[&str],
) {
    checks.check(name, || {
        let before = Snapshot::take(&[]);
        {
            let bundle = Bundle::new(artifacts, "refused", settings).unwrap();
            spoil(&bundle);
            // Already `start` may refuse: containerd shows its stderr as the create call's error.
            match bundle.start() {
                Err(Error::Unexpected(message)) => assert_names(&message, texts),
                Err(error) => panic!("{error}"),
                Ok(shim) => {
                    let with_shim = Snapshot::take(&["file /run/t"]);
                    match shim.create(V, [""; 3]) {
                        Err(Error::Rpc { message, .. }) => assert_names(&message, texts),
                        other => panic!("not refused: {other:?}"),
                    }
                    // Even while the shim lives there is no more than before the call.
                    with_shim.assert_nothing_added(&["file /run/t"]);
                    shim.shutdown(V).unwrap();
                }
            }
            let left: Vec<_> = fs::read_dir(bundle.runtime_dir())
                .into_iter()
                .flatten()
                .collect();
            assert!(left.is_empty(), "in the runtime folder: {left:?}");
        }
        before.assert_nothing_added(&[]);
    });
}

#[track_caller]
fn assert_names(message: &str, texts: &[&str]) {
    for text in texts {
        assert!(message.contains(text), "no {text:?} in: {message}");
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    configuration(checks, artifacts);
    images(checks, artifacts);
    specs(checks, artifacts);
    ids(checks, artifacts);
    no_kvm(checks, artifacts);
}

fn configuration(checks: &mut Checks, artifacts: &Artifacts) {
    for (name, settings, texts) in [
        (
            "an unknown key is refused by its name",
            "vcpu = 2\n",
            &["vcpu"][..],
        ),
        ("no vCPU", "vcpus = 0\n", &["vcpus", "1 to 32"]),
        ("too many vCPUs", "vcpus = 33\n", &["vcpus", "1 to 32"]),
        (
            "too little memory",
            "memory_mib = 16\n",
            &["memory_mib", "32"],
        ),
        (
            "more memory than the host has",
            "memory_mib = 1000000\n",
            &["memory", "MiB"],
        ),
        ("a value of the wrong type", "vcpus = \"two\"\n", &["vcpus"]),
        (
            "a configuration that is no TOML",
            "vcpus = = 1\n",
            &["bulkhead.toml"],
        ),
        (
            "a relative path",
            "kernel = \"vmlinux\"\n",
            &["kernel", "absolute"],
        ),
    ] {
        create_refused(checks, artifacts, name, settings, |_| {}, texts);
    }
    let name = "a configuration file that is not there";
    let remove = |bundle: &Bundle| fs::remove_file(bundle.beside("bulkhead.toml")).unwrap();
    create_refused(
        checks,
        artifacts,
        name,
        "",
        remove,
        &["bulkhead.toml", "No such file"],
    );
}

fn images(checks: &mut Checks, artifacts: &Artifacts) {
    for (name, settings, texts) in [
        (
            "a missing kernel",
            "kernel = \"/nowhere/vmlinux\"\n",
            &["/nowhere/vmlinux", "kernel"][..],
        ),
        (
            "a missing root image",
            "rootfs = \"/nowhere/root\"\n",
            &["/nowhere/root", "rootfs"],
        ),
        (
            "a kernel that is no kernel",
            "kernel = \"/etc/passwd\"\n",
            &["/etc/passwd", "kernel"],
        ),
        (
            "a kernel that is a folder",
            "kernel = \"/usr\"\n",
            &["/usr"],
        ),
        (
            "a root image that is none",
            "rootfs = \"/etc/passwd\"\n",
            &["/etc/passwd"],
        ),
        (
            "a missing VMM",
            "vmm = \"/nowhere/bulkhead-vmm\"\n",
            &["/nowhere/bulkhead-vmm"],
        ),
    ] {
        create_refused(checks, artifacts, name, settings, |_| {}, texts);
    }
}

fn specs(checks: &mut Checks, artifacts: &Artifacts) {
    let changed = |change: fn(&mut Value)| {
        let mut value = spec(&["true"]);
        change(&mut value);
        value.to_string()
    };
    for (name, text, texts) in [
        (
            "a spec that is no JSON",
            "{ \"ociVersion\": ".to_owned(),
            &["config.json"][..],
        ),
        (
            "a spec without a process",
            changed(|s| s["process"] = Value::Null),
            &["process"],
        ),
        (
            "no arguments",
            changed(|s| s["process"]["args"] = json!([])),
            &["args"],
        ),
        (
            "arguments of the wrong type",
            changed(|s| s["process"]["args"] = json!("sh")),
            &["args"],
        ),
        (
            "a relative cwd",
            changed(|s| s["process"]["cwd"] = json!("tmp")),
            &["cwd"],
        ),
        (
            "a spec without a root",
            changed(|s| s["root"] = Value::Null),
            &["root"],
        ),
        (
            "an unknown namespace",
            changed(|s| s["linux"]["namespaces"] = json!([{"type": "moon"}])),
            &["namespace"],
        ),
        (
            "an unknown capability",
            changed(|s| s["process"]["capabilities"]["bounding"] = json!(["CAP_FLY"])),
            &["apabilit"],
        ),
    ] {
        create_refused(
            checks,
            artifacts,
            name,
            "",
            |b| b.write("b/config.json", &text).unwrap(),
            texts,
        );
    }
    let gone = |bundle: &Bundle| fs::remove_file(bundle.path().join("config.json")).unwrap();
    create_refused(
        checks,
        artifacts,
        "a bundle without config.json",
        "",
        gone,
        &["config.json", "No such file"],
    );
    let no_root = |bundle: &Bundle| fs::remove_dir_all(bundle.path().join("rootfs")).unwrap();
    create_refused(
        checks,
        artifacts,
        "a root file system that is not there",
        "",
        no_root,
        &["rootfs"],
    );
    let no_source = |bundle: &Bundle| {
        let mut value = spec(&["true"]);
        let mount = json!({"destination": "/mnt", "type": "bind", "source": "/nowhere/data", "options": ["rbind"]});
        value["mounts"].as_array_mut().unwrap().push(mount);
        bundle.set_spec(&value).unwrap();
    };
    create_refused(
        checks,
        artifacts,
        "a bind mount of nothing",
        "",
        no_source,
        &["/nowhere/data"],
    );
}

fn ids(checks: &mut Checks, artifacts: &Artifacts) {
    for id in ["../up", "a/b", "", ".", "-dash", "sp ace", &"x".repeat(200)] {
        checks.check(&format!("the id {:.12?} is refused", id), || {
            let before = Snapshot::take(&[]);
            {
                let bundle = Bundle::new(artifacts, id, "").unwrap();
                let started = bundle.action(&["start"]).unwrap();
                assert!(
                    matches!(started.code, Some(code) if code != 0),
                    "{started:?}"
                );
                assert!(started.stderr.contains("id"), "{started:?}");
            }
            before.assert_nothing_added(&[]);
        });
    }
    checks.check(
        "an id that differs from the shim's own and is bad is refused by create",
        || {
            let bundle = Bundle::new(artifacts, "good", "").unwrap();
            let shim = bundle.start().unwrap();
            let request = containerd_shim_protos::api::CreateTaskRequest {
                id: "../../etc".into(),
                bundle: bundle.path().display().to_string(),
                ..Default::default()
            };
            let created =
                shim.call::<containerd_shim_protos::api::CreateTaskResponse>(V, "Create", &request);
            assert_refused(created, ttrpc::Code::INVALID_ARGUMENT, "../../etc");
            shim.shutdown(V).unwrap();
        },
    );
}

/// In a mount namespace in which /dev holds no kvm; the scenario has its own, so it goes last.
fn no_kvm(checks: &mut Checks, artifacts: &Artifacts) {
    use nix::mount::{MsFlags, mount, umount2};
    let masked = mount(
        Some("/dev/null"),
        "/dev/kvm",
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    );
    if masked.is_ok() {
        create_refused(
            checks,
            artifacts,
            "a /dev/kvm that is not KVM",
            "",
            |_| {},
            &["/dev/kvm"],
        );
        let _ = umount2("/dev/kvm", nix::mount::MntFlags::MNT_DETACH);
    }
    checks.check("hide /dev/kvm", || {
        let devices = "/run/t/dev";
        fs::create_dir(devices).unwrap();
        for node in ["null", "zero", "urandom", "random"] {
            fs::write(format!("{devices}/{node}"), "").unwrap();
            let flags = MsFlags::MS_BIND;
            let (from, to) = (format!("/dev/{node}"), format!("{devices}/{node}"));
            mount(
                Some(from.as_str()),
                to.as_str(),
                None::<&str>,
                flags,
                None::<&str>,
            )
            .unwrap();
        }
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(devices), "/dev", None::<&str>, flags, None::<&str>).unwrap();
        assert!(!std::path::Path::new("/dev/kvm").exists());
    });
    create_refused(checks, artifacts, "no /dev/kvm", "", |_| {}, &["/dev/kvm"]);
    checks.check("show /dev/kvm again", || {
        umount2("/dev", nix::mount::MntFlags::MNT_DETACH).unwrap();
        for node in ["null", "zero", "urandom", "random"] {
            nix::mount::umount(format!("/run/t/dev/{node}").as_str()).unwrap();
        }
        fs::remove_dir_all("/run/t/dev").unwrap();
    });
}
