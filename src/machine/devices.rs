//! The machine's virtio devices: put behind its transport, and known by name to its owner.

use std::fmt;
use std::sync::{Arc, Mutex};

use super::board::Board;
use super::error::{MachineError, PlugError};
use super::events::EventQueue;
use super::parts::{OpenDisk, OpenNic};
use crate::backend::Limiter;
use crate::backend::disk::DiskCloser;
use crate::config::{EntropyConfig, Transport};
use crate::devices::{Front, rng};
use crate::memory::Ram;
use crate::platform::bus::shared;
use crate::platform::interrupts::Interrupts;
use crate::platform::layout::{self, MmioPlace};
use crate::platform::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam, PciRoot};
use crate::virtio::mmio::{self, VirtioMmio};
use crate::virtio::pci::VirtioPci;

const NO_OVERLAP: &str = "the platform's places do not overlap";

pub fn has_pci(transport: Transport) -> bool {
    matches!(transport, Transport::Pci | Transport::Mmio { pci: true })
}

/// Where so many devices are, if they are not behind PCI.
pub fn mmio_places(transport: Transport, devices: usize) -> Vec<MmioPlace> {
    match transport {
        Transport::Pci => Vec::new(),
        Transport::Mmio { .. } => layout::virtio_mmio(devices),
    }
}

/// What the owner knows a device by. A disk and a network card may have the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceId {
    Disk(String),
    Nic(String),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(id) => write!(f, "disk '{id}'"),
            Self::Nic(id) => write!(f, "network card '{id}'"),
        }
    }
}

/// How a device stands with the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Present,
    /// The guest has been asked to let go of it, and has not yet. It may never do.
    Leaving,
    /// The guest has let go of it; it is being taken apart.
    Ejected,
}

/// The devices to come, in the order that guests number them.
pub struct Opened {
    pub disks: Vec<OpenDisk>,
    pub nics: Vec<OpenNic>,
    pub entropy: Option<EntropyConfig>,
}

/// A disk or a network card.
struct Device {
    id: DeviceId,
    /// Where it is, on PCI.
    slot: Option<usize>,
    presence: Presence,
    /// Of a disk that keeps something in memory.
    closer: Option<DiskCloser>,
}

/// All disks and network cards, and what more of them need.
pub struct Devices {
    all: Vec<Device>,
    ram: Ram,
    pci: Option<Pci>,
    /// How many there have been, for their names in logs.
    disks: usize,
    nics: usize,
}

struct Pci {
    root: Arc<Mutex<PciRoot>>,
    interrupts: Arc<Interrupts>,
    /// The slot that was filled last. Others get their turn first: a guest that is late with what it has to say about a
    /// device in a slot does not mean the next one.
    last_slot: usize,
}

impl Devices {
    /// Makes all devices and puts them onto the buses; `window_64` is where 64-bit BARs may be.
    pub fn attach(
        opened: Opened,
        transport: Transport,
        ram: &Ram,
        board: &Board,
        interrupts: &Arc<Interrupts>,
        window_64: Option<(u64, u64)>,
    ) -> Result<Self, MachineError> {
        let pci = has_pci(transport).then(|| {
            let root = Arc::new(Mutex::new(PciRoot::new(&board.mmio, window_64)));
            let placed = board.ports.insert(CONFIG_PORTS.into(), CONFIG_PORTS_LEN, shared(ConfigPorts(root.clone())))
                && board.mmio.insert(layout::ECAM, layout::ECAM_SIZE, shared(Ecam(root.clone())));
            assert!(placed, "{NO_OVERLAP}");
            Pci { root, interrupts: interrupts.clone(), last_slot: 0 }
        });
        let mut devices = Self { all: Vec::new(), ram: ram.clone(), pci, disks: 0, nics: 0 };
        let fronts = devices.make_all(opened)?;
        match transport {
            Transport::Pci => {
                for (index, front) in fronts.into_iter().enumerate() {
                    let slot = devices.put_behind_pci(front)?;
                    if let Some(device) = devices.all.get_mut(index) {
                        device.slot = Some(slot);
                    }
                }
            }
            Transport::Mmio { .. } => {
                for (place, front) in mmio_places(transport, fronts.len()).into_iter().zip(fronts) {
                    let device = interrupts.line(place.gsi).and_then(|line| {
                        VirtioMmio::new(Box::new(front), ram.clone(), interrupts.clone(), place.address, line)
                    });
                    let device = shared(device.map_err(MachineError::host("make an MMIO device"))?);
                    assert!(board.mmio.insert(place.address, mmio::REGISTERS_SIZE, device), "{NO_OVERLAP}");
                }
            }
        }
        Ok(devices)
    }

    /// Those that have a name first, in the order of [`Self::all`].
    fn make_all(&mut self, opened: Opened) -> Result<Vec<Front>, MachineError> {
        let mut fronts = Vec::new();
        for disk in opened.disks {
            fronts.push(self.make_disk(disk)?);
        }
        for nic in opened.nics {
            fronts.push(self.make_nic(nic)?);
        }
        if let Some(EntropyConfig { limits }) = opened.entropy {
            let device = rng::device("rng0".into(), Arc::new(Limiter::new(limits)));
            fronts.push(device.map_err(MachineError::host("make the entropy device"))?);
        }
        Ok(fronts)
    }

