//! Layers of images that containerd's overlayfs snapshotter keeps as folders, as EROFS images: made
//! once, by mkfs.erofs, named by a digest of their content, and attached to every virtual machine
//! that has a container with that layer.
//!
//! ```text
//! layer's folder ─► stamp (tree.rs) ─► seen before (store.rs)? ── yes ──► its image
//!                                        │ no
//!                          digest of the content (tree.rs) ─► image in the store? ── yes ──► it
//!                                                               │ no
//!                                     its lock ─► mkfs.erofs ─► the same stamp? ─► one rename
//! ```
//!
//! No failure on this way is the user's: the container then has its root through the share, as it
//! would have without conversion, and the log says why.

mod clock;
mod overlay;
mod store;
mod tree;

pub(crate) use overlay::converted;
pub use store::{Entry, Image, Store};

use crate::tools::{Tool, ToolError};
use clock::Moment;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use store::{Build, SETTLED};
use tree::Stamp;

const MKFS: Tool = Tool {
    name: "mkfs.erofs",
    package: "erofs-utils",
};

/// How long a conversion may take: this long, and a second for each [`BYTES_A_SECOND`].
const LEAST_TIME: Duration = Duration::from_secs(60);
const BYTES_A_SECOND: u64 = 4 << 20;

/// A layer that can't be converted, or the store that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A file operation failed.
    #[error("cannot {verb} {path}: {cause}", path = .path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// The store isn't this user's alone.
    #[error(
        "the folder of layers {path} is not usable: {problem}; set `layer_dir` in the configuration \
         to a folder of root's alone",
        path = .path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The layer is larger than all images together may be.
    #[error("{path} has {bytes} bytes, more than `layer_limit_mib` of the configuration allows", path = .path.display())]
    TooLarge {
        /// The layer.
        path: PathBuf,
        /// The sizes of its files together.
        bytes: u64,
    },
    /// The layer doesn't hold still.
    #[error("{path} {problem}", path = .path.display())]
    Unsettled {
        /// The layer.
        path: PathBuf,
        /// What is the matter.
        problem: &'static str,
    },
    /// Another process converts it and doesn't come to an end.
    #[error("another start was still converting the layer after {limit:?}")]
    StillBuilding {
        /// How long was waited.
        limit: Duration,
    },
    /// The conversion failed a short while ago.
    #[error("its conversion failed a short while ago ({0})")]
    FailedBefore(String),
    /// mkfs.erofs didn't make it.
    #[error("converting {path}: {cause}; look for room where `layer_dir` of the configuration is", path = .path.display())]
    Convert {
        /// The layer.
        path: PathBuf,
        /// Why.
        cause: ToolError,
    },
    /// Asked to remove an image that containers have.
    #[error("the layer is in use by a container; try again when that is gone")]
    InUse,
    /// Such an overlay isn't converted.
    #[error("{0}")]
    Unfit(&'static str),
}

/// Converts layers into one store.
#[derive(Debug)]
struct Converter<'a> {
    store: &'a Store,
    /// What all images together may take, in bytes.
    limit: u64,
}

impl Converter<'_> {
    /// The image of the layer in `folder`, made if there is none.
    fn image(&self, folder: &Path) -> Result<Image, LayerError> {
        let failed = |verb| {
            move |cause| LayerError::Io {
                verb,
                path: folder.into(),
                cause,
            }
        };
        let stamped = || -> io::Result<_> { Ok((Moment::now()?, Stamp::of(folder)?)) };
        let (mut at, mut stamp) = stamped().map_err(failed("look at"))?;
        if let Some(key) = self.store.seen(&stamp, &at)
            && let Some(image) = self.store.find(&key)?
        {
            return Ok(image);
        }
        if stamp.bytes > self.limit {
            let (path, bytes) = (folder.into(), stamp.bytes);
            return Err(LayerError::TooLarge { path, bytes });
        }
        if let Some(reason) = self.store.recent_failure(&stamp) {
            return Err(LayerError::FailedBefore(reason));
        }
        // A change in the same tick of the clock would leave no other stamp.
        if let Some(rest) = unsettled(&stamp, &at, folder)? {
            std::thread::sleep(rest);
            (at, stamp) = stamped().map_err(failed("look at"))?;
            if unsettled(&stamp, &at, folder)?.is_some() {
                return Err(changes(folder));
            }
        }
        let key = crate::cache::Key::of(tree::digest(folder).map_err(failed("read"))?);
        let unchanged = || match Stamp::of(folder).map_err(failed("look at"))? == stamp {
            true => Ok(()),
            false => Err(changes(folder)),
        };
        let image = match self.store.find(&key)? {
            Some(image) => image,
            None => {
                let limit = time_for(stamp.bytes);
                let lock = self.store.lock(&key, limit)?;
                let found = self.store.find(&key)?;
                let made = found.map_or_else(
                    || self.convert(folder, &self.store.build(&key), limit, unchanged),
                    Ok,
                );
                lock.remove();
                if let Err(error @ LayerError::Convert { .. }) = &made {
                    self.store.note_failure(&stamp, &error.to_string());
                }
                made?
            }
        };
        unchanged()?;
        self.store.note_seen(&stamp, at, &key);
        Ok(image)
    }

    fn convert(
        &self,
        folder: &Path,
        build: &Build<'_>,
        limit: Duration,
        unchanged: impl Fn() -> Result<(), LayerError>,
    ) -> Result<Image, LayerError> {
        let begin = std::time::Instant::now();
        let convert = |cause| LayerError::Convert {
            path: folder.into(),
            cause,
        };
        let mut command = Command::new(MKFS.find().map_err(convert)?);
        command.arg("--quiet").arg(&build.image).arg(folder);
        MKFS.run(&mut command, &build.log, limit).map_err(convert)?;
        // What has been read may be another content than the digest's.
        unchanged()?;
        let image = build.publish()?;
        let took_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(folder = %folder.display(), key = image.key().short(), took_ms, "converted a layer");
        Ok(image)
    }
}

fn changes(folder: &Path) -> LayerError {
    LayerError::Unsettled {
        path: folder.into(),
        problem: "changes while it is read",
    }
}

/// How long it takes until a later change of the folder surely gets a later time.
fn unsettled(stamp: &Stamp, at: &Moment, folder: &Path) -> Result<Option<Duration>, LayerError> {
    let age = at.nanoseconds() - stamp.changed;
    if age >= SETTLED {
        return Ok(None);
    }
    match u64::try_from(SETTLED - age) {
        Ok(rest) if i128::from(rest) <= 2 * SETTLED => Ok(Some(Duration::from_nanos(rest))),
        _ => Err(LayerError::Unsettled {
            path: folder.into(),
            problem: "was changed in the future, by the host's clock",
        }),
    }
}

fn time_for(bytes: u64) -> Duration {
    LEAST_TIME + Duration::from_secs(bytes / BYTES_A_SECOND)
}

#[cfg(test)]
mod tests;
