//! Word of changes in a network namespace. What has changed is then read in whole: messages can get
//! lost, and a burst of them is one change to the pod.

use super::netns::Netns;
use bulkhead_netlink::Netlink;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// RTNLGRP_* of linux/rtnetlink.h: links, neighbours, and addresses, routes and rules of both
/// families.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// So long a pause is taken for the end of a burst.
const QUIET: Duration = Duration::from_millis(50);

pub(super) struct Changes {
    socket: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Those in `netns`, from now on. Must be called on the runtime.
    pub async fn of(netns: &Netns) -> io::Result<Self> {
        let socket = netns.later(|| Netlink::subscribe(&GROUPS)).await?;
        let socket = socket.map_err(io::Error::other)?;
        // SAFETY: the descriptor is owned by the AsyncFd from here on and stays the same one until
        // the AsyncFd, which deregisters it first, closes it.
        let socket = unsafe { AsyncFd::register(socket) }?;
        Ok(Self { socket })
    }

    /// Waits for the next burst's end.
    pub async fn next(&self) {
        self.some().await;
        while tokio::time::timeout(QUIET, self.some()).await.is_ok() {}
    }

    /// Waits for any, and forgets all that have come.
    async fn some(&self) {
        let Ok(mut guard) = self.socket.readable().await else {
            // Only without a runtime, which is about to end then.
            return std::future::pending().await;
        };
        while self.discard() {}
        guard.clear_ready();
    }

    /// Whether there was a message, or word that some were lost.
    fn discard(&self) -> bool {
        let mut byte = 0u8;
        // SAFETY: the buffer has room for the one byte that is asked for; the message's rest is
        // dropped with it.
        let got = unsafe {
            libc::recv(
                self.socket.get_ref().as_raw_fd(),
                (&raw mut byte).cast(),
                1,
                libc::MSG_DONTWAIT | libc::MSG_TRUNC,
            )
        };
        got >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::ENOBUFS)
    }
}
