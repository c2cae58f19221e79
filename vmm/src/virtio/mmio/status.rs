//! The device status field (virtio 1.3 §2.1) as a value without any device.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};

/// The bits in the order in which §3.1.1 has the driver set them.
const ORDER: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// What a write made of the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing that anyone must act on.
    Nothing,
    /// The device is to be activated.
    DriverOk,
}

/// The bits that the driver has set; DEVICE_NEEDS_RESET is the device's and not kept here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status(u32);

impl Status {
    /// The bits, for a saved machine.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// A saved status: bits set in order, and not FAILED, since nobody saves such a device.
    pub fn from_bits(bits: u32) -> Option<Status> {
        let mut in_order = 0;
        let mut valid = bits == 0;
        for bit in ORDER {
            in_order |= bit;
            valid |= bits == in_order;
        }
        valid.then_some(Status(bits))
    }

    /// From FEATURES_OK on.
    pub fn features_chosen(self) -> bool {
        self.has(FEATURES_OK)
    }

    /// The register as the driver reads it.
    pub fn register(self, needs_reset: bool) -> u32 {
        self.0 | if needs_reset { NEEDS_RESET } else { 0 }
    }

    /// After DRIVER, before FEATURES_OK.
    pub fn choosing_features(self) -> bool {
        self.0 == ACKNOWLEDGE | DRIVER
    }

    /// After FEATURES_OK, before DRIVER_OK.
    pub fn setting_up_queues(self) -> bool {
        self.0 == ACKNOWLEDGE | DRIVER | FEATURES_OK
    }

    /// From DRIVER_OK on.
    pub fn active(self) -> bool {
        self.0 & DRIVER_OK != 0
    }

    /// The driver writes the register, with a value other than 0.
    ///
    /// §2.1.1: the driver must not clear bits, nor set FAILED and then go on without a reset;
    /// §3.1.1: it must set them in order. A write that breaks this is ignored. FEATURES_OK does
    /// not stick if the features are not good (§2.2.2), so the driver sees it when it reads back.
    pub fn write(&mut self, value: u32, features_good: bool) -> Change {
        let value = value & !NEEDS_RESET;
        if self.0 & !value != 0 || self.0 & FAILED != 0 {
            return Change::Nothing;
        }
        if value & FAILED != 0 {
            self.0 |= FAILED;
            return Change::Nothing;
        }
        let before = *self;
        for bit in ORDER {
            if value & bit == 0 || (bit == FEATURES_OK && !before.has(bit) && !features_good) {
                break;
            }
            self.0 |= bit;
        }
        if self.active() && !before.active() {
            Change::DriverOk
        } else {
            Change::Nothing
        }
    }

    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_proper_order_leads_to_activation() {
        let mut status = Status::default();
        assert_eq!(status.write(1, false), Change::Nothing);
        assert_eq!(status.write(3, false), Change::Nothing);
        assert!(status.choosing_features());
        assert_eq!(status.write(11, false), Change::Nothing);
        assert_eq!(status.register(false), 3, "bad features");
        assert_eq!(status.write(11, true), Change::Nothing);
        assert!(status.setting_up_queues());
        assert_eq!(status.write(15, false), Change::DriverOk);
        assert_eq!(status.write(15, true), Change::Nothing, "only once");
        assert_eq!(status.register(true), 15 | NEEDS_RESET);
        assert_eq!(
            status.write(15 | NEEDS_RESET | FAILED, true),
            Change::Nothing
        );
        assert_eq!(status.register(false), 15 | FAILED);
    }

    #[test]
    fn only_what_a_driver_can_reach_is_restored() {
        let valid: Vec<u32> = (0..=u32::from(u8::MAX))
            .filter(|bits| Status::from_bits(*bits).is_some())
            .collect();
        assert_eq!(valid, [0, 1, 3, 11, 15]);
        assert!(Status::from_bits(15 | 1 << 31).is_none());
    }

    proptest! {
        /// Whatever is written, bits are set in order, never cleared, and activation happens at
        /// most once and only with good features.
        #[test]
        fn invariants_hold_for_all_writes(writes in prop::collection::vec((any::<u8>(), any::<bool>()), 0..32)) {
            let mut status = Status::default();
            let mut activations = 0;
            for (value, good) in writes {
                let before = status;
                let change = status.write(u32::from(value), good);
                prop_assert_eq!(before.0 & !status.0, 0);
                let in_order = [0, 1, 3, 11, 15];
                prop_assert!(in_order.contains(&(status.0 & !FAILED)));
                prop_assert!(good || !status.has(FEATURES_OK) || before.has(FEATURES_OK));
                activations += u32::from(change == Change::DriverOk);
            }
            prop_assert_eq!(activations, u32::from(status.active()));
        }
    }
}
