//! A machine's buses with all devices on them, and a guest that accesses them.
//!
//! The devices' threads serve what the guest sets up, as in a VM.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::input::Input;
use super::queues::{self, MEMORY};
use crate::config::{CacheMode, IoEngine, MacAddress};
use crate::devices::block::{BlockOptions, Rings};
use crate::devices::net::{NetLimiters, NetOptions};
use crate::devices::{Front, block, net, rng};
use crate::memory::{Ram, anonymous};
use crate::platform::bus::{Bus, shared};
use crate::platform::events::{self, EventDevice};
use crate::platform::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, Ecam, PciRoot};
use crate::platform::{EventSink, GuestEvent, layout, power};
use crate::virtio::mmio::{REGISTERS_SIZE, VirtioMmio};
use crate::virtio::pci::{MsiMessage, PciHost, VirtioPci};
use crate::virtio::{Doorbells, VirtioDevice};

/// Bits of the first byte of an access.
pub mod access {
    /// What is accessed: see the others.
    pub const SPACE: u8 = 3;
    /// 16 bits of port.
    pub const PORT: u8 = 0;
    /// 32 bits of address.
    pub const ADDRESS: u8 = 1;
    /// A device's number in a byte, and 16 bits of offset into its BAR or its registers.
    pub const DEVICE: u8 = 2;
    /// Not a device: as [`super::queues::Step::Write`].
    pub const MEMORY: u8 = 3;
    /// The logarithm of the width.
    pub const WIDTH_SHIFT: u8 = 2;
    /// The bytes that are written follow the address.
    pub const WRITE: u8 = 1 << 4;
    /// The address is one in the bridge's window beyond 4 GiB.
    pub const HIGH: u8 = 1 << 5;
}

const WINDOW_64: (u64, u64) = (1 << 37, 1 << 38);

/// In the place of KVM: it takes any doorbell and message once, and gives back only what it has.
#[derive(Default)]
pub struct Host(Mutex<Listening>);

#[derive(Default)]
struct Listening {
    routes: BTreeSet<u32>,
    doorbells: BTreeSet<(u64, Option<u32>)>,
    connected: BTreeSet<u32>,
}

impl Host {
    fn listening(&self) -> std::sync::MutexGuard<'_, Listening> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl Doorbells for Host {
    fn attach_doorbell(&self, addr: u64, value: Option<u32>, _fd: &EventFd) -> io::Result<()> {
        assert!(self.listening().doorbells.insert((addr, value)), "two doorbells at {addr:#x}");
        Ok(())
    }

    fn detach_doorbell(&self, addr: u64, value: Option<u32>, _fd: &EventFd) {
        assert!(self.listening().doorbells.remove(&(addr, value)), "no doorbell at {addr:#x}");
    }
}

impl PciHost for Host {
    fn allocate_route(&self) -> io::Result<u32> {
        let mut listening = self.listening();
        let route = listening.routes.len() as u32;
        listening.routes.insert(route);
        Ok(route)
    }

    fn release_route(&self, route: u32) {
        let mut listening = self.listening();
        assert!(!listening.connected.contains(&route), "route {route} is still connected");
        assert!(listening.routes.remove(&route), "route {route} was nobody's");
    }

    fn connect(&self, route: u32, _message: MsiMessage, _fd: &EventFd) -> io::Result<()> {
        assert!(self.listening().connected.insert(route), "route {route} is connected twice");
        Ok(())
    }

    fn disconnect(&self, route: u32, _fd: &EventFd) {
        assert!(self.listening().connected.remove(&route), "route {route} is not connected");
    }
}

struct Unheard;

impl EventSink for Unheard {
    fn guest_event(&self, _event: GuestEvent) {}
}

pub fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an eventfd")
}

fn options_of_card() -> NetOptions {
    NetOptions { mac: Some(MacAddress([2, 0, 0, 0, 0, 1])), ..NetOptions::default() }
}

