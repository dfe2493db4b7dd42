//! The devices as the conformance tests see them: each can make its n-th request and check the answer.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Buffer, readable, writable};
use crate::backend::disk::tests::patiently;
use crate::backend::{Disk, Limiter, OpenDirectly, Passt, Tap};
use crate::config::{CacheMode, IoEngine, RateLimits, TokenBucket};
use crate::devices::block::{BlockDevice, BlockOptions, Rings, SyncEngine};
use crate::devices::net::{Card, NetLimiters, NetOptions, PairEngine, UserEngine};
use crate::devices::rng::RngEngine;
use crate::devices::worker::Engine;
use crate::devices::{Front, block, net, rng};
use crate::memory::Ram;
use crate::virtio::{OwnStateV1, VirtioDevice};

pub trait Specimen {
    fn name(&self) -> &'static str;
    fn device(&self) -> Box<dyn VirtioDevice>;
    /// One that can go on from what was saved of another.
    fn device_again(&self, _own: &OwnStateV1) -> Box<dyn VirtioDevice> {
        self.device()
    }
    /// The part that serves the queues, to be called without a thread.
    fn engine(&self) -> Box<dyn Engine>;
    /// The queue that the requests go to.
    fn queue(&self) -> u16 {
        0
    }
    /// Are answers in the order of the requests?
    fn in_order(&self) -> bool {
        true
    }
    /// Does a request that is under way outlive its device?
    fn outlives_the_device(&self) -> bool {
        true
    }
    /// What limits the requests, and the bytes of data in request `n` that it counts.
    fn limiter(&self) -> Option<&Arc<Limiter>> {
        None
    }
    fn bytes(&self, _n: u32) -> u64 {
        0
    }
    /// Builds request `n` in the 4 KiB at `at`.
    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer>;
    /// Does what the host has to do before the device can answer request `n`.
    fn provoke(&mut self, _n: u32) {}
    /// Checks the answer.
    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32);
}

/// All of them, those that can be limited twice: without limits, and with such that some requests have to wait a moment.
pub fn specimens() -> Vec<Box<dyn Specimen>> {
    let per_ms = |size| Some(TokenBucket { size, refill_ms: 1, burst: 0 });
    let limits = RateLimits { bandwidth: per_ms(3000), operations: per_ms(4) };
    unlimited().into_iter().chain(limited(limits)).collect()
}

/// Those that can be limited.
pub fn limited(limits: RateLimits) -> Vec<Box<dyn Specimen>> {
    let mut specimens = unlimited();
    specimens.retain(|specimen| specimen.limiter().is_some());
    specimens.iter().filter_map(|specimen| specimen.limiter()).for_each(|limiter| limiter.update(limits));
    specimens
}

fn unlimited() -> Vec<Box<dyn Specimen>> {
    let others: [Box<dyn Specimen>; 6] = [
        Box::new(Receive(Packets::new())),
        Box::new(Send(Packets::new())),
        Box::new(Receive(Packets::by_stream())),
        Box::new(Send(Packets::by_stream())),
        Box::new(Commands(Packets::new())),
        Box::new(Entropy::default()),
    ];
    BlockEngine::all().into_iter().map(|engine| Box::new(DiskRequests::new(engine)) as _).chain(others).collect()
}

/// How a disk is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockEngine {
    Sync,
    /// With io_uring, and what is ready done at once.
    Uring,
    /// All reads and writes go through the ring.
    UringOnly,
}

impl BlockEngine {
    /// Those that this host can have.
    pub fn all() -> Vec<Self> {
        let disk = DiskRequests::new(Self::Uring);
        match Rings::new(&disk.open(true), &OpenDirectly, IoEngine::IoUring, 1) {
            Ok(_) => vec![Self::Sync, Self::Uring, Self::UringOnly],
            Err(error) => {
                println!("not tested: io_uring: {error}: {}", std::error::Error::source(&error).unwrap());
                vec![Self::Sync]
            }
        }
    }

    pub fn rings(self, disk: &Arc<Disk>, queues: u16) -> Rings {
        let engine = if self == Self::Sync { IoEngine::Sync } else { IoEngine::IoUring };
        let mut rings = Rings::new(disk, &OpenDirectly, engine, queues).unwrap();
        rings.only = self == Self::UringOnly;
        rings
    }
}

