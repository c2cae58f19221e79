//! What a client may name, and ask for when it opens or makes a file.

use std::ffi::CStr;
use std::io;

/// NAME_MAX.
const MAX_NAME: usize = 255;

/// Flags of open(2) that a client may use. O_LARGEFILE has no bit in libc's constant on 64-bit
/// targets, yet Linux sends it.
const OPEN_FLAGS: u32 = (libc::O_ACCMODE
    | libc::O_CREAT
    | libc::O_EXCL
    | libc::O_NOCTTY
    | libc::O_TRUNC
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_CLOEXEC) as u32
    | KERNEL_LARGEFILE
    | KERNEL_EXEC;
/// O_LARGEFILE in the kernel of x86 and most others.
const KERNEL_LARGEFILE: u32 = 0o100_000;
/// FMODE_EXEC, which Linux leaves in the flags when a file is opened for execve(2).
const KERNEL_EXEC: u32 = 0x20;

fn refuse(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// One component of a path, other than `.` and `..`.
pub(super) fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(refuse(libc::EINVAL)),
        name if name.contains(&b'/') => Err(refuse(libc::EINVAL)),
        name if name.len() > MAX_NAME => Err(refuse(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// Flags as they may go to open(2).
pub(super) fn check_flags(flags: u32) -> io::Result<u32> {
    if flags & !OPEN_FLAGS != 0 {
        return Err(refuse(libc::EINVAL));
    }
    Ok(flags & !(KERNEL_EXEC | KERNEL_LARGEFILE))
}

/// Only an overlay's whiteout (character device 0, 0), which is no device, and what is no device
/// node at all.
pub(super) fn check_node(mode: u32, rdev: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        libc::S_IFCHR if rdev == 0 => Ok(()),
        libc::S_IFCHR | libc::S_IFBLK => Err(refuse(libc::EPERM)),
        _ => Ok(()),
    }
}
