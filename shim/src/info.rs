//! What the shim says of itself: `-v` and `-info`.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The runtime's name, as daemons are configured with it.
pub const NAME: &str = "io.containerd.bulkhead.v2";

/// The annotation by which containerd 2.2 and later learns which mounts of a root it must leave to
/// the shim (its docs/mounts.md), and these: what the guest puts together from disks.
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";
const GUESTS_MOUNTS: &str = "erofs,format/*,mkdir/*";

/// For people.
pub fn version_text() -> String {
    format!("containerd-shim-bulkhead-v2:\n  Version:  {VERSION}\n  Runtime:  {NAME}\n")
}

/// For containerd 2.x: an encoded RuntimeInfo.
pub fn runtime_info() -> Vec<u8> {
    let version = RuntimeVersion {
        version: VERSION.into(),
        ..Default::default()
    };
    let info = RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(version),
        annotations: [(ALLOWED_MOUNTS.to_owned(), GUESTS_MOUNTS.to_owned())].into(),
        features: MessageField::some(features()),
        ..Default::default()
    };
    // Strings can't fail to encode.
    info.write_to_bytes().unwrap_or_default()
}

/// Type of the runtime's features, as containerd registers that of the OCI runtime spec.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mount options that are honoured, but for what file systems take themselves. Kubernetes offers
/// recursive read-only volumes where `rro` is among them.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "ridmap",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "runbindable",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
    "noatime",
];

/// OCI runtime spec, features. User namespaces of pods take both their kind and id-mapped mounts.
fn features() -> Any {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart",
            "poststop",
        ],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": [
                "cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts",
            ],
            "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    });
    Any {
        type_url: FEATURES_TYPE.into(),
        value: features.to_string().into_bytes(),
        ..Default::default()
    }
}
