//! Bulkhead's monitor, by its contract.

use super::{DATA_SERIAL, Devices, MAC, MEMORY_MIB, Monitor, Room, ended};
use bulkhead_bench_guest::SERIAL;
use bulkhead_proto::vmm::{Event, RateLimit, Request, Response};
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::tap;
use bulkhead_tests::vm::{Disk, PreparedVm, Vm, VmSpec};
use std::path::Path;
use std::time::Duration;

/// The driver's file that takes descriptions of devices (patch 0042 of the guest kernel).
const NEW_DEVICE: &str = "/sys/bus/platform/drivers/virtio-mmio/new_device";

/// A monitor, before and after it was let go.
pub struct Vmm {
    prepared: Option<PreparedVm>,
    vm: Option<Vm>,
    pid: u32,
    devices: Devices,
    limit: Duration,
}

impl Vmm {
    /// Starts its process, which waits.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn prepare(room: &Room, devices: &Devices, control: &Path) -> Result<Self> {
        let disk = |serial: &str, path: &Path| Disk {
            serial: serial.into(),
            path: path.to_owned(),
        };
        let mut disks = vec![disk(SERIAL, control)];
        disks.extend(devices.data.as_deref().map(|path| disk(DATA_SERIAL, path)));
        let spec = VmSpec {
            vcpus: room.vcpus,
            memory_mib: MEMORY_MIB,
            rootfs: Some(room.artifacts.bench_rootfs()),
            disks,
            ..VmSpec::default()
        };
        let prepared = spec.prepare(&room.artifacts)?;
        Ok(Self {
            pid: prepared.pid(),
            prepared: Some(prepared),
            vm: None,
            devices: devices.clone(),
            limit: room.limit,
        })
    }

    fn vm(&self) -> Result<&Vm> {
        self.vm
            .as_ref()
            .ok_or_else(|| Error::Unexpected("the VMM has not begun".into()))
    }
}

impl Monitor for Vmm {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn helpers(&self) -> Vec<u32> {
        Vec::new()
    }

    fn begin(&mut self) -> Result<()> {
        let Some(prepared) = self.prepared.take() else {
            return Ok(());
        };
        let vm = prepared.run()?;
        if let Some(file) = &self.devices.shared {
            let to = vm.share().join("data");
            std::fs::copy(file, &to).context(|| format!("write {}", to.display()))?;
        }
        self.vm = Some(vm);
        Ok(())
    }

    fn announce(&mut self) -> Result<Option<Vec<String>>> {
        let Some(card) = &self.devices.card else {
            return Ok(None);
        };
        let vm = self.vm()?;
        match vm.event(self.limit)? {
            Some(Event::Running { .. }) => {}
            other => {
                let message = format!("the VMM does not run: {other:?}; {}", vm.logs());
                return Err(Error::Unexpected(message));
            }
        }
        let request = Request::PlugNet {
            mac: MAC,
            mtu: 1500,
            any_sender: false,
            vhost: false,
            to_guest: RateLimit::default(),
            from_guest: RateLimit::default(),
        };
        let taps = tap::open(&card.tap, card.pairs.into())?;
        match vm.control_with(&request, &taps)? {
            Response::Plugged { slot } => {
                let place = format!("4K@{:#x}:{}:{}", slot.address, slot.irq, slot.slot);
                Ok(Some(vec!["write".into(), NEW_DEVICE.into(), place]))
            }
            other => Err(Error::Unexpected(format!("plugging a card: {other:?}"))),
        }
    }

    fn check(&mut self) -> Result<()> {
        let Some(vm) = &mut self.vm else {
            return Ok(());
        };
        match vm.wait_end(Duration::ZERO) {
            Ok(status) => Err(ended("the VMM", &status.to_string(), &vm.logs())),
            Err(Error::TimedOut { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