pub const SECTORS: u64 = 128;

/// Writes and reads by turns: writes to the first half of the disk, and reads what was in the second half.
pub struct DiskRequests {
    pub file: NamedTempFile,
    pub limiter: Arc<Limiter>,
    engine: BlockEngine,
}

impl DiskRequests {
    pub fn new(engine: BlockEngine) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTORS * 512).unwrap();
        Self { file, limiter: Arc::default(), engine }
    }

    pub fn open(&self, read_only: bool) -> Arc<Disk> {
        // The lock of a device that has just been dropped is gone with its thread.
        Arc::new(patiently(|| Disk::open(&OpenDirectly, self.file.path(), read_only)))
    }

    pub fn device_with(&self, read_only: bool, options: BlockOptions<'_>) -> Front {
        self.device_over(&self.open(read_only), options).front
    }

    pub fn device_over(&self, disk: &Arc<Disk>, options: BlockOptions<'_>) -> BlockDevice {
        let rings = self.engine.rings(disk, options.queues);
        block::device("block0".into(), disk, rings, options, self.limiter.clone()).unwrap()
    }

    /// Sector and data of request `n`, which is even for a write.
    fn request(n: u32) -> (u64, [u8; 512]) {
        let at = u64::from(n / 2) % (SECTORS / 2);
        if n.is_multiple_of(2) { (at, Self::pattern(n)) } else { (at + SECTORS / 2, Self::pattern(at as u32)) }
    }

    fn pattern(n: u32) -> [u8; 512] {
        std::array::from_fn(|i| (n * 31 + i as u32) as u8)
    }
}

impl Specimen for DiskRequests {
    fn name(&self) -> &'static str {
        match self.engine {
            BlockEngine::Sync => "block",
            BlockEngine::Uring => "block over io_uring",
            BlockEngine::UringOnly => "block over io_uring only",
        }
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let options = BlockOptions { id: None, cache: CacheMode::Writeback, queues: 1 };
        for sector in SECTORS / 2..SECTORS {
            let data = Self::pattern((sector - SECTORS / 2) as u32);
            std::os::unix::fs::FileExt::write_all_at(self.file.as_file(), &data, sector * 512).unwrap();
        }
        Box::new(self.device_with(false, options))
    }

    fn engine(&self) -> Box<dyn Engine> {
        let disk = self.open(false);
        let mut rings = self.engine.rings(&disk, 1);
        rings.engine(0, SyncEngine::new("block0".into(), disk, [0; 20], CacheMode::Writeback, self.limiter.clone()))
    }

    fn in_order(&self) -> bool {
        self.engine == BlockEngine::Sync
    }

    fn limiter(&self) -> Option<&Arc<Limiter>> {
        Some(&self.limiter)
    }

    fn bytes(&self, _n: u32) -> u64 {
        512
    }

    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer> {
        let (sector, data) = Self::request(n);
        let kind = u32::from(n.is_multiple_of(2));
        let header = u128::from(kind) | u128::from(sector) << 64;
        ram.write_obj(header.to_le(), GuestAddress(at)).unwrap();
        ram.write_obj(0xffu8, GuestAddress(at + 0xfff)).unwrap();
        // The header and the data in two pieces each.
        let pieces = [(0x400, 500), (0x800, 12)];
        let mut chain = vec![readable(at, 7), readable(at + 7, 9)];
        if kind == 1 {
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
        let (sector, expected) = Self::request(n);
        let mut data = [0; 512];
        if n.is_multiple_of(2) {
            assert_eq!(written, 1);
            std::os::unix::fs::FileExt::read_exact_at(self.file.as_file(), &mut data, sector * 512).unwrap();
        } else {
            assert_eq!(written, 513);
            ram.read_slice(&mut data[..500], GuestAddress(at + 0x400)).unwrap();
            ram.read_slice(&mut data[500..], GuestAddress(at + 0x800)).unwrap();
        }
        assert_eq!(data, expected, "data of request {n}");
    }
}

/// A network of two ends: the device's, and ours.
pub struct Packets {
    name: &'static str,
    mtu: u16,
    /// Between frames there is nothing but their lengths, as with passt; else packets, as with a tap.
    stream: bool,
    limiters: NetLimiters,
    theirs: OwnedFd,
    pub ours: std::fs::File,
}

