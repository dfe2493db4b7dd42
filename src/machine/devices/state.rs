//! All devices as data, and the way back.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Device, DeviceId, Devices, Made, Opened, Place, Presence, Seat, has_pci};
use crate::config::{MAX_DEVICES, MacAddress, Transport};
use crate::devices::net;
use crate::machine::MachineError;
use crate::machine::board::Board;
use crate::memory::Ram;
use crate::platform::interrupts::Interrupts;
use crate::platform::layout::{self, MmioPlace};
use crate::platform::pci::{PciRoot, PciRootStateV1};
use crate::virtio::StateError;
use crate::virtio::state::{MmioStateV1, OwnStateV1, PciStateV1};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesStateV1 {
    pub devices: Vec<DeviceStateV1>,
    /// Of a VM with a PCI bus.
    pub pci: Option<PciBusStateV1>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciBusStateV1 {
    pub root: PciRootStateV1,
    /// The one that was filled last.
    pub last_slot: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStateV1 {
    pub id: DeviceId,
    /// The guest has been asked to let go of it.
    pub leaving: bool,
    pub place: PlaceStateV1,
}

/// Where a device is, and what it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum PlaceStateV1 {
    Pci { slot: u8, function: PciStateV1 },
    Mmio { address: u64, gsi: u32, device: MmioStateV1 },
}

impl PlaceStateV1 {
    fn own(&self) -> &OwnStateV1 {
        match self {
            Self::Pci { function, .. } => &function.core.own,
            Self::Mmio { device, .. } => &device.core.own,
        }
    }
}

/// Why saved devices do not become those of a machine.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RestoreError {
    #[error("{0} is there, and no saved state of it")]
    NotSaved(DeviceId),
    #[error("{0} is missing, of which there is a saved state")]
    Missing(DeviceId),
    #[error("there are two saved states of {0}")]
    Twice(DeviceId),
    #[error("there are {0} saved devices, and no VM has more than {MAX_DEVICES}")]
    TooMany(usize),
    #[error("the saved devices have {}, and the VM has {}", bus(*saved), bus(!*saved))]
    Bus { saved: bool },
    #[error("the PCI bus's saved state does not fit")]
    Pci(#[source] StateError),
    #[error("{id}'s saved state does not fit")]
    Device { id: DeviceId, source: StateError },
}

fn bus(there: bool) -> &'static str {
    if there { "a PCI bus" } else { "no PCI bus" }
}

impl DevicesStateV1 {
    /// Checks what can be seen without the devices.
    fn check(&self, transport: Transport) -> Result<(), RestoreError> {
        if self.devices.len() > MAX_DEVICES {
            return Err(RestoreError::TooMany(self.devices.len()));
        }
        for (at, device) in self.devices.iter().enumerate() {
            if self.devices[..at].iter().any(|other| other.id == device.id) {
                return Err(RestoreError::Twice(device.id.clone()));
            }
        }
        if self.pci.is_some() != has_pci(transport) {
            return Err(RestoreError::Bus { saved: self.pci.is_some() });
        }
        match self.pci {
            Some(PciBusStateV1 { last_slot, .. }) if usize::from(last_slot) > MAX_DEVICES => {
                Err(RestoreError::Pci(StateError::new("last_slot", format!("there is no slot {last_slot}"))))
            }
            _ => Ok(()),
        }
    }

    fn of(&self, id: &DeviceId) -> Result<&DeviceStateV1, RestoreError> {
        self.devices.iter().find(|device| device.id == *id).ok_or_else(|| RestoreError::NotSaved(id.clone()))
    }
}

