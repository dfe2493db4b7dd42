//! All devices come to rest at once, and go on.

use std::io;
use std::sync::PoisonError;
use std::time::Instant;

use thiserror::Error;

use super::state::{DeviceStateV1, DevicesStateV1, PciBusStateV1, PlaceStateV1};
use super::{Device, DeviceId, Devices, Presence, Seat};
use crate::config::{EntropyConfig, SavedDisk, SavedNic};
use crate::platform::pci::PciRoot;
use crate::virtio::StillBusy;

/// Why the devices do not come to rest.
#[derive(Debug, Error)]
pub enum DeviceBusy {
    #[error("{0} is still busy with a request of the guest")]
    Request(DeviceId),
    #[error("{0} is still on its way to another file")]
    Exchange(DeviceId),
    #[error("{0}, which the guest has let go of, is still being taken apart")]
    Ejection(DeviceId),
    #[error("{id} cannot be flushed")]
    Flush { id: DeviceId, source: io::Error },
}

impl Devices {
    /// Brings all queues of all devices to rest, with nothing in hand, and what was written to disks to stable storage.
    /// Nobody here writes to guest memory or disks any more, until [`Self::resume`]. No vCPU may run meanwhile.
    ///
    /// It waits until `deadline` for requests in hand, for a reset that the driver has begun, and for a disk on its way to
    /// another file. What rests because of its limits is not in hand, and stays in the guest's ring.
    ///
    /// # Errors
    /// When something takes longer, a device is being taken apart, or a disk cannot be flushed. All goes on then.
    pub fn suspend(&mut self, deadline: Instant) -> Result<(), DeviceBusy> {
        self.try_suspend(deadline).inspect_err(|_| self.resume())?;
        self.at_rest = true;
        Ok(())
    }

    fn try_suspend(&mut self, deadline: Instant) -> Result<(), DeviceBusy> {
        for device in &self.all {
            let change = device.drive.as_ref().and_then(|drive| drive.change.as_ref());
            let patience = deadline.saturating_duration_since(Instant::now());
            if change.is_some_and(|change| !change.is_done_within(patience)) {
                return Err(DeviceBusy::Exchange(device.id.clone()));
            }
            if device.presence == Presence::Ejected {
                return Err(DeviceBusy::Ejection(device.id.clone()));
            }
        }
        // All are asked before any is waited for.
        for device in &self.all {
            let _ = self.suspend_one(device, Instant::now());
        }
        for device in &self.all {
            self.suspend_one(device, deadline).map_err(|StillBusy| DeviceBusy::Request(device.id.clone()))?;
        }
        for device in &self.all {
            if let Some(drive) = device.drive.as_ref().filter(|drive| !drive.disk.read_only()) {
                drive.disk.flush().map_err(|source| DeviceBusy::Flush { id: device.id.clone(), source })?;
            }
        }
        Ok(())
    }

    fn suspend_one(&self, device: &Device, deadline: Instant) -> Result<(), StillBusy> {
        match &device.place.seat {
            Seat::Pci(slot) => self.function(*slot, |function| function.suspend(deadline)).unwrap_or(Ok(())),
            Seat::Mmio(_, device) => device.lock().unwrap_or_else(PoisonError::into_inner).suspend(deadline),
        }
    }

    fn function<T>(&self, slot: usize, what: impl FnOnce(&mut crate::virtio::pci::VirtioPci) -> T) -> Option<T> {
        PciRoot::with(&self.pci.as_ref()?.root, slot, what)
    }

    /// Has all devices go on after [`Self::suspend`], or for the first time after [`Self::restore`]: then the interrupt
    /// controllers have to be restored before, as drivers are told at once what they may have missed.
    pub fn resume(&mut self) {
        self.at_rest = false;
        for device in &self.all {
            match &device.place.seat {
                Seat::Pci(slot) => {
                    self.function(*slot, |function| function.resume());
                }
                Seat::Mmio(_, device) => device.lock().unwrap_or_else(PoisonError::into_inner).resume(),
            }
        }
    }

    /// Is all suspended, since a [`Self::suspend`] or because it was restored?
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.at_rest
    }

    /// What they are made of: disks, network cards, the entropy device.
    #[must_use]
    pub fn describe(&self) -> (Vec<SavedDisk>, Vec<SavedNic>, Option<EntropyConfig>) {
        let mut disks = Vec::new();
        let mut nics = Vec::new();
        for device in &self.all {
            match (&device.id, &device.drive) {
                (DeviceId::Disk(name), Some(drive)) => {
                    disks.push(SavedDisk { name: name.clone(), stored: false, config: drive.config.clone() });
                }
                (DeviceId::Nic(name), _) => {
                    let network = self.networks.iter().find(|network| network.0 == device.id);
                    nics.extend(network.map(|(_, config)| SavedNic { name: name.clone(), config: config.clone() }));
                }
                _ => {}
            }
        }
        let entropy = self.entropy.as_ref().map(|limiter| EntropyConfig { limits: limiter.limits() });
        (disks, nics, entropy)
    }

    /// What there is while all is suspended.
    #[must_use]
    pub fn save(&self) -> DevicesStateV1 {
        let save = |device: &Device| {
            let place = match &device.place.seat {
                Seat::Pci(slot) => {
                    PlaceStateV1::Pci { slot: *slot as u8, function: self.function(*slot, |function| function.save())? }
                }
                Seat::Mmio(place, device) => PlaceStateV1::Mmio {
                    address: place.address,
                    gsi: place.gsi,
                    device: device.lock().unwrap_or_else(PoisonError::into_inner).save(),
                },
            };
            let leaving = device.presence == Presence::Leaving;
            Some(DeviceStateV1 { id: device.id.clone(), leaving, place })
        };
        let pci = self.pci.as_ref();
        let pci = pci.map(|pci| PciBusStateV1 { root: PciRoot::save(&pci.root), last_slot: pci.last_slot as u8 });
        DevicesStateV1 { devices: self.all.iter().filter_map(save).collect(), pci }
    }
}
