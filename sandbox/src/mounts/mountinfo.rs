//! /proc/self/mountinfo (proc(5)): what is mounted where.

use super::MountError;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// All mount points at and below `path`, oldest first.
pub(crate) fn mounts_below(path: &Path) -> Result<Vec<PathBuf>, MountError> {
    let mounts = mounts()?.into_iter().map(|mount| mount.point);
    Ok(mounts.filter(|point| point.starts_with(path)).collect())
}

/// What is mounted below the folder `source`, which may be named by way of links: the numbers of the
/// mounts, of which no two at a time are the same.
pub(crate) fn mounted_below(source: &Path) -> Result<Vec<u64>, MountError> {
    let source = source
        .canonicalize()
        .map_err(|cause| super::failed("look at", source, None, cause))?;
    let below = |mount: &Mount| mount.point != source && mount.point.starts_with(&source);
    let mounts = mounts()?.into_iter();
    Ok(mounts.filter(below).map(|mount| mount.number).collect())
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// As long as it is mounted, no other mount has it.
    pub number: u64,
    /// Of the file system, as `MAJOR:MINOR`.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// The file system's type.
    pub kind: String,
}

/// All mounts of this process's namespace, oldest first.
pub(crate) fn mounts() -> Result<Vec<Mount>, MountError> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(MountError::Mountinfo)?;
    Ok(parse(&table).collect())
}

fn parse(table: &[u8]) -> impl Iterator<Item = Mount> {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let number = text(fields.next()?).parse().ok()?;
        let device = text(fields.nth(1)?);
        let root = path(fields.next()?);
        let point = path(fields.next()?);
        // Options, any number of optional fields, a dash.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(Mount {
            number,
            device,
            root,
            point,
            kind: text(kind),
        })
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Blanks, tabs, newlines and backslashes are written as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some(digits) if *first == b'\\' => {
                let value = digits
                    .iter()
                    .fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                plain.push(value as u8);
                rest = &tail[3..];
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_mount_points() {
        let table = b"22 1 0:20 / /proc rw - proc proc rw\n23 1 0:21 / /a\\040b/c rw,x shared:2 - tmpfs t rw\n";
        let mounts: Vec<_> = parse(table).collect();
        let points: Vec<_> = mounts.iter().map(|mount| mount.point.as_path()).collect();
        assert_eq!(points, [Path::new("/proc"), Path::new("/a b/c")]);
        let (last, root) = (&mounts[1], Path::new("/"));
        assert_eq!(last.number, 23);
        assert_eq!(
            (&*last.device, &*last.kind, &*last.root),
            ("0:21", "tmpfs", root)
        );
        assert!(
            mounts_below(Path::new("/proc"))
                .unwrap()
                .contains(&"/proc".into())
        );
        assert!(mounts_below(Path::new("/proc/self/")).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn unescape_undoes_the_kernels_escaping(text in proptest::collection::vec(any::<u8>(), 0..40)) {
            let escaped: Vec<u8> = text.iter().flat_map(|byte| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            }).collect();
            prop_assert_eq!(unescape(&escaped), text);
        }
    }
}
