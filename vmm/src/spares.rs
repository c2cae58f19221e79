//! Spare slots: device windows that are empty until a device is plugged in while the guest runs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_proto::vmm::{FIRST_SPARE_SLOT, PluggedDevice, PluggedSlot, RateLimit, SPARE_SLOTS};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::bus::Bus;
use crate::config::{ConfigError, check_serial};
use crate::event_loop::EventLoopHandle;
use crate::pins::Pins;
use crate::virtio::block::{Backing, BackingError, BlockDevice};
use crate::virtio::net::{
    NetConfig, NetCounters, NetDevice, Tap, TapError, VhostError, VhostNetDevice,
};
use crate::virtio::{DeviceType, VirtioDevice};
use crate::wiring::{Place, WiringError};

/// Why a device was not plugged or unplugged; nothing has changed.
#[derive(Debug, Error)]
pub enum SpareError {
    /// A value of the request.
    #[error(transparent)]
    Value(#[from] ConfigError),
    /// What came with the request.
    #[error(
        "the request came with {found} descriptors, it takes {expected}; send them with it as SCM_RIGHTS"
    )]
    Descriptors {
        /// How many came.
        found: usize,
        /// How many there should be.
        expected: &'static str,
    },
    /// A block device's backing.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A descriptor of vhost-net.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// vhost-net knows no limits.
    #[error("a card with rate limits can't have vhost-net; plug it without")]
    LimitedVhost,
    /// A rate limit's timer.
    #[error("creating a rate limit's timer: {0}; check the limit on open files (ulimit -n)")]
    Timer(#[source] std::io::Error),
    /// No slot is left.
    #[error("all spare slots are in use; unplug a device first")]
    Full,
    /// Nothing to unplug.
    #[error(
        "there is no device in slot {0}, or it is no spare slot; the status names those in use"
    )]
    Empty(u32),
    /// The device's window.
    #[error(transparent)]
    Wiring(#[from] WiringError),
}

/// The machine's spare slots and what is in them.
pub struct Spares {
    pins: Arc<Pins>,
    /// What devices work on.
    memory: GuestMemoryMmap,
    bus: Arc<Bus>,
    events: EventLoopHandle,
    plugged: BTreeMap<u32, Plugged>,
}

struct Plugged {
    device: DeviceType,
    /// Of a network card.
    net: Option<Arc<NetCounters>>,
}

impl Spares {
    /// Empty slots of `bus`, for devices that work on `memory` in `events`.
    pub fn new(
        pins: Arc<Pins>,
        memory: GuestMemoryMmap,
        bus: Arc<Bus>,
        events: EventLoopHandle,
    ) -> Self {
        Self {
            pins,
            memory,
            bus,
            events,
            plugged: BTreeMap::new(),
        }
    }

    /// Whether no device is plugged.
    pub fn is_empty(&self) -> bool {
        self.plugged.is_empty()
    }

    /// The devices by slot.
    pub fn plugged(&self) -> Vec<PluggedDevice> {
        self.plugged
            .iter()
            .map(|(slot, plugged)| PluggedDevice {
                slot: *slot,
                device: plugged.device.name().to_owned(),
                net: plugged.net.as_ref().map(|counters| counters.read()),
            })
            .collect()
    }

    /// Plugs a block device over the one descriptor of `backing`.
    ///
    /// # Errors
    /// [`SpareError`].
    pub fn plug_block(
        &mut self,
        serial: &str,
        read_only: bool,
        backing: Vec<OwnedFd>,
    ) -> Result<PluggedSlot, SpareError> {
        check_serial("serial", serial)?;
        let found = backing.len();
        let [file] = <[OwnedFd; 1]>::try_from(backing).map_err(|_| SpareError::Descriptors {
            found,
            expected: "one, of the backing",
        })?;
        let backing = Backing::new(file.into())?;
        let (device, _) = BlockDevice::new(serial, Some(backing), read_only, self.events.clone());
        self.plug(Box::new(device), None)
    }

