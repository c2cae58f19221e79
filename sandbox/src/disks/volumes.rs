//! Disks as a spec names them: a mount of a file system that is on a file or a block device, and
//! block devices among `linux.devices` (`volumeMode: Block` of Kubernetes).

use super::{Disk, DiskError, FILE_SYSTEMS};
use crate::ids::ContainerId;
use bulkhead_proto::agent::StorageMount;
use bulkhead_proto::guest::STORAGE_MOUNT;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Kinds of propagation, which are the container's mount's; each also with an r in front.
const PROPAGATION: [&str; 4] = ["private", "shared", "slave", "unbindable"];

/// Major and minor number of a device.
pub(crate) type Number = (i64, i64);

/// A block device of the host's that a container is to have under a name of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceDisk {
    /// What it is attached as.
    pub disk: Disk,
    /// What the spec calls it.
    pub host: Number,
}

/// Makes `spec`'s mounts of disks binds of what the guest mounts; what has to be attached, and that.
///
/// The container's own process could not mount them: the rules of its devices hold for it already.
pub(crate) fn mounts(spec: &mut Spec, id: &ContainerId) -> (Vec<Disk>, Vec<StorageMount>) {
    let owner = format!("{id}/mounts");
    let (mut disks, mut storage) = (Vec::new(), Vec::new());
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(path) = source(mount) else { continue };
        let kind = mount.typ().clone().unwrap_or_default();
        let words = mount.options().clone().unwrap_or_default();
        let read_only = kind == "erofs" || words.iter().any(|word| word == "ro");
        let disk = Disk::new(&path, read_only, &owner, disks.len());
        let target = format!("containers/{id}/volume{}", disks.len());
        let propagation = |word: &String| PROPAGATION.contains(&word.trim_start_matches('r'));
        let (mut bind, mut options): (Vec<_>, Vec<_>) = words.into_iter().partition(propagation);
        options.retain(|word| word != "loop");
        bind.push("bind".into());
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some(Path::new(STORAGE_MOUNT).join(&target)));
        mount.set_options(Some(bind));
        storage.push(StorageMount {
            target,
            type_: kind,
            source: disk.in_guest().display().to_string(),
            options,
            ..Default::default()
        });
        disks.push(disk);
    }
    (disks, storage)
}

/// The file or block device that is mounted.
fn source(mount: &Mount) -> Option<PathBuf> {
    let kind = mount.typ().as_deref()?;
    let words = || mount.options().iter().flatten().map(String::as_str);
    let other = words().any(|word| matches!(word, "bind" | "rbind" | "remount"));
    let source = mount.source().as_ref()?;
    (FILE_SYSTEMS.contains(&kind) && !other && Disk::exists(source)).then(|| source.clone())
}

/// The block devices of `spec` that the host has.
///
/// # Errors
/// When there is no such device.
pub(crate) fn devices(spec: &Spec, id: &ContainerId) -> Result<Vec<DeviceDisk>, DiskError> {
    let owner = format!("{id}/devices");
    let linux = spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_ref());
    let mut disks: Vec<DeviceDisk> = Vec::new();
    let blocks = |one: &&LinuxDevice| one.typ() == LinuxDeviceType::B;
    for device in devices.into_iter().flatten().filter(blocks) {
        let host = (device.major(), device.minor());
        if disks.iter().any(|disk| disk.host == host) {
            continue;
        }
        let path = node(host).ok_or_else(|| DiskError::Refused {
            what: device.path().display().to_string(),
            problem: format!("the host has no block device {}:{}", host.0, host.1),
        })?;
        let read_only = !may_write(spec, host);
        let disk = Disk::new(&path, read_only, &owner, disks.len());
        disks.push(DeviceDisk { disk, host });
    }
    Ok(disks)
}

/// The node of a block device on the host.
fn node((major, minor): Number) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

/// Whether the device's rules let the container write to it: the last one that fits counts. Without
/// any there is nothing to hold it back.
fn may_write(spec: &Spec, (major, minor): Number) -> bool {
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_ref());
    let fits = |wanted: Option<i64>, number: i64| wanted.is_none_or(|w| w < 0 || w == number);
    let last = rules.into_iter().flatten().rev().find(|rule| {
        let kind = rule.typ().unwrap_or_default();
        matches!(kind, LinuxDeviceType::A | LinuxDeviceType::B)
            && fits(rule.major(), major)
            && fits(rule.minor(), minor)
    });
    last.is_none_or(|rule| {
        let access = rule.access().as_deref().unwrap_or("rwm");
        rule.allow() && access.contains('w')
    })
}

