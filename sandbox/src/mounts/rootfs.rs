//! Mounting the root file system that containerd describes in a create request.

use super::layers::{MappedLayers, map_in_place, take_ids};
use super::options::Options;
use super::{MountError, failed, unmount_tree};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest data string that mount(2) takes: one page with its terminating zero.
const MAX_DATA: usize = 4095;

/// One mount of a task's root file system, as containerd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system type: `overlay`, `bind`, `ext4`, …
    pub kind: String,
    /// Device, folder, or a name that the file system ignores.
    pub source: String,
    /// Where below the rootfs; usually empty.
    pub target: String,
    /// fstab-style options.
    pub options: Vec<String>,
}

/// Mounts all of `mounts` at `rootfs`, in order; on failure none is left.
pub(crate) fn mount_rootfs(mounts: &[RootfsMount], rootfs: &Path) -> Result<(), MountError> {
    if mounts.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(rootfs).map_err(|cause| failed("make", rootfs, None, cause))?;
    for one in mounts {
        if let Err(error) = mount_one(one, rootfs) {
            if let Err(undo) = unmount_tree(rootfs) {
                tracing::warn!(error = %undo, "undoing a mount failed");
            }
            return Err(error);
        }
    }
    Ok(())
}

fn mount_one(one: &RootfsMount, rootfs: &Path) -> Result<(), MountError> {
    let target = target(one, rootfs)?;
    if let Some(option) = one
        .options
        .iter()
        .find(|o| *o == "loop" || o.starts_with("X-containerd."))
    {
        let problem =
            "is not supported; use a snapshotter that gives overlay, bind or block device mounts";
        return Err(MountError::Option {
            target,
            option: option.clone(),
            problem,
        });
    }
    let (options, ids) = take_ids(&one.options, &target)?;
    let mut options = Options::parse(&options);
    // Until the overlay is mounted.
    let _layers = match &ids {
        Some(ids) if one.kind == "overlay" => {
            let (layers, data) = MappedLayers::mount(&options.data, &target, ids)?;
            options.data = data;
            Some(layers)
        }
        _ => None,
    };
    if options.data.len() > MAX_DATA {
        return mount_long_overlay(one, options, target);
    }
    mount_call(one, &options, &target)?;
    finish(one, &options, &target)?;
    match &ids {
        Some(ids) if one.kind != "overlay" => map_in_place(&target, ids),
        _ => Ok(()),
    }
}

/// The mount's target, which must stay below `rootfs`.
fn target(one: &RootfsMount, rootfs: &Path) -> Result<PathBuf, MountError> {
    let relative = Path::new(one.target.trim_start_matches('/'));
    let plain = relative
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain {
        let cause = std::io::Error::other(format!("the target {:?} leaves the root", one.target));
        return Err(failed("mount", rootfs, None, cause));
    }
    Ok(if one.target.is_empty() {
        rootfs.into()
    } else {
        rootfs.join(relative)
    })
}

fn mount_call(one: &RootfsMount, options: &Options, target: &Path) -> Result<(), MountError> {
    let data = Some(options.data.as_str()).filter(|data| !data.is_empty());
    // For a bind mount the type means nothing, and "bind" is no file system.
    let kind = Some(one.kind.as_str()).filter(|kind| !kind.is_empty() && *kind != "bind");
    mount(Some(one.source.as_str()), target, kind, options.flags, data).map_err(|errno| {
        failed(
            "mount the root file system at",
            target,
            Some(Path::new(&one.source)),
            errno,
        )
    })
}

/// What mount(2) wants in calls of their own: flags of a bind mount, and propagation.
fn finish(one: &RootfsMount, options: &Options, target: &Path) -> Result<(), MountError> {
    let bind = options.flags.contains(MsFlags::MS_BIND);
    let extra = options.flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if bind && !extra.is_empty() {
        let flags = options.flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
            .map_err(|errno| failed("remount", target, Some(Path::new(&one.source)), errno))?;
    }
    if !options.propagation.is_empty() {
        mount(
            None::<&str>,
            target,
            None::<&str>,
            options.propagation,
            None::<&str>,
        )
        .map_err(|errno| failed("set the propagation of", target, None, errno))?;
    }
    Ok(())
}

