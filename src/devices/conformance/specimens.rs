//! The devices as the conformance tests see them: each can make its n-th request and check the answer.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Buffer, readable, writable};
use crate::backend::{Disk, OpenDirectly, Tap};
use crate::config::CacheMode;
use crate::devices::block::{BlockOptions, SyncEngine};
use crate::devices::net::NetEngine;
use crate::devices::net::NetOptions;
use crate::devices::rng::RngEngine;
use crate::devices::worker::Engine;
use crate::devices::{block, net, rng};
use crate::memory::Ram;
use crate::virtio::VirtioDevice;

pub trait Specimen {
    fn name(&self) -> &'static str;
    fn device(&self) -> Box<dyn VirtioDevice>;
    /// The part that serves the queues, to be called without a thread.
    fn engine(&self) -> Box<dyn Engine>;
    /// The queue that the requests go to.
    fn queue(&self) -> u16 {
        0
    }
    /// Builds request `n` in the 4 KiB at `at`.
    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer>;
    /// Does what the host has to do before the device can answer request `n`.
    fn provoke(&mut self, _n: u32) {}
    /// Checks the answer.
    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32);
}

pub fn specimens() -> Vec<Box<dyn Specimen>> {
    vec![
        Box::new(DiskRequests::new()),
        Box::new(Receive(Packets::new())),
        Box::new(Send(Packets::new())),
        Box::new(Entropy),
    ]
}

pub const SECTORS: u64 = 128;

/// Writes a sector, reads it back, and so on.
pub struct DiskRequests(pub NamedTempFile);

impl DiskRequests {
    pub fn new() -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTORS * 512).unwrap();
        Self(file)
    }

    pub fn open(&self, read_only: bool) -> Disk {
        // The lock of a device that has just been dropped is gone with its thread.
        Disk::open(&OpenDirectly, self.0.path(), read_only).unwrap()
    }

    fn pattern(n: u32) -> [u8; 512] {
        std::array::from_fn(|i| (n * 31 + i as u32) as u8)
    }
}

impl Specimen for DiskRequests {
    fn name(&self) -> &'static str {
        "block"
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let options = BlockOptions { id: None, cache: CacheMode::Writeback, queues: 1 };
        Box::new(block::device("block0".into(), self.open(false), options).unwrap())
    }

    fn engine(&self) -> Box<dyn Engine> {
        Box::new(SyncEngine::new("block0".into(), self.open(false).into(), [0; 20], CacheMode::Writeback))
    }

    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer> {
        let (kind, sector) = if n.is_multiple_of(2) { (1u32, n / 2) } else { (0, n / 2) };
        let header = u128::from(kind) | u128::from(u64::from(sector) % SECTORS) << 64;
        ram.write_obj(header.to_le(), GuestAddress(at)).unwrap();
        ram.write_obj(0xffu8, GuestAddress(at + 0xfff)).unwrap();
        // The header and the data in two pieces each.
        let pieces = [(0x400, 500), (0x800, 12)];
        let mut chain = vec![readable(at, 7), readable(at + 7, 9)];
        if kind == 1 {
            let data = Self::pattern(n / 2);
            ram.write_slice(&data[..500], GuestAddress(at + 0x400)).unwrap();
            ram.write_slice(&data[500..], GuestAddress(at + 0x800)).unwrap();
            chain.extend(pieces.map(|(offset, len)| readable(at + offset, len)));
        } else {
            ram.write_slice(&[0xee; 0xa00], GuestAddress(at + 0x400)).unwrap();
            chain.extend(pieces.map(|(offset, len)| writable(at + offset, len)));
        }
        chain.push(writable(at + 0xfff, 1));
        chain
    }

    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32) {
        assert_eq!(ram.read_obj::<u8>(GuestAddress(at + 0xfff)).unwrap(), 0, "status of request {n}");
        let mut data = [0; 512];
        if n.is_multiple_of(2) {
            assert_eq!(written, 1);
            std::os::unix::fs::FileExt::read_exact_at(self.0.as_file(), &mut data, u64::from(n / 2) % SECTORS * 512)
                .unwrap();
        } else {
            assert_eq!(written, 513);
            ram.read_slice(&mut data[..500], GuestAddress(at + 0x400)).unwrap();
            ram.read_slice(&mut data[500..], GuestAddress(at + 0x800)).unwrap();
        }
        assert_eq!(data, Self::pattern(n / 2), "data of request {n}");
    }
}

