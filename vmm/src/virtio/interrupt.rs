//! Notifications from device to driver (virtio 1.3 §4.2.3.4).

use crate::pins::Pins;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// The InterruptStatus register, the interrupt line and the DEVICE_NEEDS_RESET condition; shared
/// by a transport, which the driver reads, and the device's worker, which raises them.
///
/// The driver's acknowledgement may come late, since KVM gathers it (see `wiring.rs`): by then the
/// worker may have raised the same bit again, for something that the driver has not seen. So an
/// acknowledgement takes back only what was raised before the driver's last look. And until it looks
/// it isn't interrupted again: it will see all there is.
#[derive(Debug)]
pub struct Interrupt {
    line: Line,
    /// The register's bits, and above them, by [`UNSEEN`], those of them that were raised since the
    /// driver has last read it.
    status: AtomicU32,
    needs_reset: AtomicBool,
    /// Bits that the status always has.
    standing: AtomicU32,
}

/// How an interrupt comes to the guest's interrupt controller.
#[derive(Debug)]
pub struct Line {
    event: EventFd,
    /// Which of them.
    pin: Option<(Arc<Pins>, u32)>,
}

impl Line {
    /// A pin of the machine's I/O APIC, for which `event` is registered as irqfd.
    pub fn of_pin(event: EventFd, pins: Arc<Pins>, pin: u32) -> Self {
        Line {
            event,
            pin: Some((pins, pin)),
        }
    }

    /// A descriptor that somebody reads, where there is no machine: in tests and benchmarks.
    pub fn of_event(event: EventFd) -> Self {
        Line { event, pin: None }
    }

    fn raise(&self) -> Result<(), Box<dyn std::error::Error>> {
        if let Some((pins, pin)) = &self.pin
            && pins.pulse(*pin)?
        {
            return Ok(());
        }
        // Fails only if the counter is full: then there is an interrupt that nobody has taken.
        Ok(self.event.write(1)?)
    }
}

/// How far above a bit of the register the one is that says that it's new.
const UNSEEN: u32 = 16;
const SEEN_BITS: u32 = (1 << UNSEEN) - 1;

impl Interrupt {
    /// Raised on this line.
    pub fn new(line: Line) -> Self {
        Interrupt {
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            standing: AtomicU32::new(0),
        }
    }

    /// The line's descriptor.
    pub fn event(&self) -> &EventFd {
        &self.line.event
    }

    /// The same, for somebody else who raises the line by it.
    pub fn share(&self) -> &EventFd {
        if let Some((pins, _)) = &self.line.pin {
            pins.leave_to_irqfds();
        }
        &self.line.event
    }

