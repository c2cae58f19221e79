//! virtio-balloon (virtio 1.3 §5.5), for its free page reporting: what the guest has freed goes
//! back to the host, without anybody asking for it.
//!
//! The balloon itself stays empty: `num_pages` is 0. A driver that inflates it all the same is
//! served. VIRTIO_BALLOON_F_PAGE_POISON is not offered: a guest that counts on what it has filled
//! free pages with (`init_on_free`, page poisoning) must then not report any (§5.5.6.7), and Linux
//! does not.

mod device;
mod request;
#[cfg(test)]
mod tests;

pub use device::BalloonDevice;
