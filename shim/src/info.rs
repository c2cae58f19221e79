//! What the shim says of itself: `-v` and `-info`.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

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
        ..Default::default()
    };
    // Strings can't fail to encode.
    info.write_to_bytes().unwrap_or_default()
}
