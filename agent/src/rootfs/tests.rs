//! The order and the arguments of what is asked of the kernel, by the recording stand-in.

use super::*;
use crate::syscalls::recorder::Recorder;
use serde_json::json;

const ROOT: &str = "/share/c1/rootfs";

fn record(
    spec: serde_json::Value,
    folders: &[&str],
    files: &[&str],
) -> Result<Vec<String>, Failure> {
    let spec = serde_json::from_value(spec).expect("a spec");
    let plan = RootfsPlan::new(&spec, true, false)?;
    let recorder = Recorder::new(folders, files);
    let root = plan.enter(&recorder, None, None)?;
    plan.finish(&recorder, root.as_fd())?;
    Ok(recorder.log.into_inner())
}

fn spec(mounts: serde_json::Value, linux: serde_json::Value) -> serde_json::Value {
    json!({"ociVersion": "1.2.0", "root": {"path": ROOT}, "mounts": mounts, "linux": linux})
}

#[test]
fn nothing_is_left_of_the_guest_and_the_root_is_pivoted_last() {
    let mounts =
        json!([{"destination": "/dev", "type": "bind", "source": "/vol", "options": ["rbind"]}]);
    let log = record(spec(mounts, json!({})), &[ROOT, "/vol", "/dev"], &[]).expect("built");
    let private = libc::MS_PRIVATE | libc::MS_REC;
    assert_eq!(
        log,
        [
            format!("propagation / {private:#x}"),
            format!("clone {ROOT} recursive=true"),
            format!("attach {ROOT} to {ROOT}"),
            "clone /vol recursive=true".to_owned(),
            "attach /vol to /dev".to_owned(),
            "pivot".to_owned(),
        ]
    );
}

#[test]
fn options_are_set_before_a_bind_mount_can_be_seen() {
    let mounts = json!([
        {"destination": "/dev", "type": "bind", "source": "/vol", "options": ["bind"]},
        {"destination": "/a/b", "type": "bind", "source": "/file", "options": ["bind", "ro", "nosuid", "rnodev"]},
    ]);
    let log = record(spec(mounts, json!({})), &[ROOT, "/vol", "/dev"], &["/file"]).expect("built");
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    let expected = [
        "clone /file recursive=false".to_owned(),
        format!("setattr /file +{attributes:#x} -0x0 recursive=false"),
        format!(
            "setattr /file +{:#x} -0x0 recursive=true",
            libc::MOUNT_ATTR_NODEV
        ),
        "mkdir /a".to_owned(),
        "create /a/b".to_owned(),
        "attach /file to /a/b".to_owned(),
        "pivot".to_owned(),
    ];
    assert_eq!(log.get(5..), Some(&expected[..]), "{log:?}");
}

#[test]
fn devices_come_after_mounts_and_masks_after_devices() {
    let mounts = json!([{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}]);
    let linux = json!({"maskedPaths": ["/secret", "/dev/null", "/none"], "readonlyPaths": ["/etc", "/none"],
        "devices": [{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "uid": 1}], "rootfsPropagation": "shared"});
    let mut spec = spec(mounts, linux);
    spec["root"]["readonly"] = json!(true);
    let log = record(spec, &[ROOT, "/dev", "/secret", "/etc"], &["/dev/null"]).expect("built");
    let expected = [
        format!(
            "mount tmpfs tmpfs on /dev {:#x} \"mode=755\"",
            libc::MS_NOSUID
        ),
        "mknod /dev/null 1:3 666".to_owned(),
        "mknod /dev/zero 1:5 666".to_owned(),
        "mknod /dev/full 1:7 666".to_owned(),
        "mknod /dev/random 1:8 666".to_owned(),
        "mknod /dev/urandom 1:9 666".to_owned(),
        "mknod /dev/tty 5:0 666".to_owned(),
        "symlink /dev/fd -> /proc/self/fd".to_owned(),
        "symlink /dev/stdin -> /proc/self/fd/0".to_owned(),
        "symlink /dev/stdout -> /proc/self/fd/1".to_owned(),
        "symlink /dev/stderr -> /proc/self/fd/2".to_owned(),
        "symlink /dev/ptmx -> pts/ptmx".to_owned(),
        "mkdir /dev/net".to_owned(),
        "mknod /dev/net/tun 10:200 666".to_owned(),
        "chown /dev/net/tun 1:0".to_owned(),
        "clone /etc recursive=true".to_owned(),
        "setattr /etc +0x1 -0x0 recursive=false".to_owned(),
        "attach /etc to /etc".to_owned(),
        "mount tmpfs tmpfs on /secret 0x1 \"nr_inodes=1\"".to_owned(),
        format!("mount  /dev/null on /dev/null {:#x} \"\"", libc::MS_BIND),
        "pivot".to_owned(),
        format!("root propagation {:#x}", libc::MS_SHARED),
        format!("setattr {ROOT} +0x1 -0x0 recursive=false"),
    ];
    assert_eq!(log.get(3..), Some(&expected[..]), "{log:?}");
}

#[test]
fn a_missing_rootfs_is_not_found() {
    let failure = record(spec(json!([]), json!({})), &[], &[]).expect_err("missing");
    assert_eq!(failure.kind, Kind::NotFound);
    assert!(failure.message.contains(ROOT));
}

#[test]
fn what_the_agent_has_opened_is_cut_off_from_the_guest() {
    let mounts =
        json!([{"destination": "/dev", "type": "bind", "source": "/vol", "options": ["rbind"]}]);
    let spec = serde_json::from_value(spec(mounts, json!({}))).expect("a spec");
    let plan = RootfsPlan::new(&spec, true, false).expect("a plan");
    let recorder = Recorder::new(&[ROOT, "/vol", "/dev", "/tmp"], &[]);
    let sources = Sources::open(&plan, false, &recorder).expect("sources");
    assert_eq!(sources.raw().len(), 2);
    recorder.log.borrow_mut().clear();
    plan.enter(&recorder, None, Some(&sources)).expect("built");
    let log = recorder.log.into_inner();
    let private = libc::MS_PRIVATE | libc::MS_REC;
    let cut = log
        .iter()
        .filter(|line| line.starts_with("propagation") && line.ends_with(&format!("{private:#x}")))
        .count();
    assert_eq!(
        cut, 3,
        "the guest's root, the rootfs and the bind mount: {log:?}"
    );
    assert!(!log.iter().any(|line| line.starts_with("clone")), "{log:?}");
}