impl Packets {
    pub fn new() -> Self {
        Self::with("net0", 1500)
    }

    /// Of a device called `name`, whose tap has that MTU.
    pub fn with(name: &'static str, mtu: u16) -> Self {
        Self::over(SocketType::SEQPACKET, name, mtu)
    }

    /// Of a device in a user network.
    pub fn by_stream() -> Self {
        Self::over(SocketType::STREAM, "net0", 1500)
    }

    fn over(kind: SocketType, name: &'static str, mtu: u16) -> Self {
        let (theirs, ours) = socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).unwrap();
        let limiters = NetLimiters::default();
        Self { name, mtu, stream: kind == SocketType::STREAM, limiters, theirs, ours: ours.into() }
    }

    fn tap(&self) -> Tap {
        Tap::from_packets(self.theirs.try_clone().unwrap(), self.mtu)
    }

    fn passt(&self) -> Passt {
        Passt::played_by(self.theirs.try_clone().unwrap().into(), self.mtu)
    }

    /// Our end, for a reader that waits.
    pub fn reader(&self) -> std::os::unix::net::UnixStream {
        let reader = std::os::unix::net::UnixStream::from(OwnedFd::from(self.ours.try_clone().unwrap()));
        reader.set_nonblocking(false).unwrap();
        reader
    }

    /// Our end hangs up; its place is taken by one that is connected to nothing.
    pub fn hang_up(&mut self) {
        self.ours = std::fs::File::open("/dev/null").unwrap();
    }

    pub fn device(&self) -> Box<dyn VirtioDevice> {
        self.device_of(NetOptions::default()).unwrap()
    }

    pub fn device_of(&self, options: NetOptions) -> std::io::Result<Box<dyn VirtioDevice>> {
        let limiters = self.limiters.clone();
        let device = if self.stream {
            net::user_device(self.name.into(), self.passt(), options, limiters)
        } else {
            net::device(self.name.into(), vec![self.tap()], Vec::new(), options, limiters)
        };
        Ok(Box::new(device?))
    }

    fn device_again(&self, own: &OwnStateV1) -> Box<dyn VirtioDevice> {
        let shape = Some(net::saved_shape(own).unwrap());
        self.device_of(NetOptions { shape, ..NetOptions::default() }).unwrap()
    }

    pub fn engine(&self) -> Box<dyn Engine> {
        let (name, limiters) = (self.name.into(), self.limiters.clone());
        if self.stream {
            let card = Card::new([2, 0, 0, 0, 0, 1], self.mtu, Vec::new());
            return Box::new(UserEngine::new(name, self.passt(), card.into(), limiters));
        }
        let tap = std::sync::Arc::new(self.tap());
        let card = Card::new([2, 0, 0, 0, 0, 1], self.mtu, vec![tap.clone()]);
        Box::new(PairEngine::new(name, 0, tap, card.into(), limiters))
    }

    /// How long frame `n` is that is sent to a device, or by one.
    fn len(n: u32) -> usize {
        60 + n as usize % 1400
    }

    /// A header of 12 bytes and a frame of `len`.
    pub fn packet(n: u32, len: usize) -> Vec<u8> {
        let mut packet: Vec<u8> = (0..12 + len as u32).map(|i| (n + i) as u8).collect();
        packet[..12].fill(0);
        packet[20..24].copy_from_slice(&n.to_le_bytes());
        packet
    }

    pub fn put(&mut self, packet: &[u8]) {
        if self.stream {
            let frame = &packet[12..];
            self.ours.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
            return self.ours.write_all(frame).unwrap();
        }
        assert_eq!(self.ours.write(packet).unwrap(), packet.len());
    }

    pub fn take(&mut self) -> Option<Vec<u8>> {
        if self.stream {
            let mut len = [0; 4];
            self.ours.read_exact(&mut len).ok()?;
            let mut packet = vec![0; 12 + u32::from_be_bytes(len) as usize];
            self.ours.read_exact(&mut packet[12..]).unwrap();
            return Some(packet);
        }
        let mut packet = vec![0; 0x1_1000];
        let len = self.ours.read(&mut packet).ok()?;
        packet.truncate(len);
        Some(packet)
    }
}