impl Devices {
    /// As [`Self::attach`], with all devices where they were and as they were, suspended: [`Self::resume`] has them go on.
    /// Devices and states find each other by their names.
    ///
    /// # Errors
    /// The first that does not fit.
    pub fn restore(
        mut opened: Opened,
        saved: &DevicesStateV1,
        transport: Transport,
        ram: &Ram,
        board: &Board,
        interrupts: &Arc<Interrupts>,
        window_64: Option<(u64, u64)>,
    ) -> Result<Self, MachineError> {
        saved.check(transport)?;
        for nic in &mut opened.nics {
            let state = saved.of(&DeviceId::Nic(nic.id().to_owned()))?;
            nic.keep_shape(net::saved_shape(state.place.own()).map_err(|error| state.wrong(error))?);
        }
        let mut devices = Self::none(transport, ram, board, interrupts, window_64);
        let restored = interrupts.at_once(|| {
            devices.make_all(opened, |devices, made| {
                let state = saved.of(&made.id)?;
                devices.put_back(made, state, board, interrupts)
            })
        });
        restored.map_err(MachineError::host("route interrupts"))??;
        if let Some(lost) = saved.devices.iter().find(|state| devices.all.iter().all(|device| device.id != state.id)) {
            return Err(RestoreError::Missing(lost.id.clone()).into());
        }
        if let (Some(pci), Some(state)) = (&mut devices.pci, saved.pci) {
            PciRoot::restore(&pci.root, state.root);
            pci.last_slot = state.last_slot.into();
        }
        devices.at_rest = true;
        Ok(devices)
    }

    fn put_back(
        &mut self,
        made: Made,
        state: &DeviceStateV1,
        board: &Board,
        interrupts: &Arc<Interrupts>,
    ) -> Result<(), MachineError> {
        let host = || MachineError::host("restore a device");
        match &state.place {
            PlaceStateV1::Pci { slot, function: saved } => {
                let slot = usize::from(*slot);
                let no_bus = || state.wrong(StateError::new("place", "there is no PCI bus"));
                let pci = self.pci.as_ref().ok_or_else(no_bus)?;
                PciRoot::check_slot(&pci.root, slot).map_err(|error| state.wrong(error))?;
                let mut function = Self::behind_pci(pci, &self.ram, made.front, slot)?;
                function.check(saved).map_err(|error| state.wrong(error))?;
                let bar = function.restore(saved).map_err(host())?;
                let place = Place { seat: Seat::Pci(slot), events: function.events() };
                PciRoot::put_back(&pci.root, slot, function, bar).map_err(|error| state.wrong(error))?;
                self.know(made.id, made.drive, place);
            }
            PlaceStateV1::Mmio { address, gsi, device: saved } => {
                let place = self.free_mmio_place(*address, *gsi).map_err(|error| state.wrong(error))?;
                let mut device = self.behind_mmio(made.front, place, interrupts)?;
                device.check(saved).map_err(|error| state.wrong(error))?;
                device.restore(saved).map_err(host())?;
                self.put_at(place, device, made.id, made.drive, board);
            }
        }
        if state.leaving
            && let Some(device) = self.all.last_mut()
        {
            device.presence = Presence::Leaving;
        }
        Ok(())
    }

    fn free_mmio_place(&self, address: u64, gsi: u32) -> Result<MmioPlace, StateError> {
        let places = layout::virtio_mmio(MAX_DEVICES);
        let Some(&place) = places.iter().find(|place| place.address == address) else {
            return Err(StateError::new("address", format!("{address:#x} is no place for a device")));
        };
        if place.gsi != gsi {
            return Err(StateError::new("gsi", format!("{gsi}, and at {address:#x} it is {}", place.gsi)));
        }
        let is_there = |device: &Device| matches!(device.place.seat, Seat::Mmio(place, _) if place.address == address);
        if self.all.iter().any(is_there) {
            return Err(StateError::new("address", format!("{address:#x} is another device's too")));
        }
        Ok(place)
    }
}

impl DeviceStateV1 {
    /// The name of a network card, and its address.
    pub fn mac(&self) -> Option<(&str, MacAddress)> {
        let DeviceId::Nic(name) = &self.id else { return None };
        let shape = net::saved_shape(self.place.own()).ok()?;
        Some((name, MacAddress(shape.mac)))
    }

    fn wrong(&self, source: StateError) -> MachineError {
        RestoreError::Device { id: self.id.clone(), source }.into()
    }
}
