//! Devices that are plugged into spare slots of the machine while the guest runs: the virtio-mmio
//! driver is told of them, and lets go of them, through its files in sysfs.

use crate::error::{Context, Failure, Kind};
use bulkhead_proto::agent::Slot;
use bulkhead_proto::guest::DISKS;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The platform bus, with its devices and the driver of virtio-mmio's.
const BUS: &str = "/sys/bus/platform";

/// Length of a window, as the driver is told.
const WINDOW: &str = "4K";

/// Where a guest has what this is about; elsewhere in tests.
#[derive(Debug)]
pub struct Slots {
    bus: PathBuf,
    /// Folder of links from serial numbers to nodes.
    disks: PathBuf,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            bus: BUS.into(),
            disks: DISKS.into(),
        }
    }
}

/// What a slot's device is to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// A disk of this name, and its serial number if it has one.
    Disk(String, Option<String>),
    /// A network interface of this name.
    Interface(String),
}

impl Device {
    /// As in sysfs.
    pub fn name(&self) -> &str {
        match self {
            Self::Disk(name, _) | Self::Interface(name) => name,
        }
    }

    /// Major and minor number of a disk's node; 0 for what has none.
    pub fn number(&self) -> Result<(u32, u32), Failure> {
        let Self::Disk(name, _) = self else {
            return Ok((0, 0));
        };
        let found = rustix::fs::stat(node(name)).context(|| format!("look at the disk {name}"))?;
        let number = found.st_rdev;
        Ok((rustix::fs::major(number), rustix::fs::minor(number)))
    }
}

impl Slots {
    /// Takes a device into use. When that fails, the slot is as it was.
    pub fn attach(&self, slot: &Slot) -> Result<Device, Failure> {
        let number = slot.number;
        let device = self.device(number);
        if device.join("driver").exists() {
            let message = format!("slot {number}: its device is in use already");
            return Err(Failure::new(Kind::AlreadyExists, message));
        }
        let told = if device.exists() {
            // The guest has had a device in this slot before.
            self.tell("bind", &kernel_name(number))
        } else {
            let place = format!("{WINDOW}@{:#x}:{}:{number}", slot.address, slot.irq);
            self.tell("new_device", &place)
        };
        let attached = told
            .map_err(|error| error.to_string())
            .and_then(|()| found(&device))
            .and_then(|found| match &found {
                Device::Disk(name, Some(serial)) => self.link(serial, name).map(|()| found),
                _ => Ok(found),
            });
        attached.map_err(|why| {
            // There may be a driver, or none.
            let _ = self.tell("unbind", &kernel_name(number));
            let place = format!("slot {number} at {:#x}, line {}", slot.address, slot.irq);
            Failure::new(
                Kind::FailedPrecondition,
                format!("{place}: no driver took the device into use: {why}"),
            )
        })
    }

    /// Lets go of a device.
    pub fn detach(&self, slot: &Slot) -> Result<(), Failure> {
        let number = slot.number;
        let device = self.device(number);
        if !device.join("driver").exists() {
            let message = format!("slot {number}: no device of it is in use");
            return Err(Failure::new(Kind::NotFound, message));
        }
        self.unlink(&device);
        self.tell("unbind", &kernel_name(number))
            .context(|| format!("let go of the device in slot {number}"))
    }

    fn device(&self, number: u32) -> PathBuf {
        self.bus.join("devices").join(kernel_name(number))
    }

    fn tell(&self, file: &str, text: &str) -> io::Result<()> {
        fs::write(self.bus.join("drivers/virtio-mmio").join(file), text)
    }

    fn link(&self, serial: &str, name: &str) -> Result<(), String> {
        let link = self.disks.join(serial);
        fs::create_dir_all(&self.disks)
            .and_then(|()| std::os::unix::fs::symlink(node(name), &link))
            .map_err(|error| match error.kind() {
                ErrorKind::AlreadyExists => {
                    format!("another disk has the serial number {serial:?}")
                }
                _ => format!("link {}: {error}", link.display()),
            })
    }

    /// Removes the link to a disk, without asking the disk for its serial number: it may be dead.
    fn unlink(&self, device: &Path) {
        let Some(name) = disk_of(device) else {
            return;
        };
        let links = fs::read_dir(&self.disks).into_iter().flatten().flatten();
        for link in links.map(|entry| entry.path()) {
            if fs::read_link(&link).is_ok_and(|target| target == node(&name)) {
                let _ = fs::remove_file(&link);
            }
        }
    }
}

fn kernel_name(number: u32) -> String {
    format!("virtio-mmio.{number}")
}

fn node(disk: &str) -> PathBuf {
    Path::new("/dev").join(disk)
}