    /// Plugs a network card over the descriptors of a tap device, one for each pair of queues, and,
    /// with `vhost`, as many of /dev/vhost-net behind them.
    ///
    /// # Errors
    /// [`SpareError`].
    pub fn plug_net(
        &mut self,
        config: NetConfig,
        vhost: bool,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<PluggedSlot, SpareError> {
        check_card(&config)?;
        let found = descriptors.len();
        let vhosts = match vhost {
            true => descriptors.split_off(found / 2),
            false => Vec::new(),
        };
        if descriptors.is_empty() || (vhost && vhosts.len() != descriptors.len()) {
            return Err(SpareError::Descriptors {
                found,
                expected: "one of a tap for each pair of queues, and with vhost as many of that",
            });
        }
        let taps = descriptors
            .into_iter()
            .map(Tap::new)
            .collect::<Result<_, _>>()?;
        if vhost {
            if [config.to_guest, config.from_guest] != [RateLimit::default(); 2] {
                return Err(SpareError::LimitedVhost);
            }
            let events = self.events.clone();
            let device = VhostNetDevice::new(config, taps, vhosts, &self.memory, events)?;
            return self.plug(Box::new(device), None);
        }
        let (device, counters) =
            NetDevice::new(config, taps, self.events.clone()).map_err(SpareError::Timer)?;
        self.plug(Box::new(device), Some(counters))
    }

    /// Takes the device out of `slot`. What its driver has begun is not finished.
    ///
    /// # Errors
    /// [`SpareError::Empty`].
    pub fn unplug(&mut self, slot: u32) -> Result<(), SpareError> {
        let (place, window) = Place::of_spare(slot)
            .and_then(|place| Some((place, self.bus.unplug(slot)?)))
            .ok_or(SpareError::Empty(slot))?;
        // No further notifications, then no worker, then no line to raise.
        place.disconnect(self.pins.vm(), &window);
        window.end();
        self.plugged.remove(&slot);
        Ok(())
    }

    fn plug(
        &mut self,
        device: Box<dyn VirtioDevice>,
        net: Option<Arc<NetCounters>>,
    ) -> Result<PluggedSlot, SpareError> {
        let place = self.free_place().ok_or(SpareError::Full)?;
        let plugged = Plugged {
            device: device.device_type(),
            net,
        };
        let window = place.connect(&self.pins, &self.memory, device)?;
        if let Err(error) = place.gather_acknowledgements(self.pins.vm()) {
            place.disconnect(self.pins.vm(), &window);
            return Err(error.into());
        }
        self.bus.plug(place.slot, window);
        self.plugged.insert(place.slot, plugged);
        Ok(PluggedSlot {
            slot: place.slot,
            address: place.address(),
            irq: place.irq,
        })
    }

    /// The first free slot of those whose line has the fewest devices: an interrupt costs the guest
    /// a look at each device on its line.
    fn free_place(&self) -> Option<Place> {
        let sharing = |irq| {
            self.plugged
                .keys()
                .filter(|slot| Place::of_spare(**slot).is_some_and(|place| place.irq == irq))
                .count()
        };
        (FIRST_SPARE_SLOT..FIRST_SPARE_SLOT + SPARE_SLOTS)
            .filter(|slot| !self.plugged.contains_key(slot))
            .filter_map(Place::of_spare)
            .min_by_key(|place| sharing(place.irq))
    }
}

/// Least MTU of IPv4 (RFC 791), which virtio 1.3 §5.1.4.1 names as the least of a card.
const MIN_MTU: u16 = 68;

fn check_card(config: &NetConfig) -> Result<(), ConfigError> {
    let refuse = |key, value: String, allowed: &str| {
        Err(ConfigError::OutOfRange {
            key,
            value,
            allowed: allowed.into(),
        })
    };
    // IEEE 802: the lowest bit of the first byte is a group's.
    if config.mac == [0; 6] || config.mac[0] & 1 != 0 {
        return refuse("mac", format!("{:02x?}", config.mac), "a unicast address");
    }
    if config.mtu < MIN_MTU {
        return refuse("mtu", config.mtu.to_string(), "at least 68");
    }
    Ok(())
}