/// A network of two ends: the device's, and ours.
pub struct Packets {
    name: &'static str,
    mtu: u16,
    theirs: OwnedFd,
    ours: std::fs::File,
}

impl Packets {
    pub fn new() -> Self {
        Self::with("net0", 1500)
    }

    /// Of a device called `name`, whose tap has that MTU.
    pub fn with(name: &'static str, mtu: u16) -> Self {
        let (theirs, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        Self { name, mtu, theirs, ours: ours.into() }
    }

    fn tap(&self) -> Tap {
        Tap::from_packets(self.theirs.try_clone().unwrap(), self.mtu)
    }

    pub fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(net::device(self.name.into(), self.tap(), NetOptions::default()).unwrap())
    }

    pub fn engine(&self) -> Box<dyn Engine> {
        Box::new(NetEngine::new(self.name.into(), self.tap(), self.mtu))
    }

    /// A header of 12 bytes and a frame of `len`.
    pub fn packet(n: u32, len: usize) -> Vec<u8> {
        let mut packet: Vec<u8> = (0..12 + len as u32).map(|i| (n + i) as u8).collect();
        packet[..12].fill(0);
        packet[20..24].copy_from_slice(&n.to_le_bytes());
        packet
    }

    pub fn put(&mut self, packet: &[u8]) {
        assert_eq!(self.ours.write(packet).unwrap(), packet.len());
    }

    pub fn take(&mut self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 0x1_1000];
        let len = self.ours.read(&mut packet).ok()?;
        packet.truncate(len);
        Some(packet)
    }
}

pub struct Receive(Packets);

impl Specimen for Receive {
    fn name(&self) -> &'static str {
        "net, receiving"
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        self.0.device()
    }

    fn engine(&self) -> Box<dyn Engine> {
        self.0.engine()
    }

    fn prepare(&mut self, ram: &Ram, _n: u32, at: u64) -> Vec<Buffer> {
        ram.write_slice(&[0xee; 4096], GuestAddress(at)).unwrap();
        vec![writable(at, 2048), writable(at + 2048, 100)]
    }

    fn provoke(&mut self, n: u32) {
        self.0.put(&Packets::packet(n, 60 + n as usize % 1400));
    }

    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32) {
        let mut expected = Packets::packet(n, 60 + n as usize % 1400);
        expected[10] = 1;
        assert_eq!(written as usize, expected.len(), "length of packet {n}");
        let mut got = vec![0; 4096];
        ram.read_slice(&mut got, GuestAddress(at)).unwrap();
        assert_eq!(got[..expected.len()], expected, "packet {n}");
        assert!(got[expected.len()..].iter().all(|&byte| byte == 0xee));
    }
}

pub struct Send(Packets);

impl Specimen for Send {
    fn name(&self) -> &'static str {
        "net, sending"
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        self.0.device()
    }

    fn engine(&self) -> Box<dyn Engine> {
        self.0.engine()
    }

    fn queue(&self) -> u16 {
        1
    }

    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer> {
        let packet = Packets::packet(n, 60 + n as usize % 1400);
        ram.write_slice(&packet, GuestAddress(at)).unwrap();
        vec![readable(at, 12), readable(at + 12, 10), readable(at + 22, packet.len() as u32 - 22)]
    }

    fn check(&mut self, _ram: &Ram, n: u32, _at: u64, written: u32) {
        assert_eq!(written, 0);
        assert_eq!(self.0.take().as_deref(), Some(&*Packets::packet(n, 60 + n as usize % 1400)), "packet {n}");
    }
}

pub struct Entropy;

impl Specimen for Entropy {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(rng::device("rng0".into()).unwrap())
    }

    fn engine(&self) -> Box<dyn Engine> {
        Box::new(RngEngine)
    }

    fn prepare(&mut self, ram: &Ram, _n: u32, at: u64) -> Vec<Buffer> {
        ram.write_slice(&[0; 64], GuestAddress(at)).unwrap();
        vec![writable(at, 10), writable(at + 20, 30)]
    }

    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32) {
        assert_eq!(written, 40);
        let mut got = [0; 64];
        ram.read_slice(&mut got, GuestAddress(at)).unwrap();
        let zeroes = |range: &[u8]| range.iter().filter(|&&byte| byte == 0).count();
        assert!(zeroes(&got[..10]) < 8 && zeroes(&got[20..50]) < 10, "request {n}: {got:?}");
        assert_eq!((zeroes(&got[10..20]), zeroes(&got[50..])), (10, 14));
    }
}
