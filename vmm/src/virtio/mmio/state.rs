//! A transport as part of a saved machine: suspended, described, and resumed from a description,
//! which may be hostile.

use super::super::queue::{QueueIndexError, QueuePosition, Virtqueue};
use super::super::queue_config::{QueueConfig, QueueConfigError};
use super::super::{Activation, DeviceState, DeviceType, F_EVENT_IDX, SuspendError};
use super::status::Status;
use super::{DriverState, MmioTransport};
use serde::{Deserialize, Serialize};

/// What the driver has written to a transport's registers, and where its device had come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Which device is behind the window.
    pub device: DeviceType,
    status: u32,
    features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    queues: Vec<QueueState>,
    device_state: DeviceState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueState {
    config: QueueConfig,
    position: QueuePosition,
}

/// Why a transport can't be suspended or resumed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Its driver has to reset it first, or has given it up.
    #[error("the {} device waits for a reset by its driver", .0.name())]
    NeedsReset(DeviceType),
    /// The device itself.
    #[error(transparent)]
    Device(#[from] SuspendError),
    /// Another device is in this slot.
    #[error("a {} device was saved where a {} device is", .saved.name(), .here.name())]
    OtherDevice {
        /// In the saved machine.
        saved: DeviceType,
        /// In this one.
        here: DeviceType,
    },
    /// No driver can have reached this.
    #[error("the saved {} device has {what}", .device.name())]
    Impossible {
        /// Which device.
        device: DeviceType,
        /// What is impossible.
        what: String,
    },
    /// The queues' addresses and sizes.
    #[error("the saved {} device: {source}", .device.name())]
    QueueConfig {
        /// Which device.
        device: DeviceType,
        /// What is wrong.
        source: QueueConfigError,
    },
    /// The queues' indices.
    #[error("the saved {} device: {source}", .device.name())]
    QueueIndex {
        /// Which device.
        device: DeviceType,
        /// What is wrong.
        source: QueueIndexError,
    },
}

impl MmioTransport {
    /// Stops the device so that its driver notices nothing after [`MmioTransport::resume`]. The
    /// vCPUs must be paused from before until after that.
    ///
    /// # Errors
    /// When the device is in use in a way that would not survive; it works on then.
    pub fn suspend(&mut self) -> Result<TransportState, StateError> {
        let device = self.device_type();
        if self.interrupt.reset_needed() || Status::from_bits(self.driver.status.bits()).is_none() {
            return Err(StateError::NeedsReset(device));
        }
        let mut positions = vec![QueuePosition::default(); self.driver.queues.len()];
        let mut device_state = DeviceState::None;
        if self.driver.status.active() {
            let (queues, state) = self.device.suspend()?;
            device_state = state;
            for (position, queue) in positions.iter_mut().zip(&queues) {
                *position = queue.position();
            }
            self.kicks = Some(queues.into_iter().map(Virtqueue::into_kick).collect());
        }
        let driver = &self.driver;
        Ok(TransportState {
            device,
            status: driver.status.bits(),
            features: driver.features,
            device_features_select: driver.device_features_select,
            driver_features_select: driver.driver_features_select,
            queue_select: driver.queue_select,
            interrupt_status: self.interrupt.status(),
            queues: driver
                .queues
                .iter()
                .zip(positions)
                .map(|(&config, position)| QueueState { config, position })
                .collect(),
            device_state,
        })
    }

    /// Goes on from `state`: that of this transport itself, or of one of the same make in another
    /// process, whose guest memory is this one's by now.
    ///
    /// # Errors
    /// When `state` is impossible or doesn't fit this device; the device is then not active.
    pub fn resume(&mut self, state: &TransportState) -> Result<(), StateError> {
        let device = self.device_type();
        if state.device != device {
            return Err(StateError::OtherDevice {
                saved: state.device,
                here: device,
            });
        }
        let driver = self.driver_state(state)?;
        let active = driver.status.active();
        self.driver = driver;
        self.interrupt.restore(state.interrupt_status);
        if !active {
            return Ok(());
        }
        let activation = self.activation(state)?;
        // A notification may have been on its way; the workers look once in any case.
        let kick_all = |events: &[vmm_sys_util::eventfd::EventFd]| {
            for event in events {
                // Fails only if the counter is full, and then the worker wakes up anyway.
                let _ = event.write(1);
            }
        };
        self.device.resume(activation, state.device_state)?;
        kick_all(&self.queue_events);
        Ok(())
    }

    /// Sets DEVICE_NEEDS_RESET.
    pub fn needs_reset(&self, why: &dyn std::fmt::Display) {
        self.interrupt.needs_reset(self.name(), why);
    }

    fn driver_state(&self, state: &TransportState) -> Result<DriverState, StateError> {
        let impossible = |what: String| StateError::Impossible {
            device: state.device,
            what,
        };
        let status = Status::from_bits(state.status)
            .ok_or_else(|| impossible(format!("the status {:#x}", state.status)))?;
        let unknown = state.features & !self.offered_features();
        if status.features_chosen() && unknown != 0 {
            return Err(impossible(format!(
                "features that this one doesn't offer: {unknown:#x}"
            )));
        }
        let (saved, here) = (state.queues.len(), self.driver.queues.len());
        if saved != here {
            return Err(impossible(format!("{saved} queues instead of {here}")));
        }
        Ok(DriverState {
            status,
            features: state.features,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            queue_select: state.queue_select,
            queues: state.queues.iter().map(|queue| queue.config).collect(),
        })
    }

    /// The queues as saved, checked like a driver's own configuration.
    fn activation(&mut self, state: &TransportState) -> Result<Activation, StateError> {
        let device = state.device;
        let event_idx = state.features & F_EVENT_IDX != 0;
        let mut rings = Vec::with_capacity(state.queues.len());
        let sizes = self.device.queue_max_sizes();
        for (index, (queue, &max)) in state.queues.iter().zip(sizes).enumerate() {
            let mut ring = queue
                .config
                .validate(index, max, event_idx, &self.mem)
                .map_err(|source| StateError::QueueConfig { device, source })?;
            queue
                .position
                .apply(index, &mut ring, &self.mem)
                .map_err(|source| StateError::QueueIndex { device, source })?;
            rings.push(ring);
        }
        let kicks = self.kicks.take().ok_or(StateError::NeedsReset(device))?;
        Ok(Activation {
            mem: self.mem.clone(),
            interrupt: self.interrupt.clone(),
            queues: rings
                .into_iter()
                .zip(kicks)
                .map(|(ring, kick)| Virtqueue::new(ring, kick))
                .collect(),
            features: state.features,
        })
    }
}
