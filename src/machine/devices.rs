//! The machine's virtio devices: opened as the configuration says, and put behind its transport.

use std::sync::{Arc, Mutex};

use super::board::Board;
use super::error::MachineError;
use crate::backend::HostFiles;
use crate::backend::disk::{Disk, DiskCloser};
use crate::backend::passt::Passt;
use crate::backend::tap::Tap;
use crate::backend::vhost::VhostNet;
use crate::config::{DiskConfig, MAX_USER_MTU, MacAddress, NetBackend, NetConfig, Transport, VmConfig};
use crate::devices::block::{BlockOptions, Rings};
use crate::devices::net::NetOptions;
use crate::devices::{Front, block, net, rng};
use crate::memory::Ram;
use crate::platform::bus::shared;
use crate::platform::interrupts::Interrupts;
use crate::platform::layout::{self, MmioPlace};
use crate::platform::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam, PciRoot};
use crate::virtio::mmio::{self, VirtioMmio};
use crate::virtio::pci::VirtioPci;

const NO_OVERLAP: &str = "the platform's places do not overlap";

pub fn has_pci(config: &VmConfig) -> bool {
    matches!(config.transport, Transport::Pci | Transport::Mmio { pci: true })
}

/// Where the devices are that are not behind PCI.
pub fn mmio_places(config: &VmConfig) -> Vec<MmioPlace> {
    match config.transport {
        Transport::Pci => Vec::new(),
        Transport::Mmio { .. } => layout::virtio_mmio(config.devices()),
    }
}

/// Opens all devices and puts them onto the buses; `window_64` is where 64-bit BARs may be. Returns what has to be
/// closed when the VM has ended.
pub fn attach(
    config: &VmConfig,
    host: &dyn HostFiles,
    ram: &Ram,
    board: &Board,
    interrupts: &Arc<Interrupts>,
    window_64: Option<(u64, u64)>,
) -> Result<Vec<DiskCloser>, MachineError> {
    let mut closers = Vec::new();
    let devices = open(config, host, &mut closers)?;
    let mut root = PciRoot::new(&board.mmio, window_64);
    match config.transport {
        Transport::Pci => {
            for (slot, device) in (1..).zip(devices) {
                let bar = PciRoot::initial_bar(slot);
                let function = VirtioPci::new(Box::new(device), ram.clone(), interrupts.clone(), bar);
                root.insert(slot, function.map_err(MachineError::host("make a PCI function"))?);
            }
        }
        Transport::Mmio { .. } => {
            for (place, device) in mmio_places(config).into_iter().zip(devices) {
                let device = interrupts.line(place.gsi).and_then(|line| {
                    VirtioMmio::new(Box::new(device), ram.clone(), interrupts.clone(), place.address, line)
                });
                let device = shared(device.map_err(MachineError::host("make an MMIO device"))?);
                assert!(board.mmio.insert(place.address, mmio::REGISTERS_SIZE, device), "{NO_OVERLAP}");
            }
        }
    }
    if has_pci(config) {
        let root = Arc::new(Mutex::new(root));
        let placed = board.ports.insert(CONFIG_PORTS.into(), CONFIG_PORTS_LEN, shared(ConfigPorts(root.clone())))
            && board.mmio.insert(layout::ECAM, layout::ECAM_SIZE, shared(Ecam(root)));
        assert!(placed, "{NO_OVERLAP}");
    }
    Ok(closers)
}

/// In the order that guests number them.
fn open(config: &VmConfig, host: &dyn HostFiles, closers: &mut Vec<DiskCloser>) -> Result<Vec<Front>, MachineError> {
    let mut devices = Vec::with_capacity(config.devices());
    for (index, disk) in config.disks.iter().enumerate() {
        devices.push(open_block(index, disk, host, closers)?);
    }
    for (index, nic) in config.nics.iter().enumerate() {
        devices.push(open_net(index, nic, host)?);
    }
    devices.push(rng::device("rng0".into()).map_err(MachineError::host("make the entropy device"))?);
    Ok(devices)
}

fn open_block(
    index: usize,
    config: &DiskConfig,
    host: &dyn HostFiles,
    closers: &mut Vec<DiskCloser>,
) -> Result<Front, MachineError> {
    let disk = Arc::new(Disk::open_image(host, &config.path, config.read_only, &config.image)?);
    closers.extend(disk.closer());
    let options = BlockOptions { id: config.id.as_deref(), cache: config.cache, queues: config.queues };
    let rings = Rings::new(&disk, host, config.engine, config.queues)?;
    block::device(format!("block{index}"), disk, rings, options).map_err(MachineError::host("make a block device"))
}

fn open_net(index: usize, config: &NetConfig, host: &dyn HostFiles) -> Result<Front, MachineError> {
    let name = format!("net{index}");
    let failed = MachineError::host("make a network card");
    let options = NetOptions { mac: config.mac, mtu: config.mtu, shape: None };
    match &config.backend {
        NetBackend::Tap(tap) => {
            let taps = Tap::attach(host, &tap.name, tap.queues)?;
            let vhosts = if tap.vhost { tap.queues } else { 0 };
            let vhosts = (0..vhosts).map(|_| VhostNet::open(host)).collect::<Result<_, _>>()?;
            net::device(name, taps, vhosts, options).map_err(failed)
        }
        NetBackend::User(network) => {
            let mac = match config.mac {
                Some(mac) => mac,
                None => MacAddress(net::random_mac().map_err(MachineError::host("find a MAC address"))?),
            };
            let passt = Passt::start(host, network, config.mtu.unwrap_or(MAX_USER_MTU), mac.0)?;
            net::user_device(name, passt, NetOptions { mac: Some(mac), ..options }).map_err(failed)
        }
    }
}
