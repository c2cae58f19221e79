//! Credit-based flow control (virtio 1.3 §5.10.6.3): plain numbers, all modulo 2^32.

use super::CLIENT_BUFFER;
use super::packet::Credit;

/// What the guest may still send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiveWindow {
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest was told last.
    told: u32,
}

impl ReceiveWindow {
    /// Takes note of `len` bytes from the guest; false if they are more than it was allowed.
    #[must_use]
    pub fn receive(&mut self, len: u32) -> bool {
        let fits = len <= CLIENT_BUFFER - self.held();
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// Takes note of `len` bytes passed on to the client, of those received.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len.min(self.held()));
    }

    /// Bytes received and not passed on; never more than [`CLIENT_BUFFER`].
    fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// What to tell the guest, which then knows it.
    pub fn tell(&mut self) -> Credit {
        self.told = self.forwarded;
        Credit {
            buf_alloc: CLIENT_BUFFER,
            fwd_cnt: self.forwarded,
        }
    }

    /// Whether the guest thinks that less than half of the buffer is free though more of it is.
    pub fn update_due(&self) -> bool {
        self.told != self.forwarded && self.received.wrapping_sub(self.told) > CLIENT_BUFFER / 2
    }
}

/// What the guest can still take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendWindow {
    sent: u32,
    peer: Credit,
}

impl SendWindow {
    /// The guest tells its credit, with every packet.
    pub fn update(&mut self, peer: Credit) {
        self.peer = peer;
    }

    /// Bytes that may be sent. A guest that tells nonsense only gets more or fewer bytes.
    pub fn free(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer.fwd_cnt);
        self.peer.buf_alloc.saturating_sub(under_way)
    }

    /// Takes note of `len` bytes sent.
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A good guest that sends only what it may is never refused and never stuck, across the
        /// wrap of the counters.
        #[test]
        fn a_good_guest_is_never_refused_nor_stuck(
            start: u32,
            steps in prop::collection::vec((0u32..=CLIENT_BUFFER, 0u32..=CLIENT_BUFFER), 1..64),
        ) {
            let mut host = ReceiveWindow { received: start, forwarded: start, told: start };
            let mut guest = SendWindow { sent: start, peer: host.tell() };
            let mut total = 0u64;
            for (wants, forwards) in steps {
                let len = wants.min(guest.free());
                prop_assert!(host.receive(len));
                guest.send(len);
                total += u64::from(len);
                host.forward(forwards);
                if host.update_due() {
                    guest.update(host.tell());
                }
                prop_assert!(host.held() <= CLIENT_BUFFER);
            }
            // Once the client has read all, the guest knows of half the buffer at least.
            host.forward(u32::MAX);
            if host.update_due() {
                guest.update(host.tell());
            }
            prop_assert!(guest.free() >= CLIENT_BUFFER / 2, "{} after {total}", guest.free());
        }

        /// A guest that sends more than it may is refused, and never are more bytes held than the
        /// buffer has.
        #[test]
        fn a_greedy_guest_is_refused(lens in prop::collection::vec(any::<u32>(), 1..32), forwards: u32) {
            let mut host = ReceiveWindow::default();
            for len in lens {
                let before = host;
                if !host.receive(len) {
                    prop_assert_eq!(before, host);
                    prop_assert!(u64::from(before.held()) + u64::from(len) > u64::from(CLIENT_BUFFER));
                }
                host.forward(forwards);
                prop_assert!(host.held() <= CLIENT_BUFFER);
            }
        }
    }

    #[test]
    fn nonsense_credit_gives_none_or_much_but_no_panic() {
        let mut window = SendWindow::default();
        window.send(100);
        window.update(Credit {
            buf_alloc: 50,
            fwd_cnt: 0,
        });
        assert_eq!(window.free(), 0);
        window.update(Credit {
            buf_alloc: u32::MAX,
            fwd_cnt: 200,
        });
        assert_eq!(window.free(), 99);
    }
}
