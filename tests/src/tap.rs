//! Tap devices, as a sandbox opens them for a VMM.

use crate::error::{Context, Result};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// TUNSETIFF (linux/if_tun.h).
const SET_INTERFACE: u64 = 0x4004_54ca;

/// How many descriptors of vhost-net a process holds: one for each pair of queues whose frames the
/// kernel moves for it. (Its threads are in other process namespaces than a test's before Linux 6.4.)
pub fn vhosts_of(process: u32) -> usize {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd"));
    let links = descriptors.into_iter().flatten().flatten();
    links
        .filter(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("/dev/vhost-net"))
        })
        .count()
}

/// Makes a tap device of the calling thread's network namespace that goes with its descriptors, one
/// for each queue.
///
/// # Errors
/// When the kernel refuses it.
pub fn open(name: &str, queues: usize) -> Result<Vec<File>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    (0..queues)
        .map(|_| {
            let opened = File::options().read(true).write(true).open("/dev/net/tun");
            let file = opened.context(|| "open /dev/net/tun".into())?;
            // SAFETY: reads and writes an ifreq.
            let result =
                unsafe { libc::ioctl(file.as_raw_fd(), SET_INTERFACE as _, &raw mut request) };
            match result {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(file),
            }
            .context(|| format!("make the tap device {name}"))
        })
        .collect()
}

/// Frames received and sent by a device together, as /proc/net/dev tells.
pub fn frames_of(text: &str, device: &str) -> Option<u64> {
    // The second and the tenth number of its line.
    let line = text.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == device).then_some(numbers)
    })?;
    let number = |index: usize| line.split_whitespace().nth(index)?.parse::<u64>().ok();
    number(1)?.checked_add(number(9)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_both_ways() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n\
            \x20   lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
            \x20 tap0: 700 10 0 0 0 0 0 0 900 25 0 0 0 0 0 0\n";
        assert_eq!(frames_of(text, "tap0"), Some(35));
        assert_eq!(frames_of(text, "tap"), None);
        assert_eq!(frames_of("tap0: 1 x", "tap0"), None);
    }
}
