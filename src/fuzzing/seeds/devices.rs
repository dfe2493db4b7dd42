//! Rings and requests as the conformance tests' driver makes them, and a driver that sets up the devices of a machine.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{pieces, plant};
use crate::devices::conformance::driver::Ring;
use crate::devices::conformance::specimens::{Packets, Specimen, specimens};
use crate::fuzzing::input::Input;
use crate::fuzzing::machine::{Machine, access};
use crate::fuzzing::queues::{self, MEMORY, Served, Step, layout};
use crate::memory::{Ram, anonymous};
use crate::platform::layout::ECAM;
use crate::platform::pci::CONFIG_PORTS;
use crate::virtio::core::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use crate::virtio::{QueueLayout, feature};

const REQUESTS: u32 = 8;
const SIZE: u16 = 64;

fn ram() -> Ram {
    anonymous(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn used(ram: &Ram, layout: QueueLayout) -> u16 {
    ram.load(GuestAddress(layout.used + 2), Ordering::Acquire).unwrap()
}

/// Makes requests in fresh memory, and returns what had to be written there.
fn requests(specimen: &mut dyn Specimen, features: u64) -> Vec<(usize, Vec<u8>)> {
    let ram = ram();
    let mut ring = Ring::new(&ram, specimen.queue(), SIZE, features);
    for n in 0..REQUESTS {
        let buffers = specimen.prepare(&ram, n, 0x3_0000 + u64::from(n) * 0x1000);
        ring.chain(n as u16 * 8, &buffers, n % 2 == 1);
        ring.publish(n as u16 * 8);
    }
    let mut bytes = vec![0; MEMORY as usize];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    pieces(&bytes).into_iter().map(|(at, piece)| (at, piece.to_vec())).collect()
}

/// The bytes of a write to memory.
fn write(at: usize, bytes: &[u8]) -> Vec<u8> {
    [&(at as u32).to_le_bytes()[..], &(bytes.len() as u16).to_le_bytes(), bytes].concat()
}

fn number(step: Step) -> u8 {
    Step::ALL.iter().position(|other| *other == step).unwrap() as u8
}

/// Whose requests these are; other ways to serve a disk take the same.
fn served(specimen: &dyn Specimen) -> Vec<Served> {
    match specimen.name() {
        "block" => vec![Served::Disk, Served::DiskReadOnly],
        "block over io_uring" => vec![Served::DiskUring],
        "block over io_uring only" => vec![Served::DiskUringOnly],
        "net, receiving" => vec![Served::Receive],
        "net, sending" => vec![Served::Send],
        "net, receiving from passt" => vec![Served::ReceiveUser],
        "net, sending to passt" => vec![Served::SendUser],
        "net, control" => vec![Served::Control],
        "rng" => vec![Served::Rng],
        other => panic!("{other} has no place here"),
    }
}

#[test]
fn requests_of_every_device() {
    // Mergeable receive buffers, an address that can be set; a disk that is flushed (the network's ECN).
    let many = feature::RING | 1 << 15 | 1 << 23 | 1 << 9;
    for features in [feature::VERSION_1, many] {
        for mut specimen in specimens() {
            let writes = requests(&mut *specimen, features);
            for of in served(&*specimen) {
                let device = Served::ALL.iter().position(|other| *other == of).unwrap() as u8;
                let mut seed = vec![device, SIZE.ilog2() as u8];
                seed.extend_from_slice(&features.to_le_bytes());
                for (at, bytes) in &writes {
                    seed.push(number(Step::Write));
                    seed.extend(write(*at, bytes));
                }
                if [Served::Receive, Served::ReceiveUser].contains(&of) {
                    for n in 0..REQUESTS {
                        let mut packet = Packets::packet(n, 60 + 20 * n as usize);
                        if of == Served::ReceiveUser {
                            packet.drain(..8);
                            let len = packet.len() as u32 - 4;
                            packet[..4].copy_from_slice(&len.to_be_bytes());
                        }
                        seed.push(number(Step::Packet));
                        seed.extend_from_slice(&(packet.len() as u16).to_le_bytes());
                        seed.extend(packet);
                    }
                }
                seed.extend_from_slice(&[number(Step::Serve), 3, number(Step::Restart), number(Step::Serve), 63]);
                let ram = queues::run(&mut Input(&seed)).unwrap();
                let answered = used(&ram, layout(specimen.queue(), SIZE));
                assert_eq!(answered, REQUESTS as u16, "{of:?} under {features:#x}");
                plant("queues", &format!("{of:?}-{features:x}"), &seed);
            }
        }
    }
}

/// A driver that writes down what it does.
struct Driver {
    machine: Machine,
    over_pci: bool,
    seed: Vec<u8>,
}

/// Where a register is over PCI and over MMIO, and how wide over PCI. Queue addresses are written by halves.
#[derive(Clone, Copy)]
struct Register(u16, usize, u16);

const DRIVER_FEATURES_SELECT: Register = Register(0x08, 4, 0x24);
const DRIVER_FEATURES: Register = Register(0x0c, 4, 0x20);
const STATUS: Register = Register(0x14, 1, 0x70);
const QUEUE_SELECT: Register = Register(0x16, 2, 0x30);
const QUEUE_SIZE: Register = Register(0x18, 2, 0x38);
const QUEUE_READY: Register = Register(0x1c, 2, 0x44);
const QUEUE_ADDRESSES: [Register; 6] = [
    Register(0x20, 4, 0x80),
    Register(0x24, 4, 0x84),
    Register(0x28, 4, 0x90),
    Register(0x2c, 4, 0x94),
    Register(0x30, 4, 0xa0),
    Register(0x34, 4, 0xa4),
];

impl Driver {
    fn new(over_pci: bool) -> Self {
        Self { machine: Machine::new(over_pci), over_pci, seed: Vec::new() }
    }

    fn note(&mut self, kind: u8, at: &[u8], width: usize, written: &[u8]) {
        self.seed.push(kind | (width.ilog2() as u8) << access::WIDTH_SHIFT);
        self.seed.extend_from_slice(at);
        self.seed.extend_from_slice(written);
    }

    fn write_at(&mut self, device: usize, offset: u16, width: usize, value: u64) {
        let (at, value) = ([&[device as u8], &offset.to_le_bytes()[..]].concat(), value.to_le_bytes());
        self.note(access::DEVICE | access::WRITE, &at, width, &value[..width]);
        self.machine.mmio.write(self.machine.devices[device] + u64::from(offset), &value[..width]);
    }

    fn read_at(&mut self, device: usize, offset: u16, width: usize) -> u64 {
        let at = [&[device as u8], &offset.to_le_bytes()[..]].concat();
        self.note(access::DEVICE, &at, width, &[]);
        let mut value = [0; 8];
        self.machine.mmio.read(self.machine.devices[device] + u64::from(offset), &mut value[..width]);
        u64::from_le_bytes(value)
    }

    fn set(&mut self, device: usize, register: Register, value: u64) {
        match self.over_pci {
            true => self.write_at(device, register.0, register.1, value),
            false => self.write_at(device, register.2, 4, value),
        }
    }

    fn status(&mut self, device: usize) -> u8 {
        let (offset, width) = if self.over_pci { (STATUS.0, 1) } else { (STATUS.2, 4) };
        self.read_at(device, offset, width) as u8
    }

    /// Turns on the decoding of memory, through memory or ports by turns, and MSI-X where it is.
    fn enable(&mut self, device: usize) {
        let slot = device as u32 + 1;
        let command = 6u16.to_le_bytes();
        if device.is_multiple_of(2) {
            let at = ECAM as u32 + (slot << 15) + 4;
            self.note(access::ADDRESS | access::WRITE, &at.to_le_bytes(), 2, &command);
            self.machine.mmio.write(at.into(), &command);
        } else {
            let address = (1u32 << 31 | slot << 11 | 4).to_le_bytes();
            for (port, data) in [(CONFIG_PORTS, &address[..]), (CONFIG_PORTS + 4, &command)] {
                self.note(access::PORT | access::WRITE, &port.to_le_bytes(), data.len(), data);
                self.machine.ports.write(port.into(), data);
            }
        }
        let space = ECAM + (u64::from(slot) << 15);
        for at in (0x40..0xfc).step_by(4) {
            let mut word = [0; 4];
            self.note(access::ADDRESS, &(space as u32 + at).to_le_bytes(), 4, &[]);
            self.machine.mmio.read(space + u64::from(at), &mut word);
            // The capability's ID; there is nothing else there that looks like it.
            if word[0] == 0x11 && word[3] == 0 {
                let (control, on) = (space + u64::from(at) + 2, 0x8000u16.to_le_bytes());
                self.note(access::ADDRESS | access::WRITE, &(control as u32).to_le_bytes(), 2, &on);
                self.machine.mmio.write(control, &on);
            }
        }
        for vector in 0..4 {
            for (at, value) in [(0, 0xfee0_1000), (4, 0), (8, 0x41 + u64::from(vector)), (12, 0)] {
                self.write_at(device, 0x4000 + 16 * vector + at, 4, value);
            }
        }
        self.write_at(device, 0x10, 2, 0);
    }

    /// Starts one queue of a device, with these features.
    fn start(&mut self, device: usize, queue: u16, features: u64) {
        if self.over_pci {
            self.enable(device);
        }
        for status in [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
            self.set(device, STATUS, status.into());
        }
        for half in 0..2 {
            self.set(device, DRIVER_FEATURES_SELECT, half);
            self.set(device, DRIVER_FEATURES, features >> (32 * half) & 0xffff_ffff);
        }
        self.set(device, STATUS, (ACKNOWLEDGE | DRIVER | FEATURES_OK).into());
        self.set(device, QUEUE_SELECT, queue.into());
        self.set(device, QUEUE_SIZE, SIZE.into());
        let QueueLayout { descriptors, avail, used, .. } = layout(queue, SIZE);
        for (halves, address) in QUEUE_ADDRESSES.chunks(2).zip([descriptors, avail, used]) {
            self.set(device, halves[0], address & 0xffff_ffff);
            self.set(device, halves[1], address >> 32);
        }
        if self.over_pci {
            self.write_at(device, 0x1a, 2, 1);
        }
        self.set(device, QUEUE_READY, 1);
        let running = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.set(device, STATUS, running.into());
        assert_eq!(self.status(device), running);
    }

    /// Makes requests, kicks, and reads why it was interrupted.
    fn request(&mut self, device: usize, specimen: &mut dyn Specimen, features: u64) {
        for (at, bytes) in requests(specimen, features) {
            self.seed.push(access::MEMORY);
            self.seed.extend(write(at, &bytes));
            self.machine.ram.write_slice(&bytes, GuestAddress(at as u64)).unwrap();
        }
        let queue = specimen.queue();
        match self.over_pci {
            true => self.write_at(device, 0x3000 + 4 * queue, 2, queue.into()),
            false => self.write_at(device, 0x50, 4, queue.into()),
        }
        let layout = layout(queue, SIZE);
        let deadline = Instant::now() + Duration::from_secs(60);
        while used(&self.machine.ram, layout) != REQUESTS as u16 {
            assert!(Instant::now() < deadline, "{}: no answer", specimen.name());
            std::thread::yield_now();
        }
        match self.over_pci {
            true => drop(self.read_at(device, 0x1000, 1)),
            false => {
                self.read_at(device, 0x60, 4);
                self.write_at(device, 0x64, 4, 1);
            }
        }
        for at in 0..4 {
            let config = if self.over_pci { 0x2000 } else { 0x100 };
            self.read_at(device, config + 8 * at, 8);
        }
    }
}

#[test]
fn a_driver_of_every_device_over_both_transports() {
    for over_pci in [true, false] {
        for mut specimen in specimens() {
            let device = match specimen.name() {
                "block" => 0,
                "net, sending" | "net, control" => 1,
                "rng" => 2,
                // Served by no device of this machine, or without a word from the network.
                _ => continue,
            };
            let features = feature::RING;
            let mut driver = Driver::new(over_pci);
            driver.start(device, specimen.queue(), features);
            driver.request(device, &mut *specimen, features);
            driver.set(device, STATUS, 0);
            assert_eq!(driver.status(device), 0);
            let name = specimen.name().replace(", ", "-");
            plant(if over_pci { "pci" } else { "mmio" }, &name, &driver.seed);
        }
    }
}
