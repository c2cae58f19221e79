//! An overlay of containerd's with images in place of its lower layers.

use super::store::Store;
use super::tree::is_plain;
use super::{Converter, Image, LayerError};
use crate::config::Config;
use crate::mounts::RootfsMount;
use bulkhead_proto::guest::KEPT_OVERLAY_XATTRS;
use rustix::io::Errno;
use std::path::Path;

/// Most layers that are converted: each is a disk, and a virtual machine has 128 places for those
/// and its network interfaces, for all its containers together.
const MAX_LAYERS: usize = 64;

/// The mounts of a root with its layers converted, as a snapshotter of EROFS images would give them,
/// and the images, which stay in the store for as long as they are held. None if the configuration
/// doesn't ask for that, the root is no overlay, or its layers can't be converted: the log says why.
pub(crate) fn converted(
    mounts: &[RootfsMount],
    config: &Config,
) -> Option<(Vec<RootfsMount>, Vec<Image>)> {
    let [one] = mounts else { return None };
    if !config.convert_layers || one.kind != "overlay" {
        return None;
    }
    match convert(one, config) {
        Ok(converted) => Some(converted),
        Err(error) => {
            tracing::warn!(%error, "the root's layers are not converted; it goes through the share");
            None
        }
    }
}

fn convert(
    one: &RootfsMount,
    config: &Config,
) -> Result<(Vec<RootfsMount>, Vec<Image>), LayerError> {
    let layers = lower_layers(one)?;
    let store = Store::open(&config.layer_dir)?;
    let limit = u64::from(config.layer_limit_mib) << 20;
    let converter = Converter {
        store: &store,
        limit,
    };
    let images = layers
        .iter()
        .map(|layer| converter.image(layer))
        .collect::<Result<Vec<_>, _>>()?;
    if let Err(error) = store.sweep().and_then(|()| store.enforce_limit(limit)) {
        tracing::warn!(%error, "the folder of layers is not cleaned");
    }
    Ok((stacked(one, &images), images))
}

/// The layers of an overlay that can be converted, the uppermost first.
fn lower_layers(one: &RootfsMount) -> Result<Vec<&Path>, LayerError> {
    let value = |key: &str| {
        one.options
            .iter()
            .find_map(|option| option.strip_prefix(key))
    };
    if one
        .options
        .iter()
        .any(|option| option.starts_with("uidmap="))
    {
        return Err(LayerError::Unfit(
            "the owners of a converted layer's files can't be mapped (user namespaces)",
        ));
    }
    if !one.target.is_empty() {
        return Err(LayerError::Unfit("it is mounted below the root"));
    }
    let lower = value("lowerdir=").unwrap_or_default();
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let plain = |layer: &&Path| layer.is_absolute() && is_plain(layer.as_os_str());
    if !layers.iter().all(plain) {
        return Err(LayerError::Unfit("its layers have no plain absolute paths"));
    }
    if layers.len() > MAX_LAYERS {
        return Err(LayerError::Unfit("it has more than 64 layers"));
    }
    if let Some(upper) = value("upperdir=")
        && !keeps_marks(Path::new(upper))
    {
        return Err(LayerError::Unfit(
            "the file system of its upper layer keeps no user attributes, in which an overlay's marks \
             would be",
        ));
    }
    if value("upperdir=").is_none() && layers.len() < 2 {
        return Err(LayerError::Unfit("an overlay of a single layer is none"));
    }
    Ok(layers)
}

/// Whether the file server can keep an overlay's marks in `upper` (`vmm/src/virtio/fs/xattrs.rs`). A
/// folder that isn't there is for others to complain of.
fn keeps_marks(upper: &Path) -> bool {
    let name = format!("{KEPT_OVERLAY_XATTRS}opaque");
    rustix::fs::lgetxattr(upper, &name, &mut [0; 1][..]) != Err(Errno::NOTSUP)
}

fn stacked(one: &RootfsMount, images: &[Image]) -> Vec<RootfsMount> {
    let mut mounts: Vec<RootfsMount> = images
        .iter()
        .map(|image| RootfsMount {
            kind: "erofs".into(),
            source: image.path().display().to_string(),
            target: String::new(),
            options: vec!["ro".into()],
        })
        .collect();
    let last = images.len().saturating_sub(1);
    let lower = format!("lowerdir={{{{ overlay 0 {last} }}}}");
    let replaced = |option: &String| match option.starts_with("lowerdir=") {
        true => lower.clone(),
        false => option.clone(),
    };
    mounts.push(RootfsMount {
        kind: "format/overlay".into(),
        options: one.options.iter().map(replaced).collect(),
        ..one.clone()
    });
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> RootfsMount {
        RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: options.iter().map(|&one| one.into()).collect(),
        }
    }

    #[test]
    fn layers_are_found_and_what_cannot_be_converted_is_told() {
        let good = overlay(&[
            "index=off",
            "workdir=/9/work",
            "upperdir=/9/fs",
            "lowerdir=/2/fs:/1/fs",
        ]);
        let paths = lower_layers(&good).unwrap();
        assert_eq!(paths, ["/2/fs", "/1/fs"].map(Path::new));
        let many = format!("lowerdir={}", vec!["/1"; MAX_LAYERS + 1].join(":"));
        for (options, problem) in [
            (&["upperdir=/u", "lowerdir=1/fs"][..], "plain absolute"),
            (&["upperdir=/u", "lowerdir=/a\\:b"], "plain absolute"),
            (&["upperdir=/u"], "plain absolute"),
            (&["lowerdir=/1"], "single layer"),
            (&["upperdir=/u", &many], "64 layers"),
            (&["upperdir=/proc", "lowerdir=/1"], "user attributes"),
            (
                &["upperdir=/u", "lowerdir=/1", "uidmap=0:1:2"],
                "user namespaces",
            ),
        ] {
            let error = lower_layers(&overlay(options)).unwrap_err().to_string();
            assert!(error.contains(problem), "{options:?}: {error}");
        }
    }

    #[test]
    fn only_a_lone_overlay_is_converted_and_only_when_asked_for() {
        let one = overlay(&["upperdir=/u", "lowerdir=/nonexistent"]);
        let dir = tempfile::tempdir().unwrap();
        let config = |convert_layers| Config {
            convert_layers,
            layer_dir: dir.path().join("layers"),
            ..Config::default()
        };
        assert!(converted(std::slice::from_ref(&one), &config(false)).is_none());
        assert!(!dir.path().join("layers").exists());
        assert!(converted(std::slice::from_ref(&one), &config(true)).is_none());
        assert!(converted(&[one.clone(), one], &config(true)).is_none());
    }
}