/// A disk, a network card, entropy. The file is the other end of the network.
pub fn devices() -> (Vec<Front>, File) {
    let (files, disk) = queues::disk(false);
    let rings = Rings::new(&disk, &files, IoEngine::Sync, 1).expect("no rings can always be had");
    let options = BlockOptions { id: Some("fuzzed"), cache: CacheMode::Writeback, queues: 1 };
    let (tap, network) = queues::network();
    let devices = [
        block::device("block0".into(), &disk, rings, options, Arc::default()).map(|block| block.front),
        net::device("net0".into(), vec![tap], Vec::new(), options_of_card(), NetLimiters::default()),
        rng::device("rng0".into(), Arc::default()),
    ];
    (devices.into_iter().map(|device| device.expect("threads for a device")).collect(), network)
}

pub struct Machine {
    pub ports: Bus,
    pub mmio: Arc<Bus>,
    pub ram: Ram,
    host: Arc<Host>,
    /// Where each device's registers are at first.
    pub devices: Vec<u64>,
    _network: File,
}

impl Machine {
    pub fn new(over_pci: bool) -> Self {
        let ram = anonymous(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
        let (ports, mmio, host) = (Bus::default(), Arc::<Bus>::default(), Arc::<Host>::default());
        let (devices, network) = devices();
        let sink: Arc<dyn EventSink> = Arc::new(Unheard);
        let event_device = shared(EventDevice::new(eventfd(), Box::new(|_slot| {})));
        let mut placed = power::attach(&ports, &mmio, &sink)
            && mmio.insert(layout::EVENT_DEVICE, events::REGISTERS_SIZE, event_device);
        let root = Arc::new(Mutex::new(PciRoot::new(&mmio, Some(WINDOW_64))));
        let mut places = Vec::new();
        for ((slot, place), device) in (1..).zip(layout::virtio_mmio(devices.len())).zip(devices) {
            let device: Box<dyn VirtioDevice> = Box::new(device);
            if over_pci {
                let bar = PciRoot::initial_bar(slot);
                PciRoot::insert(
                    &root,
                    slot,
                    VirtioPci::new(device, ram.clone(), host.clone(), bar).expect("a function"),
                );
                places.push(bar);
            } else {
                let device = VirtioMmio::new(device, ram.clone(), host.clone(), place.address, eventfd());
                placed &= mmio.insert(place.address, REGISTERS_SIZE, shared(device.expect("a device")));
                places.push(place.address);
            }
        }
        placed &= ports.insert(CONFIG_PORTS.into(), CONFIG_PORTS_LEN, shared(ConfigPorts(root.clone())))
            && mmio.insert(layout::ECAM, layout::ECAM_SIZE, shared(Ecam(root)));
        assert!(placed, "the platform's places do not overlap");
        Self { ports, mmio, ram, host, devices: places, _network: network }
    }

    /// Does the next access of the input; `None` at its end.
    fn access(&self, input: &mut Input<'_>) -> Option<()> {
        let kind = input.u8()?;
        let (bus, at) = match kind & access::SPACE {
            access::PORT => (&self.ports, input.u16()?.into()),
            access::ADDRESS => {
                let base = if kind & access::HIGH != 0 { WINDOW_64.0 } else { 0 };
                (&*self.mmio, base + u64::from(input.u32()?))
            }
            access::DEVICE => {
                let device = self.devices[usize::from(input.u8()?) % self.devices.len()];
                (&*self.mmio, device + u64::from(input.u16()?))
            }
            access::MEMORY => return queues::write(input, &self.ram),
            _ => unreachable!("two bits"),
        };
        let width = 1 << (kind >> access::WIDTH_SHIFT & 3);
        if kind & access::WRITE == 0 {
            bus.read(at, &mut [0xff; 8][..width]);
        } else {
            bus.write(at, input.bytes(width)?);
        }
        Some(())
    }
}

fn run(over_pci: bool, mut input: Input<'_>) {
    let machine = Machine::new(over_pci);
    while machine.access(&mut input).is_some() {}
    let Machine { ports, mmio, ram, host, .. } = machine;
    drop((ports, mmio));
    let listening = host.listening();
    assert!(listening.doorbells.is_empty() && listening.routes.is_empty(), "nothing is left of the devices");
    assert_eq!(Arc::strong_count(&ram), 1, "the devices have let go of guest memory");
}

/// Accesses to a machine with its devices behind PCI: one after the other, see [`access`].
pub fn pci(input: &[u8]) {
    run(true, Input(input));
}

/// The same, with the devices' registers in memory. There is an empty PCI bus too.
pub fn mmio(input: &[u8]) {
    run(false, Input(input));
}
