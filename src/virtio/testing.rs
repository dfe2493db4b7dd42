//! A host and a device that write down what a transport asks of them, and a driver that knows registers by name.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::core::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use super::mmio::VirtioMmio;
use super::pci::{MsiMessage, PciHost, VirtioPci};
use super::{
    DeviceEvents, DeviceKind, Doorbells, OwnStateV1, QueueResources, QueueState, StateError, StillBusy, VirtioDevice,
    Virtqueue, feature,
};
use crate::memory::{Ram, anonymous};

#[derive(Default)]
pub struct FakeHost(Mutex<Host>);

#[derive(Default)]
struct Host {
    routes: BTreeSet<u32>,
    doorbells: BTreeSet<(u64, Option<u32>)>,
    /// By route: the message, and the eventfd KVM would listen to.
    connected: BTreeMap<u32, (MsiMessage, EventFd)>,
}

impl FakeHost {
    /// Addresses and values that are listened to.
    pub fn doorbells(&self) -> Vec<(u64, Option<u32>)> {
        self.0.lock().unwrap().doorbells.iter().copied().collect()
    }

    pub fn connected(&self) -> BTreeMap<u32, MsiMessage> {
        self.0.lock().unwrap().connected.iter().map(|(&route, &(message, _))| (route, message)).collect()
    }

    /// How many routes are taken.
    pub fn routes(&self) -> usize {
        self.0.lock().unwrap().routes.len()
    }

    /// How many messages a route has to send, as KVM would take them.
    pub fn sent(&self, route: u32) -> u64 {
        self.0.lock().unwrap().connected[&route].1.read().unwrap_or(0)
    }
}

/// No descriptor may live on in a program that is started later.
fn assert_closed_on_exec(fd: &EventFd) {
    // In octal.
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_ne!(flags & libc::O_CLOEXEC, 0, "flags {flags:o}");
}

impl Doorbells for FakeHost {
    fn attach_doorbell(&self, addr: u64, value: Option<u32>, fd: &EventFd) -> io::Result<()> {
        assert_closed_on_exec(fd);
        assert!(self.0.lock().unwrap().doorbells.insert((addr, value)), "two doorbells at {addr:#x}");
        Ok(())
    }

    fn detach_doorbell(&self, addr: u64, value: Option<u32>, _fd: &EventFd) {
        assert!(self.0.lock().unwrap().doorbells.remove(&(addr, value)), "no doorbell at {addr:#x}");
    }
}

impl PciHost for FakeHost {
    fn allocate_route(&self) -> io::Result<u32> {
        let mut host = self.0.lock().unwrap();
        let free = (0..).find(|route| !host.routes.contains(route)).expect("there are enough");
        host.routes.insert(free);
        Ok(free)
    }

    fn release_route(&self, route: u32) {
        let mut host = self.0.lock().unwrap();
        assert!(!host.connected.contains_key(&route), "route {route} is still connected");
        assert!(host.routes.remove(&route), "route {route} was nobody's");
    }

    fn connect(&self, route: u32, message: MsiMessage, fd: &EventFd) -> io::Result<()> {
        assert_closed_on_exec(fd);
        let old = self.0.lock().unwrap().connected.insert(route, (message, fd.try_clone()?));
        assert!(old.is_none(), "route {route} connected twice");
        Ok(())
    }

    fn disconnect(&self, route: u32, _fd: &EventFd) {
        assert!(self.0.lock().unwrap().connected.remove(&route).is_some(), "route {route} is not connected");
    }
}

pub const QUEUES: [u16; 2] = [64, 16];
/// A device's own feature, besides those of all rings.
pub const OWN_FEATURE: u64 = 1 << 5;

/// What the fake device runs, and its line to the transport.
#[derive(Default)]
pub struct Served {
    pub running: [Option<u64>; 2],
    /// With a request that does not end.
    pub busy: bool,
    /// What it has been told besides its queues.
    pub told: u32,
    /// Where queues stop, and where they have begun.
    pub stops_at: QueueState,
    pub began_at: [Option<QueueState>; 2],
    /// Queues that have been asked to stop while it is busy.
    pub asked: [bool; 2],
    pub events: Option<Arc<dyn DeviceEvents>>,
}

pub struct FakeDevice(pub Arc<Mutex<Served>>);

impl VirtioDevice for FakeDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn name(&self) -> &str {
        "fake"
    }

    fn features(&self) -> u64 {
        feature::RING | OWN_FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        crate::virtio::device::read_config_bytes(b"configuration", offset, data);
    }

    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()> {
        let max_size = QUEUES[usize::from(index)];
        Virtqueue::new(index, max_size, &resources, state).map_err(io::Error::other)?;
        let mut served = self.0.lock().unwrap();
        assert_eq!(served.running[usize::from(index)].replace(resources.features), None, "queue {index} runs already");
        served.events = Some(resources.events);
        served.began_at[usize::from(index)] = state;
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let mut served = self.0.lock().unwrap();
        served.asked[usize::from(index)] = false;
        served.running[usize::from(index)].take().map(|_| served.stops_at)
    }

    fn stop_queue_within(&mut self, index: u16, _patience: Duration) -> Result<Option<QueueState>, StillBusy> {
        if self.0.lock().unwrap().busy {
            self.0.lock().unwrap().asked[usize::from(index)] = true;
            return Err(StillBusy);
        }
        Ok(self.stop_queue(index))
    }

    fn continue_queue(&mut self, index: u16) {
        let asked = std::mem::take(&mut self.0.lock().unwrap().asked[usize::from(index)]);
        assert!(asked, "queue {index} was not asked to stop");
    }

    fn save(&self) -> OwnStateV1 {
        OwnStateV1::new(self.kind(), 1, &self.0.lock().unwrap().told)
    }

    fn check(&self, state: &OwnStateV1, _features: u64) -> Result<(), StateError> {
        state.parse::<u32>(self.kind(), 1).map(drop)
    }

    fn restore(&mut self, state: &OwnStateV1) -> io::Result<bool> {
        let told = state.parse(self.kind(), 1).unwrap();
        let before = std::mem::replace(&mut self.0.lock().unwrap().told, told);
        Ok(before != told)
    }
}

