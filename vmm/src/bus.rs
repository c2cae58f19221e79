//! Where a vCPU's accesses to ports and device windows go.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::vmm::{FIRST_SPARE_SLOT, SPARE_SLOTS};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::arch::x86_64::layout;
use crate::snapshot::{Refused, UartState};
use crate::virtio::console::ConsoleLog;
use crate::virtio::mmio::{MMIO_SIZE, MmioTransport, StateError, TransportState};

/// First of the eight ports of the early console's UART.
const UART_BASE: u16 = 0x3f8;
const UART_LAST: u16 = 0x3ff;
/// Command port of the keyboard controller, and the command that pulses the reset line: how Linux
/// leaves with `reboot=k`.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// Status register of that controller: nothing to read, ready for a command.
const I8042_IDLE: u8 = 0;

/// What a port write asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortEffect {
    /// Nothing further.
    None,
    /// The guest reset the machine.
    Reset,
}

/// Ports and virtio windows, shared by all vCPUs.
pub struct Bus {
    uart: Mutex<Uart>,
    console: Arc<Mutex<ConsoleLog>>,
    windows: Vec<Mutex<MmioTransport>>,
    /// Windows of the spare slots, from [`FIRST_SPARE_SLOT`] on.
    spares: Vec<Mutex<Option<Box<MmioTransport>>>>,
    /// Where memory can be plugged. What arrives here is for blocks that aren't.
    hotplug: Range<u64>,
}

impl Bus {
    /// A bus with the early console and `devices`, window by window from
    /// [`layout::MMIO_BASE`] on, and memory that can be plugged at the addresses of `hotplug`.
    pub fn new(
        console: Arc<Mutex<ConsoleLog>>,
        devices: Vec<MmioTransport>,
        hotplug: Range<u64>,
    ) -> Self {
        Self {
            uart: Mutex::new(Serial::new(
                NoInterrupt,
                ConsoleWriter(Arc::clone(&console)),
            )),
            console,
            windows: devices.into_iter().map(Mutex::new).collect(),
            spares: (0..SPARE_SLOTS).map(|_| Mutex::new(None)).collect(),
            hotplug,
        }
    }

