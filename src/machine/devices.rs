//! The machine's virtio devices, put behind its transport.

use std::sync::{Arc, Mutex};

use super::board::Board;
use super::error::MachineError;
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

/// The devices to come, in the order that guests number them.
pub struct Opened {
    pub disks: Vec<OpenDisk>,
    pub nics: Vec<OpenNic>,
    pub entropy: Option<EntropyConfig>,
}

impl Opened {
    fn into_devices(self, closers: &mut Vec<DiskCloser>) -> Result<Vec<Front>, MachineError> {
        let mut devices = Vec::new();
        for (index, disk) in self.disks.into_iter().enumerate() {
            closers.extend(disk.disk().closer());
            devices.push(disk.into_device(format!("block{index}"))?);
        }
        for (index, nic) in self.nics.into_iter().enumerate() {
            devices.push(nic.into_device(format!("net{index}"))?);
        }
        if let Some(EntropyConfig { limits }) = self.entropy {
            let device = rng::device("rng0".into(), Arc::new(Limiter::new(limits)));
            devices.push(device.map_err(MachineError::host("make the entropy device"))?);
        }
        Ok(devices)
    }
}

/// Makes all devices and puts them onto the buses; `window_64` is where 64-bit BARs may be. Returns what has to be
/// closed when the VM has ended.
pub fn attach(
    opened: Opened,
    transport: Transport,
    ram: &Ram,
    board: &Board,
    interrupts: &Arc<Interrupts>,
    window_64: Option<(u64, u64)>,
) -> Result<Vec<DiskCloser>, MachineError> {
    let mut closers = Vec::new();
    let devices = opened.into_devices(&mut closers)?;
    let mut root = PciRoot::new(&board.mmio, window_64);
    match transport {
        Transport::Pci => {
            for (slot, device) in (1..).zip(devices) {
                let bar = PciRoot::initial_bar(slot);
                let function = VirtioPci::new(Box::new(device), ram.clone(), interrupts.clone(), bar);
                root.insert(slot, function.map_err(MachineError::host("make a PCI function"))?);
            }
        }
        Transport::Mmio { .. } => {
            for (place, device) in mmio_places(transport, devices.len()).into_iter().zip(devices) {
                let device = interrupts.line(place.gsi).and_then(|line| {
                    VirtioMmio::new(Box::new(device), ram.clone(), interrupts.clone(), place.address, line)
                });
                let device = shared(device.map_err(MachineError::host("make an MMIO device"))?);
                assert!(board.mmio.insert(place.address, mmio::REGISTERS_SIZE, device), "{NO_OVERLAP}");
            }
        }
    }
    if has_pci(transport) {
        let root = Arc::new(Mutex::new(root));
        let placed = board.ports.insert(CONFIG_PORTS.into(), CONFIG_PORTS_LEN, shared(ConfigPorts(root.clone())))
            && board.mmio.insert(layout::ECAM, layout::ECAM_SIZE, shared(Ecam(root)));
        assert!(placed, "{NO_OVERLAP}");
    }
    Ok(closers)
}
