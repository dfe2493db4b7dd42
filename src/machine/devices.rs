//! The machine's virtio devices: put behind its transport, and known by name to its owner.

mod at_rest;
mod state;

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

pub use self::at_rest::DeviceBusy;
pub use self::state::{DevicesStateV1, RestoreError};
use super::board::Board;
use super::drive::Drive;
use super::error::{MachineError, PlugError};
use super::events::EventQueue;
use super::parts::{OpenDisk, OpenNic};
use crate::backend::{Disk, Limiter};
use crate::config::{EntropyConfig, NetConfig, Transport};
use crate::devices::{Front, rng};
use crate::memory::Ram;
use crate::platform::bus::shared;
use crate::platform::interrupts::Interrupts;
use crate::platform::layout::{self, MmioPlace};
use crate::platform::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam, PciRoot};
use crate::threads::{self, Kind};
use crate::virtio::DeviceEvents;
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceId {
    Disk(String),
    Nic(String),
    Entropy,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(id) => write!(f, "disk '{id}'"),
            Self::Nic(id) => write!(f, "network card '{id}'"),
            Self::Entropy => f.write_str("entropy device"),
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

impl Opened {
    fn count(&self) -> usize {
        self.disks.len() + self.nics.len() + usize::from(self.entropy.is_some())
    }
}

struct Device {
    id: DeviceId,
    place: Place,
    presence: Presence,
    /// Of a disk.
    drive: Option<Drive>,
}

/// Where a device is.
struct Place {
    seat: Seat,
    /// What it tells its driver by.
    events: Arc<dyn DeviceEvents>,
}

enum Seat {
    /// In a slot of the PCI bus.
    Pci(usize),
    Mmio(MmioPlace, Arc<Mutex<VirtioMmio>>),
}

impl Place {
    fn slot(&self) -> Option<usize> {
        match self.seat {
            Seat::Pci(slot) => Some(slot),
            Seat::Mmio(..) => None,
        }
    }
}

/// A device without a place, and what it is going to be known by.
struct Made {
    front: Front,
    id: DeviceId,
    drive: Option<Drive>,
}

/// All devices, and what more of them need.
pub struct Devices {
    all: Vec<Device>,
    ram: Ram,
    pci: Option<Pci>,
    /// Of the entropy device.
    entropy: Option<Arc<Limiter>>,
    /// How many there have been, for their names in logs.
    disks: usize,
    nics: usize,
    /// What the cards are on.
    networks: Vec<(DeviceId, NetConfig)>,
    /// Do all of them rest?
    at_rest: bool,
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
        let mut devices = Self::none(transport, ram, board, interrupts, window_64);
        let mut places = mmio_places(transport, opened.count()).into_iter();
        devices.make_all(opened, |devices, made| match places.next() {
            Some(place) => {
                let device = devices.behind_mmio(made.front, place, interrupts)?;
                devices.put_at(place, device, made.id, made.drive, board);
                Ok(())
            }
            None => devices.put_behind_pci(made).map(drop),
        })?;
        Ok(devices)
    }

    /// The buses for them alone.
    fn none(
        transport: Transport,
        ram: &Ram,
        board: &Board,
        interrupts: &Arc<Interrupts>,
        window_64: Option<(u64, u64)>,
    ) -> Self {
        let pci = has_pci(transport).then(|| {
            let root = Arc::new(Mutex::new(PciRoot::new(&board.mmio, window_64)));
            let placed = board.ports.insert(CONFIG_PORTS.into(), CONFIG_PORTS_LEN, shared(ConfigPorts(root.clone())))
                && board.mmio.insert(layout::ECAM, layout::ECAM_SIZE, shared(Ecam(root.clone())));
            assert!(placed, "{NO_OVERLAP}");
            Pci { root, interrupts: interrupts.clone(), last_slot: 0 }
        });
        Self {
            all: Vec::new(),
            ram: ram.clone(),
            pci,
            entropy: None,
            disks: 0,
            nics: 0,
            networks: Vec::new(),
            at_rest: false,
        }
    }

    /// Makes all devices, in the order that guests number them, and has them put into their places.
    fn make_all(
        &mut self,
        opened: Opened,
        mut put: impl FnMut(&mut Self, Made) -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        for disk in opened.disks {
            let made = self.make_disk(disk)?;
            put(self, made)?;
        }
        for nic in opened.nics {
            let made = self.make_nic(nic)?;
            put(self, made)?;
        }
        if let Some(EntropyConfig { limits }) = opened.entropy {
            let limiter = Arc::new(Limiter::new(limits));
            self.entropy = Some(limiter.clone());
            let front = rng::device("rng0".into(), limiter);
            let front = front.map_err(MachineError::host("make the entropy device"))?;
            put(self, Made { front, id: DeviceId::Entropy, drive: None })?;
        }
        Ok(())
    }

    fn behind_mmio(
        &self,
        front: Front,
        place: MmioPlace,
        interrupts: &Arc<Interrupts>,
    ) -> Result<VirtioMmio, MachineError> {
        let device = interrupts.line(place.gsi).and_then(|line| {
            VirtioMmio::new(Box::new(front), self.ram.clone(), interrupts.clone(), place.address, line)
        });
        device.map_err(MachineError::host("make an MMIO device"))
    }

    fn put_at(&mut self, place: MmioPlace, device: VirtioMmio, id: DeviceId, drive: Option<Drive>, board: &Board) {
        let (events, device) = (device.events(), shared(device));
        assert!(board.mmio.insert(place.address, mmio::REGISTERS_SIZE, device.clone()), "{NO_OVERLAP}");
        self.know(id, drive, Place { seat: Seat::Mmio(place, device), events });
    }

    fn behind_pci(pci: &Pci, ram: &Ram, front: Front, slot: usize) -> Result<VirtioPci, MachineError> {
        let bar = PciRoot::initial_bar(slot);
        let function = VirtioPci::new(Box::new(front), ram.clone(), pci.interrupts.clone(), bar);
        function.map_err(MachineError::host("make a PCI function"))
    }

    fn know(&mut self, id: DeviceId, drive: Option<Drive>, place: Place) {
        self.all.push(Device { id, place, presence: Presence::Present, drive });
    }

    fn make_disk(&mut self, disk: OpenDisk) -> Result<Made, MachineError> {
        let id = self.vacant(DeviceId::Disk(disk.id().to_owned()))?;
        let (front, drive) = disk.into_device(format!("block{}", self.disks))?;
        self.disks += 1;
        Ok(Made { front, id, drive: Some(drive) })
    }

    fn make_nic(&mut self, nic: OpenNic) -> Result<Made, MachineError> {
        let id = self.vacant(DeviceId::Nic(nic.id().to_owned()))?;
        let network = nic.config().clone();
        let front = nic.into_device(format!("net{}", self.nics))?;
        self.nics += 1;
        self.networks.push((id.clone(), network));
        Ok(Made { front, id, drive: None })
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
    fn put_behind_pci(&mut self, made: Made) -> Result<usize, MachineError> {
        let pci = self.pci.as_mut().ok_or(PlugError::NoPci)?;
        let slot = PciRoot::free_slot(&pci.root, pci.last_slot).ok_or(PlugError::NoSlot)?;
        let function = Self::behind_pci(pci, &self.ram, made.front, slot)?;
        let place = Place { seat: Seat::Pci(slot), events: function.events() };
        PciRoot::insert(&pci.root, slot, function);
        pci.last_slot = slot;
        self.know(made.id, made.drive, place);
        Ok(slot)
    }

    /// Is there a place for one more?
    fn check_room(&self) -> Result<(), PlugError> {
        let pci = self.pci.as_ref().ok_or(PlugError::NoPci)?;
        PciRoot::free_slot(&pci.root, pci.last_slot).map(drop).ok_or(PlugError::NoSlot)
    }

    /// Puts a disk into a free slot of a machine that has been built; returns which.
    pub fn plug_disk(&mut self, disk: OpenDisk) -> Result<usize, MachineError> {
        self.check_room()?;
        let made = self.make_disk(disk)?;
        self.put_behind_pci(made)
    }

    /// The same for a network card.
    pub fn plug_nic(&mut self, nic: OpenNic) -> Result<usize, MachineError> {
        self.check_room()?;
        let made = self.make_nic(nic)?;
        self.put_behind_pci(made)
    }

    /// The drive of a disk that is not about to go.
    pub fn drive(&mut self, id: &str) -> Result<(&mut Drive, &Arc<dyn DeviceEvents>), PlugError> {
        let id = DeviceId::Disk(id.to_owned());
        let Device { presence, drive, place, .. } = self.find(&id)?;
        match drive {
            Some(drive) if *presence == Presence::Present => Ok((drive, &place.events)),
            _ => Err(PlugError::Leaving(id)),
        }
    }

    /// All disks, by their ids.
    pub fn disks(&self) -> impl Iterator<Item = (&str, &Disk)> {
        self.all.iter().filter_map(|device| match (&device.id, &device.drive) {
            (DeviceId::Disk(id), Some(drive)) => Some((id.as_str(), &*drive.disk)),
            _ => None,
        })
    }

    /// A disk, also one that the guest is to let go of.
    #[must_use]
    pub fn disk(&self, id: &str) -> Option<&Disk> {
        let is_it = |device: &&Device| matches!(&device.id, DeviceId::Disk(name) if name == id);
        self.all.iter().find(is_it)?.drive.as_ref().map(|drive| &*drive.disk)
    }

    /// Disks that have got another file, of which nobody has heard yet.
    pub fn take_replaced(&mut self) -> impl Iterator<Item = &DeviceId> {
        self.all.iter_mut().filter_map(|Device { id, drive, .. }| drive.as_mut()?.has_been_replaced().then_some(&*id))
    }

    fn find(&mut self, id: &DeviceId) -> Result<&mut Device, PlugError> {
        let device = self.all.iter_mut().find(|device| device.id == *id);
        device.ok_or_else(|| PlugError::Unknown(id.clone()))
    }

    /// Notes that the guest is asked to let go of a device. Returns the slot to ask for; none if it has let go already.
    pub fn expect_to_leave(&mut self, id: &DeviceId) -> Result<Option<usize>, PlugError> {
        let device = self.find(id)?;
        let slot = device.place.slot().ok_or(PlugError::NoPci)?;
        if device.presence == Presence::Ejected {
            return Ok(None);
        }
        device.presence = Presence::Leaving;
        Ok(Some(slot))
    }

    /// The guest has let go of what is in `slot`: takes it apart if it was asked to. [`EventQueue::dismantled`] tells
    /// when that is done. `false` if the guest was not asked.
    pub fn eject(&mut self, slot: usize, events: &Arc<EventQueue>) -> bool {
        let leaving = |device: &&mut Device| device.place.slot() == Some(slot) && device.presence == Presence::Leaving;
        let (Some(device), Some(pci)) = (self.all.iter_mut().find(leaving), &self.pci) else { return false };
        device.presence = Presence::Ejected;
        let (function, closer) = (PciRoot::remove(&pci.root, slot), device.drive.as_ref().and_then(Drive::closer));
        let told = events.clone();
        let dismantle = move || {
            drop(function);
            if let Some(closer) = closer {
                closer.close();
            }
            told.dismantled(slot);
        };
        // On a thread of its own: a request may hang with its host, and the owner is not to wait for it.
        if let Err(error) = threads::spawn(Kind::Main, "unplug", Some(DISMANTLING_STACK), dismantle) {
            // The function has gone with the closure.
            tracing::warn!("no thread to take {} apart: {error}", device.id);
            events.dismantled(slot);
        }
        true
    }

    /// Forgets a device that has been taken apart.
    pub fn forget(&mut self, slot: usize) -> Option<DeviceId> {
        let gone = |device: &Device| device.place.slot() == Some(slot) && device.presence == Presence::Ejected;
        let at = self.all.iter().position(gone)?;
        let id = self.all.remove(at).id;
        self.networks.retain(|network| network.0 != id);
        Some(id)
    }

    /// Those that come and go: disks and network cards.
    pub fn iter(&self) -> impl Iterator<Item = (&DeviceId, Presence)> {
        let all = self.all.iter().map(|device| (&device.id, device.presence));
        all.filter(|(id, _)| !matches!(id, DeviceId::Entropy))
    }

    /// All devices, and what knows of their drivers.
    pub fn drivers(&self) -> impl Iterator<Item = (&DeviceId, &Arc<dyn DeviceEvents>)> {
        self.all.iter().map(|device| (&device.id, &device.place.events))
    }

    /// Of the entropy device, if there is one.
    pub fn entropy_limiter(&self) -> Option<&Arc<Limiter>> {
        self.entropy.as_ref()
    }

    /// Brings all disks to rest.
    pub fn close_disks(&self) {
        let drives = self.all.iter().filter_map(|device| device.drive.as_ref());
        drives.filter_map(Drive::closer).for_each(|closer| closer.close());
    }
}

const DISMANTLING_STACK: usize = 128 << 10;

#[cfg(test)]
mod tests;
