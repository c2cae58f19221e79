//! Names of extended attributes: the guest's and the host's.
//!
//! An overlay in the guest whose upper layer is in the share marks it by `trusted.overlay.*`, as the
//! layers below it are marked, which are disks. The host's trusted attributes are out of the server's
//! reach, and must be: overlays of the host's own would take the guest's word then. So these are
//! kept under a prefix that means nothing to anybody else, and only the guest's names are shown.

use bulkhead_proto::guest::KEPT_OVERLAY_XATTRS;
use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;

/// The guest's prefix.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// XATTR_NAME_MAX of Linux.
const MAX_NAME: usize = 255;

fn kept() -> &'static [u8] {
    KEPT_OVERLAY_XATTRS.as_bytes()
}

/// The host's name of what the guest calls `name`.
///
/// # Errors
/// EPERM for a name under which only the server keeps something, ERANGE for one that is too long.
pub(super) fn to_host(name: &CStr) -> io::Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if bytes.starts_with(kept()) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    let Some(rest) = bytes.strip_prefix(OVERLAY) else {
        return Ok(Cow::Borrowed(name));
    };
    let host = [kept(), rest].concat();
    if host.len() > MAX_NAME {
        return Err(io::Error::from_raw_os_error(libc::ERANGE));
    }
    CString::new(host).map(Cow::Owned).map_err(io::Error::other)
}

/// The guest's names of a list of the host's, as listxattr(2) gives it: each with a zero byte behind
/// it.
pub(super) fn to_guest(list: &[u8]) -> Vec<u8> {
    let mut names = Vec::with_capacity(list.len());
    for name in list.split_inclusive(|&byte| byte == 0) {
        match name.strip_prefix(kept()) {
            Some(rest) => {
                names.extend_from_slice(OVERLAY);
                names.extend_from_slice(rest);
            }
            None => names.extend_from_slice(name),
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_overlays_marks_are_kept_under_another_name() {
        let host = to_host(c"trusted.overlay.opaque").unwrap();
        assert_eq!(&*host, c"user.bulkhead.overlay.opaque");
        let list = b"security.capability\0user.bulkhead.overlay.opaque\0user.x\0";
        assert_eq!(
            to_guest(list),
            b"security.capability\0trusted.overlay.opaque\0user.x\0"
        );
        for name in [c"user.x", c"trusted.other", c"user.overlay.opaque"] {
            assert_eq!(&*to_host(name).unwrap(), name);
        }
        let error = to_host(c"user.bulkhead.overlay.opaque").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let long = CString::new([OVERLAY, &[b'x'; 239]].concat()).unwrap();
        let error = to_host(&long).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ERANGE));
    }

    proptest! {
        #[test]
        fn what_is_set_is_listed_by_its_name(
            prefix in prop::sample::select(vec!["", "user.", "trusted.overlay.", "user.bulkhead.overlay."]),
            rest in "[a-z.]{0,40}",
        ) {
            let name = CString::new(format!("{prefix}{rest}")).unwrap();
            if let Ok(host) = to_host(&name) {
                prop_assert_eq!(to_guest(host.to_bytes_with_nul()), name.to_bytes_with_nul());
            }
        }

        #[test]
        fn any_list_is_read_and_grows_no_longer(list in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(to_guest(&list).len() <= list.len());
        }
    }
}