    /// Used buffer notification: a queue's used ring has new entries.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Configuration change notification.
    pub fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver so (virtio 1.3 §2.1.2). Only the first call
    /// until the next reset has an effect; `why` goes to the log.
    pub fn needs_reset(&self, device: &str, why: &dyn std::fmt::Display) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            tracing::warn!("the {device} device needs a reset by its driver: {why}");
            self.config_changed();
        }
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub fn reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The InterruptStatus register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire) & SEEN_BITS | self.standing.load(Ordering::Acquire)
    }

    /// The same, read by the driver.
    pub(super) fn look(&self) -> u32 {
        self.status.fetch_and(SEEN_BITS, Ordering::AcqRel) & SEEN_BITS
            | self.standing.load(Ordering::Acquire)
    }

    /// Somebody else raises the line for used buffers, without a word here: the register says until
    /// the next reset that there may be some. A driver looks at its rings then, and goes on if there
    /// are none.
    pub fn always_used_buffers(&self) {
        self.standing
            .store(VIRTIO_MMIO_INT_VRING, Ordering::Release);
    }

    /// The InterruptACK register.
    pub(super) fn acknowledge(&self, bits: u32) {
        let taken_back = |status: u32| {
            let unseen = status >> UNSEEN;
            Some(status & !(bits & SEEN_BITS & !unseen))
        };
        // The closure always gives a value, so this can't fail.
        let _ = self
            .status
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, taken_back);
    }

    /// The register as it was saved. What it says may have been on its way to the guest then, so
    /// it is said again; a driver that knows it already reads a register of zeros.
    pub(super) fn restore(&self, status: u32) {
        let status = status & (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
        self.status
            .fetch_or(status | status << UNSEEN, Ordering::AcqRel);
        self.repeat();
    }

    /// Interrupts once more for what the driver has not seen, if there is anything: when it can't
    /// have been interrupted before, say because it only now is at its interrupt.
    pub(super) fn repeat(&self) {
        if self.status.load(Ordering::Acquire) >> UNSEEN != 0 {
            self.interrupt();
        }
    }

    /// As after power-on. The device is not active then, so nobody raises anything meanwhile.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.standing.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        // The driver reads the status after the interrupt, so the bit must be there before.
        let before = self.status.fetch_or(bit | bit << UNSEEN, Ordering::AcqRel);
        // Otherwise it has been interrupted and has not read the register yet: when it does it finds
        // this bit, too, and a second interrupt would be for nothing.
        if before >> UNSEEN == 0 {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        if let Err(error) = self.line.raise() {
            tracing::debug!("raising an interrupt: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn bits_stay_until_acknowledged() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(Line::of_event(line.try_clone().unwrap()));
        interrupt.used_buffers();
        interrupt.config_changed();
        assert_eq!(line.read().unwrap(), 1, "one interrupt for both");
        assert_eq!(interrupt.look(), 3);
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.status(), 0);
    }

    #[test]
    fn what_the_driver_has_not_seen_stays() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(Line::of_event(line));
        interrupt.used_buffers();
        assert_eq!(interrupt.look(), 1);
        // The acknowledgement of that look comes after this.
        interrupt.used_buffers();
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 1);
        assert_eq!(interrupt.look(), 1);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.look(), 0);
    }

    #[test]
    fn what_may_have_been_lost_is_told_again() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(Line::of_event(line.try_clone().unwrap()));
        interrupt.repeat();
        assert!(line.read().is_err());
        interrupt.config_changed();
        assert_eq!(line.read().unwrap(), 1);
        interrupt.repeat();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(interrupt.look(), 2);
        interrupt.repeat();
        assert!(line.read().is_err());
        interrupt.restore(interrupt.status());
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(interrupt.look(), 2);
    }

    #[test]
    fn needs_reset_is_told_once_until_reset() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(Line::of_event(line.try_clone().unwrap()));
        interrupt.needs_reset("test", &"because");
        interrupt.needs_reset("test", &"again");
        assert_eq!(line.read().unwrap(), 1);
        assert!(interrupt.reset_needed());
        interrupt.reset();
        assert!(!interrupt.reset_needed());
        assert_eq!(interrupt.status(), 0);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Raise(u32),
        Look,
        Acknowledge(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1u32..=3).prop_map(Step::Raise),
            Just(Step::Look),
            any::<u32>().prop_map(Step::Acknowledge),
            (0u32..=3).prop_map(Step::Acknowledge),
        ];
        prop::collection::vec(step, 0..40)
    }

    proptest! {
        /// Whatever a driver acknowledges, and when: it sees what was raised since its last look, and
        /// nothing that was neither raised since nor left by it; and it is interrupted once for all
        /// that it will see by one look.
        #[test]
        fn nothing_is_lost_and_nothing_made_up(steps in steps()) {
            let line = EventFd::new(EFD_NONBLOCK).unwrap();
            let interrupt = Interrupt::new(Line::of_event(line.try_clone().unwrap()));
            let (mut unseen, mut seen) = (0, 0);
            for step in steps {
                match step {
                    Step::Raise(bits) => {
                        interrupt.raise(bits);
                        prop_assert_eq!(line.read().is_ok(), unseen == 0);
                        unseen |= bits;
                    }
                    Step::Look => {
                        prop_assert_eq!(interrupt.look(), unseen | seen);
                        seen |= unseen;
                        unseen = 0;
                    }
                    Step::Acknowledge(bits) => {
                        interrupt.acknowledge(bits);
                        seen &= !bits;
                    }
                }
                prop_assert_eq!(interrupt.status(), unseen | seen);
            }
        }
    }
}
