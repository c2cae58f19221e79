//! What a private containerd and its shims are configured with.

use super::{Release, SANDBOX_IMAGE};
use crate::artifacts::{self, Artifacts};
use crate::error::{Context, Result};
use std::path::Path;

/// Folder of the CNI plugins, as Debian packages them.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// The network of pods, as a file of the CNI folder and its content: works offline, and touches the network namespace of containerd only.
pub(super) const CNI: (&str, &str) = (
    "10-pods.conflist",
    r#"{ "cniVersion": "0.4.0", "name": "pods", "plugins": [ {
    "type": "ptp",
    "ipam": { "type": "host-local", "dataDir": "@DIR@/ipam",
              "ranges": [[{ "subnet": "10.88.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] }
} ] }
"#,
);

/// containerd's configuration with its CRI plugin on and the runtime's table, whose pods are driven
/// by `sandboxer`.
pub(super) fn cri_template(release: &Release, sandboxer: &str) -> Result<String> {
    let series = release.series()?;
    let template = read_source(&format!("scripts/lib/containerd-cri-{series}.toml.in"))?
        + "\n"
        + &read_source(&format!("docs/kubernetes/containerd-{series}.toml"))?;
    Ok(template
        .replace("@SANDBOX_IMAGE@", SANDBOX_IMAGE)
        .replace("@CNI_PLUGINS@", CNI_PLUGINS)
        .replace(
            "sandboxer = \"podsandbox\"",
            &format!("sandboxer = {sandboxer:?}"),
        ))
}

/// The shim's configuration for what was built, with `settings` at its end.
pub fn shim_config(artifacts: &Artifacts, runtime_dir: &Path, settings: &str) -> String {
    // A key may stand only once: what `settings` sets is left out here.
    let base = [
        ("kernel", artifacts.kernel()),
        ("rootfs", artifacts.rootfs()),
        ("vmm", artifacts.program("bulkhead-vmm")),
        ("runtime_dir", runtime_dir.to_owned()),
        ("template_dir", artifacts.templates()),
    ];
    let sets = |key: &str| {
        settings.lines().any(|line| {
            line.split('=')
                .next()
                .is_some_and(|found| found.trim() == key)
        })
    };
    let mut text = String::new();
    for (key, path) in base.iter().filter(|(key, _)| !sets(key)) {
        text.push_str(&format!("{key} = {:?}\n", path.display().to_string()));
    }
    text + settings
}

/// PATH with the host's programs under test first.
pub fn search_path(artifacts: &Artifacts) -> std::ffi::OsString {
    let mut path = artifacts.programs().into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    path
}

pub(super) fn read_source(path: &str) -> Result<String> {
    let path = artifacts::workspace().join(path);
    std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))
}

pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).context(|| format!("write {}", path.display()))
}

/// overlayfs where an overlay can be mounted below `folder`.
pub(super) fn pick_snapshotter(folder: &Path) -> &'static str {
    use nix::mount::{MsFlags, mount, umount};
    let at = |name: &str| folder.join("overlay-probe").join(name);
    for name in ["lower", "upper", "work", "merged"] {
        if std::fs::create_dir_all(at(name)).is_err() {
            return "native";
        }
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower").display(),
        at("upper").display(),
        at("work").display()
    );
    let mounted = mount(
        Some("overlay"),
        &at("merged"),
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    );
    let _ = umount(&at("merged"));
    let _ = std::fs::remove_dir_all(folder.join("overlay-probe"));
    if mounted.is_ok() {
        "overlayfs"
    } else {
        "native"
    }
}
