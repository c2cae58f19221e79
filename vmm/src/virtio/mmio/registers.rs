//! The register map (virtio 1.3 §4.2.2, table 4.1).

use virtio_bindings::virtio_mmio as offsets;

/// "virt", little-endian.
pub const MAGIC: u32 = 0x7472_6976;
/// Without the legacy interface.
pub const VERSION: u32 = 2;
/// "BLKH", little-endian; any value does.
pub const VENDOR: u32 = 0x484b_4c42;
/// Offset of the configuration space.
pub const CONFIG: u64 = offsets::VIRTIO_MMIO_CONFIG as u64;

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $offset:ident;)*) => {
        /// A 32-bit register by its name in the specification.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Register {
            $($(#[$doc])* $name,)*
        }

        impl Register {
            /// The register at `offset` of the window, none for the legacy interface's and for
            /// gaps.
            pub fn at(offset: u64) -> Option<Register> {
                match u32::try_from(offset).ok()? {
                    $(offsets::$offset => Some(Register::$name),)*
                    _ => None,
                }
            }

            /// All registers with their offsets.
            #[cfg(test)]
            pub const ALL: &[(Register, u64)] = &[
                $((Register::$name, offsets::$offset as u64),)*
            ];
        }
    };
}

registers! {
    /// R
    MagicValue = VIRTIO_MMIO_MAGIC_VALUE;
    /// R
    Version = VIRTIO_MMIO_VERSION;
    /// R
    DeviceId = VIRTIO_MMIO_DEVICE_ID;
    /// R
    VendorId = VIRTIO_MMIO_VENDOR_ID;
    /// R
    DeviceFeatures = VIRTIO_MMIO_DEVICE_FEATURES;
    /// W
    DeviceFeaturesSelect = VIRTIO_MMIO_DEVICE_FEATURES_SEL;
    /// W
    DriverFeatures = VIRTIO_MMIO_DRIVER_FEATURES;
    /// W
    DriverFeaturesSelect = VIRTIO_MMIO_DRIVER_FEATURES_SEL;
    /// W
    QueueSelect = VIRTIO_MMIO_QUEUE_SEL;
    /// R
    QueueSizeMax = VIRTIO_MMIO_QUEUE_NUM_MAX;
    /// W
    QueueSize = VIRTIO_MMIO_QUEUE_NUM;
    /// RW
    QueueReady = VIRTIO_MMIO_QUEUE_READY;
    /// W
    QueueNotify = VIRTIO_MMIO_QUEUE_NOTIFY;
    /// R
    InterruptStatus = VIRTIO_MMIO_INTERRUPT_STATUS;
    /// W
    InterruptAcknowledge = VIRTIO_MMIO_INTERRUPT_ACK;
    /// RW
    Status = VIRTIO_MMIO_STATUS;
    /// W
    QueueDescriptorLow = VIRTIO_MMIO_QUEUE_DESC_LOW;
    /// W
    QueueDescriptorHigh = VIRTIO_MMIO_QUEUE_DESC_HIGH;
    /// W
    QueueDriverLow = VIRTIO_MMIO_QUEUE_AVAIL_LOW;
    /// W
    QueueDriverHigh = VIRTIO_MMIO_QUEUE_AVAIL_HIGH;
    /// W
    QueueDeviceLow = VIRTIO_MMIO_QUEUE_USED_LOW;
    /// W
    QueueDeviceHigh = VIRTIO_MMIO_QUEUE_USED_HIGH;
    /// W
    SharedMemorySelect = VIRTIO_MMIO_SHM_SEL;
    /// R
    SharedMemoryLengthLow = VIRTIO_MMIO_SHM_LEN_LOW;
    /// R
    SharedMemoryLengthHigh = VIRTIO_MMIO_SHM_LEN_HIGH;
    /// R
    SharedMemoryBaseLow = VIRTIO_MMIO_SHM_BASE_LOW;
    /// R
    SharedMemoryBaseHigh = VIRTIO_MMIO_SHM_BASE_HIGH;
    /// R
    ConfigGeneration = VIRTIO_MMIO_CONFIG_GENERATION;
}
