//! /proc/self/mountinfo (proc(5)): what is mounted where.

use super::MountError;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// All mount points at and below `path`, oldest first.
pub(crate) fn mounts_below(path: &Path) -> Result<Vec<PathBuf>, MountError> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(MountError::Mountinfo)?;
    Ok(mount_points(&table)
        .filter(|point| point.starts_with(path))
        .collect())
}

fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|point| PathBuf::from(OsString::from_vec(unescape(point))))
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
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/proc"), PathBuf::from("/a b/c")]);
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