/// What is below the platform device, once its drivers have it: `virtioN/block/NAME` or
/// `virtioN/net/NAME`.
fn found(device: &Path) -> Result<Device, String> {
    let virtio = first(device, "virtio").ok_or("its window is empty")?;
    let path = device.join(&virtio);
    if let Some(name) = first(&path.join("block"), "") {
        let serial = fs::read_to_string(path.join("block").join(&name).join("serial"));
        let serial = serial.ok().filter(|serial| is_file_name(serial));
        return Ok(Device::Disk(name, serial));
    }
    first(&path.join("net"), "")
        .map(Device::Interface)
        .ok_or_else(|| format!("{virtio} is neither a disk nor a network interface"))
}

fn disk_of(device: &Path) -> Option<String> {
    let virtio = first(device, "virtio")?;
    first(&device.join(virtio).join("block"), "")
}

/// The first entry of a folder whose name begins with `prefix`.
fn first(folder: &Path, prefix: &str) -> Option<String> {
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| name.starts_with(prefix))
}

fn is_file_name(serial: &str) -> bool {
    !matches!(serial, "" | "." | "..") && serial.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Folders as the kernel has them; what is written to its files stays there.
    struct Tree {
        folder: tempfile::TempDir,
        slots: Slots,
    }

    impl Tree {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let slots = Slots {
                bus: folder.path().join("bus"),
                disks: folder.path().join("disks"),
            };
            fs::create_dir_all(slots.bus.join("drivers/virtio-mmio")).unwrap();
            Self { folder, slots }
        }

        fn device(&self, number: u32, entry: &str) -> PathBuf {
            let path = self.slots.device(number);
            fs::create_dir_all(path.join(entry)).unwrap();
            path
        }

        fn told(&self, file: &str) -> String {
            fs::read_to_string(self.slots.bus.join("drivers/virtio-mmio").join(file)).unwrap()
        }
    }

    fn slot(number: u32) -> Slot {
        Slot {
            address: 0xd002_0000,
            irq: 16,
            number,
            ..Default::default()
        }
    }

    #[test]
    fn a_new_slot_is_registered_and_a_known_one_bound() {
        let tree = Tree::new();
        // Nobody is there to find the device.
        let error = tree.slots.attach(&slot(32)).unwrap_err();
        assert_eq!(error.kind, Kind::FailedPrecondition);
        assert!(error.message.contains("its window is empty"), "{error}");
        assert_eq!(tree.told("new_device"), "4K@0xd0020000:16:32");
        assert_eq!(tree.told("unbind"), "virtio-mmio.32");

        let path = tree.device(33, "virtio5/block/vdb");
        fs::write(path.join("virtio5/block/vdb/serial"), "layer-1").unwrap();
        let disk = tree.slots.attach(&slot(33)).unwrap();
        assert_eq!(disk, Device::Disk("vdb".into(), Some("layer-1".into())));
        assert_eq!(tree.told("bind"), "virtio-mmio.33");
        let link = tree.folder.path().join("disks/layer-1");
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/dev/vdb"));

        // The kernel would have made this link.
        fs::write(path.join("driver"), "").unwrap();
        assert_eq!(
            tree.slots.attach(&slot(33)).unwrap_err().kind,
            Kind::AlreadyExists
        );
        tree.slots.detach(&slot(33)).unwrap();
        assert_eq!(tree.told("unbind"), "virtio-mmio.33");
        assert!(fs::read_link(&link).is_err());
        assert_eq!(
            tree.slots.detach(&slot(34)).unwrap_err().kind,
            Kind::NotFound
        );
    }

    #[test]
    fn a_serial_number_is_one_disk_s_and_a_file_s_name() {
        let tree = Tree::new();
        for (number, name, serial) in [(32, "vda", "x"), (33, "vdb", "x"), (34, "vdc", "../y")] {
            let entry = format!("virtio{number}/block/{name}");
            let path = tree.device(number, &entry);
            fs::write(path.join(entry).join("serial"), serial).unwrap();
        }
        assert!(tree.slots.attach(&slot(32)).is_ok());
        let error = tree.slots.attach(&slot(33)).unwrap_err();
        assert!(error.message.contains("another disk"), "{error}");
        assert_eq!(tree.told("unbind"), "virtio-mmio.33");
        assert_eq!(
            tree.slots.attach(&slot(34)).unwrap(),
            Device::Disk("vdc".into(), None)
        );
    }

    #[test]
    fn an_interface_is_found_and_anything_else_let_go_of() {
        let tree = Tree::new();
        tree.device(32, "virtio1/net/eth0");
        let found = tree.slots.attach(&slot(32)).unwrap();
        assert_eq!(found.name(), "eth0");
        tree.device(33, "virtio2");
        let error = tree.slots.attach(&slot(33)).unwrap_err();
        assert!(error.message.contains("virtio2 is neither"), "{error}");
    }
}