/// Mounts an overlay of so many layers that their absolute paths don't fit into one page: with
/// paths relative to the folder that they have in common. The working folder is a thread's own
/// after unshare(CLONE_FS), so this happens on a thread that ends with it.
fn mount_long_overlay(
    one: &RootfsMount,
    options: Options,
    target: PathBuf,
) -> Result<(), MountError> {
    const PROBLEM: &str = "the options are longer than a page even with relative paths; use an image with fewer layers";
    let too_long = || MountError::Option {
        target: target.clone(),
        option: "lowerdir".into(),
        problem: PROBLEM,
    };
    let (folder, data) = shorten_lowerdirs(&options.data).ok_or_else(too_long)?;
    if data.len() > MAX_DATA {
        return Err(too_long());
    }
    let options = Options { data, ..options };
    let one = one.clone();
    let at = target.clone();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS).map_err(|errno| failed("enter", &folder, None, errno))?;
        std::env::set_current_dir(&folder)
            .map_err(|cause| failed("enter", &folder, None, cause))?;
        mount_call(&one, &options, &at)?;
        finish(&one, &options, &at)
    });
    thread.join().unwrap_or_else(|_| {
        Err(failed(
            "mount",
            &target,
            None,
            std::io::Error::other("the mounting thread panicked"),
        ))
    })
}

/// The folder that all lower layers have in common, and the data with them relative to it.
fn shorten_lowerdirs(data: &str) -> Option<(PathBuf, String)> {
    let lower = data
        .split(',')
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = layers.first()?.parent()?.to_owned();
    if !layers.iter().all(|layer| layer.is_absolute()) {
        return None;
    }
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        common = common.parent()?.to_owned();
    }
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| {
            layer
                .strip_prefix(&common)
                .ok()?
                .to_str()
                .filter(|rest| !rest.is_empty())
        })
        .collect();
    let relative = format!("lowerdir={}", relative?.join(":"));
    let data: Vec<&str> = data
        .split(',')
        .map(|option| {
            if option.starts_with("lowerdir=") {
                relative.as_str()
            } else {
                option
            }
        })
        .collect();
    Some((common, data.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_become_relative_to_what_they_share() {
        let data = "workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/1/fs:/s/22/fs";
        let (folder, data) = shorten_lowerdirs(data).unwrap();
        assert_eq!(folder, Path::new("/s"));
        assert_eq!(
            data,
            "workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=1/fs:22/fs"
        );
        assert!(shorten_lowerdirs("upperdir=/u").is_none());
        assert!(shorten_lowerdirs("lowerdir=a:/b").is_none());
    }

    #[test]
    fn a_target_stays_below_the_root() {
        let mount = |target: &str| RootfsMount {
            kind: "bind".into(),
            source: "/".into(),
            target: target.into(),
            options: Vec::new(),
        };
        let rootfs = Path::new("/b/rootfs");
        assert_eq!(target(&mount(""), rootfs).unwrap(), rootfs);
        assert_eq!(target(&mount("/x"), rootfs).unwrap(), rootfs.join("x"));
        assert!(target(&mount("../x"), rootfs).is_err());
    }

    #[test]
    fn an_overlay_with_very_many_layers_is_mounted_and_unmounted() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // An upper layer can't itself be on an overlay: use a tmpfs.
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let base = dir
            .path()
            .join("a-folder-name-that-makes-paths-long-enough-for-the-page");
        let lowers: Vec<String> = (0..60)
            .map(|n| {
                let layer = base.join(n.to_string());
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join(format!("file{n}")), "x").unwrap();
                layer.display().to_string()
            })
            .collect();
        for folder in ["upper", "work"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let options = vec![
            format!("upperdir={}/upper", dir.path().display()),
            format!("workdir={}/work", dir.path().display()),
            format!("lowerdir={}", lowers.join(":")),
        ];
        assert!(options.join(",").len() > MAX_DATA);
        let rootfs = dir.path().join("rootfs");
        let mounts = [RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options,
        }];
        mount_rootfs(&mounts, &rootfs).unwrap();
        let seen = rootfs.join("file59").exists();
        unmount_tree(dir.path()).unwrap();
        assert!(seen);
        assert!(super::super::mounts_below(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn a_failed_mount_leaves_the_earlier_ones_undone() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        let good = RootfsMount {
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            target: String::new(),
            options: Vec::new(),
        };
        let bad = RootfsMount {
            kind: "bind".into(),
            source: "/nonexistent".into(),
            target: String::new(),
            options: vec!["bind".into()],
        };
        let error = mount_rootfs(&[good, bad], &rootfs).unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
        assert!(super::super::mounts_below(&rootfs).unwrap().is_empty());
    }
}