pub fn ram() -> Ram {
    anonymous(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

/// A function with its BAR at `bar`, its host and its device.
pub fn function(bar: u64) -> (VirtioPci, Arc<FakeHost>, Arc<Mutex<Served>>) {
    let served = Arc::<Mutex<Served>>::default();
    let (function, host) = function_of(Box::new(FakeDevice(served.clone())), ram(), bar);
    (function, host, served)
}

pub fn function_of(device: Box<dyn VirtioDevice>, ram: Ram, bar: u64) -> (VirtioPci, Arc<FakeHost>) {
    let host = Arc::<FakeHost>::default();
    (VirtioPci::new(device, ram, host.clone(), bar).unwrap(), host)
}

/// A device with its registers at `address`, its host, its device, and the other end of its line.
pub fn mmio(address: u64) -> (VirtioMmio, Arc<FakeHost>, Arc<Mutex<Served>>, EventFd) {
    let served = Arc::<Mutex<Served>>::default();
    let (device, host, line) = mmio_of(Box::new(FakeDevice(served.clone())), ram(), address);
    (device, host, served, line)
}

pub fn mmio_of(device: Box<dyn VirtioDevice>, ram: Ram, address: u64) -> (VirtioMmio, Arc<FakeHost>, EventFd) {
    let host = Arc::<FakeHost>::default();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let device = VirtioMmio::new(device, ram, host.clone(), address, line.try_clone().unwrap()).unwrap();
    (device, host, line)
}

/// What both transports have a register for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    DeviceFeatureSelect,
    DeviceFeatures,
    DriverFeatureSelect,
    DriverFeatures,
    Status,
    Generation,
    QueueSelect,
    /// Written: the size chosen. Read: the size, or the largest one possible.
    QueueSize,
    QueueReady,
    /// Of the descriptors, the available ring, the used ring: 64 bits.
    QueueAddress(u8),
}

/// A driver, over whatever transport.
pub trait Driver: Sized {
    /// One of a device of any kind.
    fn over(device: Box<dyn VirtioDevice>, ram: Ram) -> Self;
    /// One of the fake device.
    fn of_fake(served: Arc<Mutex<Served>>) -> Self;
    /// Kicks a queue by a register.
    fn notify(&mut self, queue: u16);
    /// Lets all interrupts through. PCI: vector 0 is that of the configuration, the one after a queue's index its own.
    fn unmask(&mut self, queues: u16);
    /// How often the queue has interrupted since the last look. Where it shares its line, that is acknowledged.
    fn heard(&mut self, queue: u16) -> u64;
    fn suspend(&mut self, deadline: Instant) -> Result<(), StillBusy>;
    fn resume(&mut self);
    fn save(&self) -> Value;
    fn check(&self, state: &Value) -> Result<(), StateError>;
    /// After a check.
    fn restore(&mut self, state: &Value);

    fn get(&mut self, register: Register) -> u64;
    fn set(&mut self, register: Register, value: u64);
    fn served(&self) -> MutexGuard<'_, Served>;

    fn status(&mut self) -> u8 {
        self.get(Register::Status) as u8
    }

    fn set_status(&mut self, status: u8) -> u8 {
        self.set(Register::Status, status.into());
        self.status()
    }

    fn offered(&mut self) -> u64 {
        (0..2).fold(0, |features, half| {
            self.set(Register::DeviceFeatureSelect, half);
            features | self.get(Register::DeviceFeatures) << (32 * half)
        })
    }

    fn accept(&mut self, features: u64) {
        for half in 0..2 {
            self.set(Register::DriverFeatureSelect, half);
            self.set(Register::DriverFeatures, features >> (32 * half) & 0xffff_ffff);
        }
    }

    fn negotiate(&mut self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Lays out a queue, 16 KiB from `at` on, and enables it.
    fn enable(&mut self, queue: u64, at: u64) {
        self.set(Register::QueueSelect, queue);
        for index in 0..3 {
            self.set(Register::QueueAddress(index), at + 0x1000 * u64::from(index));
        }
        self.set(Register::QueueReady, 1);
    }

    fn run(&mut self) -> u8 {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    }

    fn running(&self) -> [Option<u64>; 2] {
        self.served().running
    }

    fn set_busy(&self, busy: bool) {
        self.served().busy = busy;
    }

    fn events(&self) -> Arc<dyn DeviceEvents> {
        self.served().events.clone().unwrap()
    }
}