pub struct Receive(Packets);

impl Specimen for Receive {
    fn name(&self) -> &'static str {
        if self.0.stream { "net, receiving from passt" } else { "net, receiving" }
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        self.0.device()
    }

    fn device_again(&self, own: &OwnStateV1) -> Box<dyn VirtioDevice> {
        self.0.device_again(own)
    }

    fn engine(&self) -> Box<dyn Engine> {
        self.0.engine()
    }

    fn prepare(&mut self, ram: &Ram, _n: u32, at: u64) -> Vec<Buffer> {
        ram.write_slice(&[0xee; 4096], GuestAddress(at)).unwrap();
        vec![writable(at, 2048), writable(at + 2048, 100)]
    }

    fn limiter(&self) -> Option<&Arc<Limiter>> {
        Some(&self.0.limiters.rx)
    }

    fn bytes(&self, n: u32) -> u64 {
        Packets::len(n) as u64
    }

    /// What has been read from a stream goes with the connection.
    fn outlives_the_device(&self) -> bool {
        !self.0.stream
    }

    fn provoke(&mut self, n: u32) {
        self.0.put(&Packets::packet(n, Packets::len(n)));
    }

    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32) {
        let mut expected = Packets::packet(n, Packets::len(n));
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
        if self.0.stream { "net, sending to passt" } else { "net, sending" }
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        self.0.device()
    }

    fn device_again(&self, own: &OwnStateV1) -> Box<dyn VirtioDevice> {
        self.0.device_again(own)
    }

    fn engine(&self) -> Box<dyn Engine> {
        self.0.engine()
    }

    fn queue(&self) -> u16 {
        1
    }

    fn limiter(&self) -> Option<&Arc<Limiter>> {
        Some(&self.0.limiters.tx)
    }

    fn bytes(&self, n: u32) -> u64 {
        Packets::len(n) as u64
    }

    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer> {
        let packet = Packets::packet(n, Packets::len(n));
        ram.write_slice(&packet, GuestAddress(at)).unwrap();
        vec![readable(at, 12), readable(at + 12, 10), readable(at + 22, packet.len() as u32 - 22)]
    }

    fn check(&mut self, _ram: &Ram, n: u32, _at: u64, written: u32) {
        assert_eq!(written, 0);
        assert_eq!(self.0.take().as_deref(), Some(&*Packets::packet(n, Packets::len(n))), "packet {n}");
    }
}

/// Commands that no card takes: to be many stations, and something unheard of.
pub struct Commands(Packets);

impl Specimen for Commands {
    fn name(&self) -> &'static str {
        "net, control"
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        self.0.device()
    }

    fn device_again(&self, own: &OwnStateV1) -> Box<dyn VirtioDevice> {
        self.0.device_again(own)
    }

    fn engine(&self) -> Box<dyn Engine> {
        self.0.engine()
    }

    fn queue(&self) -> u16 {
        2
    }

    fn prepare(&mut self, ram: &Ram, n: u32, at: u64) -> Vec<Buffer> {
        let command = if n.is_multiple_of(2) { [1, 1, 3, 0, 0, 0, 0, 1] } else { [200, 0, n as u8, 0, 0, 0, 0, 0] };
        ram.write_slice(&command, GuestAddress(at)).unwrap();
        ram.write_obj(0xeeeeu16, GuestAddress(at + 0x800)).unwrap();
        vec![readable(at, 2), readable(at + 2, 6), writable(at + 0x800, 1)]
    }

    fn check(&mut self, ram: &Ram, n: u32, at: u64, written: u32) {
        assert_eq!((written, ram.read_obj::<u16>(GuestAddress(at + 0x800)).unwrap()), (1, 0xee01), "command {n}");
    }
}

#[derive(Default)]
pub struct Entropy {
    limiter: Arc<Limiter>,
}

impl Specimen for Entropy {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(rng::device("rng0".into(), self.limiter.clone()).unwrap())
    }

    fn engine(&self) -> Box<dyn Engine> {
        Box::new(RngEngine { limiter: self.limiter.clone() })
    }

    fn limiter(&self) -> Option<&Arc<Limiter>> {
        Some(&self.limiter)
    }

    fn bytes(&self, _n: u32) -> u64 {
        40
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