    fn make_disk(&mut self, disk: OpenDisk) -> Result<Front, MachineError> {
        let id = self.vacant(DeviceId::Disk(disk.id().to_owned()))?;
        let closer = disk.disk().closer();
        let front = disk.into_device(format!("block{}", self.disks))?;
        self.disks += 1;
        self.all.push(Device { id, slot: None, presence: Presence::Present, closer });
        Ok(front)
    }

    fn make_nic(&mut self, nic: OpenNic) -> Result<Front, MachineError> {
        let id = self.vacant(DeviceId::Nic(nic.id().to_owned()))?;
        let front = nic.into_device(format!("net{}", self.nics))?;
        self.nics += 1;
        self.all.push(Device { id, slot: None, presence: Presence::Present, closer: None });
        Ok(front)
    }

    /// The name, if it is nobody's.
    fn vacant(&self, id: DeviceId) -> Result<DeviceId, PlugError> {
        match self.all.iter().find(|device| device.id == id) {
            None => Ok(id),
            Some(Device { presence: Presence::Present, .. }) => Err(PlugError::IdInUse(id)),
            Some(_) => Err(PlugError::Leaving(id)),
        }
    }

    /// Puts a device into a free slot.
    fn put_behind_pci(&mut self, front: Front) -> Result<usize, MachineError> {
        let pci = self.pci.as_mut().ok_or(PlugError::NoPci)?;
        let slot = PciRoot::free_slot(&pci.root, pci.last_slot).ok_or(PlugError::NoSlot)?;
        let bar = PciRoot::initial_bar(slot);
        let function = VirtioPci::new(Box::new(front), self.ram.clone(), pci.interrupts.clone(), bar);
        PciRoot::insert(&pci.root, slot, function.map_err(MachineError::host("make a PCI function"))?);
        pci.last_slot = slot;
        Ok(slot)
    }

    /// Is there a place for one more?
    fn check_room(&self) -> Result<(), PlugError> {
        let pci = self.pci.as_ref().ok_or(PlugError::NoPci)?;
        PciRoot::free_slot(&pci.root, pci.last_slot).map(drop).ok_or(PlugError::NoSlot)
    }

    /// Puts a disk into a free slot of a machine that has been built; returns which.
    pub fn plug_disk(&mut self, disk: OpenDisk) -> Result<usize, MachineError> {
        self.plug(|devices| devices.make_disk(disk))
    }

    /// The same for a network card.
    pub fn plug_nic(&mut self, nic: OpenNic) -> Result<usize, MachineError> {
        self.plug(|devices| devices.make_nic(nic))
    }

    fn plug(&mut self, make: impl FnOnce(&mut Self) -> Result<Front, MachineError>) -> Result<usize, MachineError> {
        self.check_room()?;
        let before = self.all.len();
        let front = make(self)?;
        let slot = self.put_behind_pci(front).inspect_err(|_| self.all.truncate(before));
        if let (Ok(slot), Some(device)) = (&slot, self.all.last_mut()) {
            device.slot = Some(*slot);
        }
        slot
    }

    /// Notes that the guest is asked to let go of a device. Returns the slot to ask for; none if it has let go already.
    pub fn expect_to_leave(&mut self, id: &DeviceId) -> Result<Option<usize>, PlugError> {
        let device = self.all.iter_mut().find(|device| device.id == *id);
        let device = device.ok_or_else(|| PlugError::Unknown(id.clone()))?;
        let slot = device.slot.ok_or(PlugError::NoPci)?;
        if device.presence == Presence::Ejected {
            return Ok(None);
        }
        device.presence = Presence::Leaving;
        Ok(Some(slot))
    }

    /// The guest has let go of what is in `slot`: takes it apart if it was asked to. [`EventQueue::dismantled`] tells
    /// when that is done. `false` if the guest was not asked.
    pub fn eject(&mut self, slot: usize, events: &Arc<EventQueue>) -> bool {
        let leaving = |device: &&mut Device| device.slot == Some(slot) && device.presence == Presence::Leaving;
        let (Some(device), Some(pci)) = (self.all.iter_mut().find(leaving), &self.pci) else { return false };
        device.presence = Presence::Ejected;
        let (function, closer) = (PciRoot::remove(&pci.root, slot), device.closer.clone());
        let told = events.clone();
        let dismantle = move || {
            drop(function);
            if let Some(closer) = closer {
                closer.close();
            }
            told.dismantled(slot);
        };
        // On a thread of its own: a request may hang with its host, and the owner is not to wait for it.
        let thread = std::thread::Builder::new().name("unplug".into()).stack_size(DISMANTLING_STACK);
        if let Err(error) = thread.spawn(dismantle) {
            // The function has gone with the closure.
            tracing::warn!("no thread to take {} apart: {error}", device.id);
            events.dismantled(slot);
        }
        true
    }

    /// Forgets a device that has been taken apart.
    pub fn forget(&mut self, slot: usize) -> Option<DeviceId> {
        let gone = |device: &Device| device.slot == Some(slot) && device.presence == Presence::Ejected;
        let at = self.all.iter().position(gone)?;
        Some(self.all.remove(at).id)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&DeviceId, Presence)> {
        self.all.iter().map(|device| (&device.id, device.presence))
    }

    /// Brings all disks to rest.
    pub fn close_disks(&self) {
        self.all.iter().filter_map(|device| device.closer.as_ref()).for_each(DiskCloser::close);
    }
}

const DISMANTLING_STACK: usize = 128 << 10;
