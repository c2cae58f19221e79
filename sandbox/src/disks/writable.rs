//! A writable layer with an end: a sparse file with ext4, in the folder of the container's snapshot,
//! beside the folder that would hold its changes otherwise. So it lives as long as that would: it is
//! there when the container is started again, and goes when the daemon removes the snapshot.

use super::DiskError;
use crate::config::WRITABLE_LAYER_MIB;
use crate::pod::Annotations;
use crate::spec::SpecError;
use crate::tools::Tool;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The annotation with a container's limit.
const ANNOTATION: &str = "io.bulkhead.storage.writable_layer_mib";

/// All annotations about storage begin so.
const PREFIX: &str = "io.bulkhead.storage.";

/// The disk's name in the folder of the snapshot.
const NAME: &str = "bulkhead-writable.ext4";

const MKFS: Tool = Tool {
    name: "mkfs.ext4",
    package: "e2fsprogs",
};

/// Making a file system of any size takes a fraction of that.
const MKFS_TIME: Duration = Duration::from_secs(60);

/// How much a container may write to its root.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WritableLimit {
    /// None if nothing but the host's disk limits it.
    pub mib: Option<u32>,
    /// The container asks for it itself.
    pub annotated: bool,
}

impl WritableLimit {
    /// The limit of the configuration, where 0 is none, or a lower one that the annotations ask for:
    /// a container can't raise what the host allows it.
    ///
    /// # Errors
    /// When an annotation isn't a number that fits, or none that there is.
    pub fn new(configured: u32, annotations: &Annotations) -> Result<Self, SpecError> {
        let mut limit = Self {
            mib: Some(configured).filter(|mib| *mib != 0),
            annotated: false,
        };
        for (annotation, value) in annotations {
            let wrong = |problem: String| SpecError::Field {
                field: format!("annotations[{annotation:?}]"),
                problem,
            };
            if annotation != ANNOTATION {
                if annotation.starts_with(PREFIX) {
                    return Err(wrong("there is no such setting of the storage".into()));
                }
                continue;
            }
            let (low, high) = (WRITABLE_LAYER_MIB.start(), WRITABLE_LAYER_MIB.end());
            let asked = value.parse::<u32>().ok();
            let asked = asked
                .filter(|mib| *mib == 0 || WRITABLE_LAYER_MIB.contains(mib))
                .ok_or_else(|| wrong(format!("{value:?} is not 0, or {low} to {high} (MiB)")))?;
            if asked != 0 && limit.mib.is_none_or(|mib| asked < mib) {
                limit = Self {
                    mib: Some(asked),
                    annotated: true,
                };
            }
        }
        Ok(limit)
    }
}

/// The disk of `mib` MiB in `snapshot`, made if there is none yet.
pub(super) fn disk(snapshot: &Path, mib: u32) -> Result<PathBuf, DiskError> {
    let path = snapshot.join(NAME);
    let failed = |cause| DiskError::NotMade {
        path: path.clone(),
        cause,
    };
    match fs::symlink_metadata(&path) {
        Ok(found) if found.is_file() => {
            let bytes = u64::from(mib) << 20;
            if found.len() != bytes {
                let had = found.len() >> 20;
                tracing::warn!(had, mib, path = %path.display(), "a writable layer keeps its size");
            }
            return Ok(path);
        }
        Ok(_) => return Err(failed("something else is there".into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error.to_string())),
    }
    let draft = path.with_extension("new");
    let made = make(&draft, mib).and_then(|()| {
        let renamed = fs::rename(&draft, &path).and_then(|()| sync(snapshot));
        renamed.map_err(|error| error.to_string())
    });
    if made.is_err() {
        let _ = fs::remove_file(&draft);
    }
    made.map_err(failed)?;
    Ok(path)
}

/// What is in the file or folder is on the host's disk then, and a disk that was made is there
/// whole, or not at all, also after the host has lost its power.
fn sync(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

fn make(path: &Path, mib: u32) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let log = path.with_extension("log");
    // What a start that was cut short has left; or anything else, as a guest may have had the folder:
    // nothing is written through a link.
    for left in [path, &log] {
        match fs::remove_file(left) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
            _ => {}
        }
    }
    let mut options = OpenOptions::new();
    let options = options.write(true).create_new(true).mode(0o600);
    let file = options.open(path).map_err(text)?;
    file.set_len(u64::from(mib) << 20).map_err(text)?;
    // A new file is zeroes: nothing has to be written to make tables empty. Nothing is kept back for
    // a user 0, which the container's usually is.
    let mut command = Command::new(MKFS.find().map_err(|error| error.to_string())?);
    command.args(["-q", "-F", "-m", "0", "-O", "^resize_inode", "-E"]);
    command.arg("lazy_itable_init=1,lazy_journal_init=1,nodiscard");
    let made = MKFS.run(command.arg(path), &log, MKFS_TIME);
    let _ = fs::remove_file(log);
    made.map_err(|error| error.to_string())?;
    sync(path).map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn limit(configured: u32, annotations: &[(&str, &str)]) -> Result<WritableLimit, SpecError> {
        let annotations = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        WritableLimit::new(configured, &annotations.collect())
    }

    #[test]
    fn an_annotation_sets_or_lowers_and_never_raises() {
        assert_eq!(
            limit(0, &[("another", "x")]).unwrap(),
            WritableLimit::default()
        );
        for (configured, asked, mib, annotated) in [
            (0, "64", Some(64), true),
            (100, "64", Some(64), true),
            (100, "200", Some(100), false),
            (100, "0", Some(100), false),
            (0, "0", None, false),
        ] {
            let found = limit(configured, &[(ANNOTATION, asked)]).unwrap();
            assert_eq!(
                found,
                WritableLimit { mib, annotated },
                "{configured} {asked}"
            );
        }
        for (name, value, problem) in [
            (ANNOTATION, "15", "16 to"),
            (ANNOTATION, "1G", "\"1G\" is not"),
            (ANNOTATION, "-1", "is not"),
            ("io.bulkhead.storage.size", "1", "no such setting"),
        ] {
            let error = limit(0, &[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_disk_is_made_once_and_takes_little_room() {
        if MKFS.find().is_err() {
            eprintln!("SKIPPED 1 test: it needs mkfs.ext4");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::write(outside.path(), "kept").unwrap();
        for name in ["bulkhead-writable.new", "bulkhead-writable.log"] {
            std::os::unix::fs::symlink(outside.path(), dir.path().join(name)).unwrap();
        }
        let path = disk(dir.path(), 512).unwrap();
        assert_eq!(fs::read(outside.path()).unwrap(), b"kept");
        let found = path.metadata().unwrap();
        assert_eq!(found.len(), 512 << 20);
        assert!(found.blocks() * 512 < 4 << 20, "{} blocks", found.blocks());
        // Another limit doesn't cost what was written.
        assert_eq!(disk(dir.path(), 64).unwrap(), path);
        assert_eq!(path.metadata().unwrap().ino(), found.ino());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = disk(&dir.path().join("nowhere"), 64).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
}