    /// A read of the guest's from a device window. Memory that isn't plugged reads as zeros, other
    /// addresses without a device as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let read = self.with_window(address, |device, offset| device.read(offset, data));
        match read {
            Some(()) => {}
            None if self.hotplug.contains(&address) => data.fill(0),
            None => data.fill(0xff),
        }
    }

    /// A write of the guest's to a device window; addresses without a device ignore it.
    pub fn write(&self, address: u64, data: &[u8]) {
        let _ = self.with_window(address, |device, offset| device.write(offset, data));
    }

    /// A read of the guest's from a port.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port {
            UART_BASE..=UART_LAST => {
                let mut uart = locked(&self.uart);
                for byte in data {
                    *byte = uart.read((port - UART_BASE) as u8);
                }
            }
            I8042_COMMAND => data.fill(I8042_IDLE),
            _ => data.fill(0xff),
        }
    }

    /// A write of the guest's to a port.
    pub fn port_out(&self, port: u16, data: &[u8]) -> PortEffect {
        match port {
            UART_BASE..=UART_LAST => {
                let mut uart = locked(&self.uart);
                for byte in data {
                    // An error can only come from the log, which drops what it can't keep.
                    let _ = uart.write((port - UART_BASE) as u8, *byte);
                }
                PortEffect::None
            }
            I8042_COMMAND if data.first() == Some(&I8042_RESET) => PortEffect::Reset,
            _ => PortEffect::None,
        }
    }

    /// Suspends all devices, or none. The vCPUs must be paused.
    ///
    /// # Errors
    /// When one of them is in use; all work on then.
    pub fn suspend(&self) -> Result<Vec<TransportState>, StateError> {
        let mut states = Vec::with_capacity(self.windows.len());
        for window in &self.windows {
            match locked(window).suspend() {
                Ok(state) => states.push(state),
                Err(error) => {
                    self.resume_here(&states);
                    return Err(error);
                }
            }
        }
        Ok(states)
    }

    /// Has devices that were suspended go on. One that can't, since the guest's driver has spoiled
    /// its rings, waits for a reset by it.
    pub fn resume_here(&self, states: &[TransportState]) {
        for (window, state) in self.windows.iter().zip(states) {
            let mut window = locked(window);
            if let Err(error) = window.resume(state) {
                window.needs_reset(&error);
            }
        }
    }

    /// Puts all devices into the state in which another process has suspended their like.
    ///
    /// # Errors
    /// When there are other devices here, or their state is impossible.
    pub fn resume(&self, states: &[TransportState]) -> Result<(), Refused> {
        if states.len() != self.windows.len() {
            return Err(Refused::Count {
                what: "devices",
                found: states.len(),
                expected: self.windows.len(),
            });
        }
        for (window, state) in self.windows.iter().zip(states) {
            locked(window).resume(state)?;
        }
        Ok(())
    }

    /// The early console's registers.
    pub fn uart_state(&self) -> UartState {
        locked(&self.uart).state().into()
    }

    /// Sets the early console's registers.
    ///
    /// # Errors
    /// When no UART can have them.
    pub fn restore_uart(&self, state: UartState) -> Result<(), Refused> {
        let writer = ConsoleWriter(Arc::clone(&self.console));
        *locked(&self.uart) = Serial::from_state(&state.into(), NoInterrupt, NoEvents, writer)
            .map_err(|error| Refused::Uart(format!("{error:?}")))?;
        Ok(())
    }

    /// Puts a device into spare slot `slot`, which exists and is empty.
    pub fn plug(&self, slot: u32, device: MmioTransport) {
        let Some(window) = self.spare(slot) else {
            debug_assert!(false, "there is no spare slot {slot}");
            return;
        };
        *locked(window) = Some(Box::new(device));
    }

    /// Takes the device out of spare slot `slot`; none if there is none.
    pub fn unplug(&self, slot: u32) -> Option<MmioTransport> {
        locked(self.spare(slot)?).take().map(|device| *device)
    }

    fn spare(&self, slot: u32) -> Option<&Mutex<Option<Box<MmioTransport>>>> {
        let index = slot.checked_sub(FIRST_SPARE_SLOT)?;
        self.spares.get(usize::try_from(index).ok()?)
    }

    /// Calls `access` with the device at `address`, if there is one, and the offset in its window.
    fn with_window<R>(
        &self,
        address: u64,
        access: impl FnOnce(&mut MmioTransport, u64) -> R,
    ) -> Option<R> {
        let offset = address.checked_sub(layout::MMIO_BASE)?;
        let slot = u32::try_from(offset / MMIO_SIZE).ok()?;
        let offset = offset % MMIO_SIZE;
        if let Some(device) = self.windows.get(usize::try_from(slot).ok()?) {
            return Some(access(&mut locked(device), offset));
        }
        let mut window = locked(self.spare(slot)?);
        Some(access(window.as_deref_mut()?, offset))
    }
}

/// A device whose last user panicked is still memory-safe; the guest sees what state it left.
fn locked<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The UART serves the kernel's early console, which polls: no interrupt line.
type Uart = Serial<NoInterrupt, NoEvents, ConsoleWriter>;

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Early console output goes to the same bounded log as the virtio console's.
struct ConsoleWriter(Arc<Mutex<ConsoleLog>>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        locked(&self.0).write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNPLUGGED: Range<u64> = 0x1_0000_0000..0x1_0800_0000;

    fn bus() -> (Bus, Arc<Mutex<ConsoleLog>>) {
        let console = Arc::new(Mutex::new(ConsoleLog::new(None, 0)));
        (
            Bus::new(Arc::clone(&console), Vec::new(), UNPLUGGED),
            console,
        )
    }

    #[test]
    fn the_uart_writes_to_the_console_log() {
        let (bus, console) = bus();
        for byte in b"early\n" {
            let mut status = [0u8];
            bus.port_in(UART_BASE + 5, &mut status);
            assert_ne!(status[0] & 0x20, 0, "transmitter holding register empty");
            assert_eq!(bus.port_out(UART_BASE, &[*byte]), PortEffect::None);
        }
        assert_eq!(console.lock().unwrap().tail(), ["early"]);
    }

    #[test]
    fn only_the_reset_command_resets() {
        let (bus, _) = bus();
        assert_eq!(bus.port_out(I8042_COMMAND, &[0xfe]), PortEffect::Reset);
        assert_eq!(bus.port_out(I8042_COMMAND, &[0x20]), PortEffect::None);
        assert_eq!(bus.port_out(I8042_COMMAND, &[]), PortEffect::None);
        assert_eq!(bus.port_out(0x80, &[0xfe]), PortEffect::None);
    }

    #[test]
    fn nothing_reads_as_all_ones() {
        let (bus, _) = bus();
        let mut data = [0u8; 4];
        bus.read(layout::MMIO_BASE, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(0, &mut data);
        bus.port_in(0xcf8, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