/// Replaces the host's numbers of block devices, in the nodes and in the rules, by the guest's.
pub(crate) fn renumber(spec: &mut Spec, numbers: &BTreeMap<Number, Number>) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    for device in linux.devices_mut().iter_mut().flatten() {
        let host = (device.major(), device.minor());
        if let (LinuxDeviceType::B, Some((major, minor))) = (device.typ(), numbers.get(&host)) {
            device.set_major(*major);
            device.set_minor(*minor);
        }
    }
    let resources = linux.resources_mut().as_mut();
    let rules = resources.and_then(|resources| resources.devices_mut().as_mut());
    for rule in rules.into_iter().flatten() {
        let block = rule.typ() == Some(LinuxDeviceType::B);
        let host = (rule.major().unwrap_or(-1), rule.minor().unwrap_or(-1));
        if let (true, Some((major, minor))) = (block, numbers.get(&host)) {
            rule.set_major(Some(*major));
            rule.set_minor(Some(*minor));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn id() -> ContainerId {
        ContainerId::try_from("c1").unwrap()
    }

    fn spec(mounts: Value, linux: Value) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": mounts, "linux": linux}))
            .unwrap()
    }

    #[test]
    fn a_mount_of_an_image_is_a_disk_and_other_mounts_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("data.img");
        fs::write(&image, [0; 512]).unwrap();
        let mounts_of = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "ext4", "source": image, "options": ["loop", "noatime", "rslave"]},
            {"destination": "/bound", "type": "ext4", "source": image, "options": ["bind"]},
            {"destination": "/seed", "type": "erofs", "source": image},
        ]);
        let mut spec = spec(mounts_of, json!({}));
        let (disks, storage) = mounts(&mut spec, &id());
        let found: Vec<_> = disks.iter().map(|disk| disk.read_only).collect();
        assert_eq!(found, [false, true]);
        let after = spec.mounts().as_ref().unwrap();
        let place = Path::new(STORAGE_MOUNT).join(&storage[0].target);
        assert_eq!(after[1].source().as_ref(), Some(&place));
        assert_eq!(after[1].options().as_ref().unwrap(), &["rslave", "bind"]);
        assert_eq!(storage[0].options, ["noatime"]);
        assert_eq!(storage[0].source, disks[0].in_guest().display().to_string());
        assert_eq!(after[2].source().as_ref(), Some(&image));
    }

    #[test]
    fn devices_are_found_and_renumbered_with_their_rules() {
        let known = fs::read_dir("/sys/dev/block").ok().and_then(|all| {
            let names = all.filter_map(|one| one.ok()?.file_name().into_string().ok());
            let mut numbers = names.filter_map(|name| {
                let (major, minor) = name.split_once(':')?;
                Some((major.parse::<i64>().ok()?, minor.parse::<i64>().ok()?))
            });
            numbers.next()
        });
        let Some(host) = known else {
            eprintln!("SKIPPED 1 test: this host has no block device");
            return;
        };
        let linux = |access: &str| {
            json!({
                "devices": [{"path": "/dev/xvda", "type": "b", "major": host.0, "minor": host.1},
                            {"path": "/dev/null", "type": "c", "major": host.0, "minor": host.1}],
                "resources": {"devices": [{"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": host.0, "minor": host.1, "access": access}]},
            })
        };
        for (access, read_only) in [("rwm", false), ("rm", true)] {
            let mut spec = spec(json!([]), linux(access));
            let disks = devices(&spec, &id()).unwrap();
            assert_eq!(disks.len(), 1);
            assert_eq!((disks[0].host, disks[0].disk.read_only), (host, read_only));
            renumber(&mut spec, &[(host, (254, 16))].into());
            let linux = spec.linux().as_ref().unwrap();
            let nodes = linux.devices().as_ref().unwrap();
            assert_eq!((nodes[0].major(), nodes[0].minor()), (254, 16));
            assert_eq!(nodes[1].major(), host.0, "a character device");
            let rules = linux
                .resources()
                .as_ref()
                .unwrap()
                .devices()
                .clone()
                .unwrap();
            assert_eq!((rules[1].major(), rules[1].minor()), (Some(254), Some(16)));
        }
        let none = spec(
            json!([]),
            json!({"devices": [{"path": "/dev/x", "type": "b", "major": 4000, "minor": 1}]}),
        );
        assert!(
            devices(&none, &id())
                .unwrap_err()
                .to_string()
                .contains("4000:1")
        );
    }
}
