//! Rings and requests, served by the engine of a device, as its thread does it.

use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::input::Input;
use super::memory_files::{MemoryFiles, empty};
use crate::backend::{Disk, Passt, Tap};
use crate::config::{CacheMode, IoEngine};
use crate::devices::block::{Rings, SyncEngine};
use crate::devices::net::{Card, NetLimiters, PairEngine, UserEngine};
use crate::devices::rng::RngEngine;
use crate::devices::worker::{Engine, Turn};
use crate::memory::{Ram, anonymous};
use crate::virtio::{Chain, DeviceEvents, QueueLayout, QueueResources, Virtqueue, feature};

/// Bytes of guest memory: the ring of queue `n` is at `n` times 64 KiB, and buffers are anywhere.
pub const MEMORY: u64 = 0x4_0000;
pub const DISK: &str = "disk";
const DISK_BYTES: u64 = 64 << 10;

/// Largest ring and packet.
const MAX_SIZE: u16 = 256;
const MAX_PACKET: usize = 0x2000;

/// Whose queue it is, in the order of the input's first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Disk,
    /// Over io_uring, and what is ready done at once.
    DiskUring,
    /// All reads and writes go through the ring.
    DiskUringOnly,
    DiskReadOnly,
    Receive,
    Send,
    Control,
    Rng,
    /// Of a card in a user network.
    ReceiveUser,
    SendUser,
}

impl Served {
    pub const ALL: [Self; 10] = [
        Self::Disk,
        Self::DiskUring,
        Self::DiskUringOnly,
        Self::DiskReadOnly,
        Self::Receive,
        Self::Send,
        Self::Control,
        Self::Rng,
        Self::ReceiveUser,
        Self::SendUser,
    ];

    fn queue(self) -> u16 {
        match self {
            Self::Send | Self::SendUser => 1,
            Self::Control => 2,
            _ => 0,
        }
    }
}

/// What happens next, in the order of its byte in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The driver writes to memory: 32 bits of address, 16 of length, bytes.
    Write,
    /// The device has a turn: a byte for the number of requests.
    Serve,
    /// The network has a packet, or a piece of a stream of them: 16 bits of length, bytes.
    Packet,
    /// The queue is stopped and taken up where it was.
    Restart,
}

impl Step {
    pub const ALL: [Self; 4] = [Self::Write, Self::Serve, Self::Packet, Self::Restart];
}

struct Unheard;

impl DeviceEvents for Unheard {
    fn queue_interrupt(&self, _queue: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, why: &dyn Display) {
        // Whatever it prints comes from the guest.
        let _ = why.to_string();
    }
}

/// A disk of 64 KiB in memory.
pub fn disk(read_only: bool) -> (MemoryFiles, Arc<Disk>) {
    let file = empty();
    file.set_len(DISK_BYTES).expect("room for a disk in memory");
    let files = MemoryFiles::default().with(DISK, file);
    let disk = Disk::open(&files, Path::new(DISK), read_only).expect("a disk in memory can be opened");
    (files, Arc::new(disk))
}

/// A tap, and the other end of its network.
pub fn network() -> (Tap, File) {
    let (theirs, ours): (OwnedFd, OwnedFd) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).expect("a pair of sockets");
    (Tap::from_packets(theirs, 1500), ours.into())
}

fn block_engine(engine: IoEngine, only: bool, read_only: bool) -> Box<dyn Engine> {
    let (files, disk) = disk(read_only);
    // A host without io_uring serves the same requests one by one.
    let rings = Rings::new(&disk, &files, engine, 1).or_else(|_| Rings::new(&disk, &files, IoEngine::Sync, 1));
    let mut rings = rings.expect("no rings can always be had");
    rings.only = only;
    rings.engine(0, SyncEngine::new("block0".into(), disk, [b'i'; 20], CacheMode::Writeback, Arc::default()))
}

/// The engine, and where packets for it come from.
fn engine(of: Served) -> (Box<dyn Engine>, Option<File>) {
    match of {
        Served::Disk => (block_engine(IoEngine::Sync, false, false), None),
        Served::DiskUring => (block_engine(IoEngine::IoUring, false, false), None),
        Served::DiskUringOnly => (block_engine(IoEngine::IoUring, true, false), None),
        Served::DiskReadOnly => (block_engine(IoEngine::Sync, false, true), None),
        Served::Receive | Served::Send | Served::Control => {
            let (tap, net) = network();
            let tap = Arc::new(tap);
            let card = Card::new([2, 0, 0, 0, 0, 1], 1500, vec![tap.clone()]);
            (Box::new(PairEngine::new("net0".into(), 0, tap, card.into(), NetLimiters::default())), Some(net))
        }
        Served::Rng => (Box::new(RngEngine::default()), None),
        Served::ReceiveUser | Served::SendUser => {
            let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
            ours.set_nonblocking(true).expect("a socket of ours");
            let card = Card::new([2, 0, 0, 0, 0, 1], 1500, Vec::new());
            let engine =
                UserEngine::new("net0".into(), Passt::played_by(theirs, 1500), card.into(), NetLimiters::default());
            (Box::new(engine), Some(OwnedFd::from(ours).into()))
        }
    }
}

/// Where the queue's parts are.
pub fn layout(queue: u16, size: u16) -> QueueLayout {
    let base = u64::from(queue) * 0x1_0000;
    QueueLayout { size, descriptors: base, avail: base + 0x1000, used: base + 0x2000 }
}

/// Serves a queue: of which device, a byte; its size, the logarithm in a byte; features, 64 bits; then [`Step`]s.
pub fn queues(input: &[u8]) {
    let _ = run(&mut Input(input));
}

/// Returns guest memory as it was left.
pub fn run(input: &mut Input<'_>) -> Option<Ram> {
    let of = Served::ALL[usize::from(input.u8()?) % Served::ALL.len()];
    let size = 1 << (u32::from(input.u8()?) % (MAX_SIZE.ilog2() + 1));
    let features = input.u64()? | feature::VERSION_1;
    let ram = anonymous(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
    serve(input, of, size, features, &ram);
    // Whoever still held guest memory could still write to it.
    assert_eq!(Arc::strong_count(&ram), 1, "the device has let go of guest memory");
    Some(ram)
}

fn serve(input: &mut Input<'_>, of: Served, size: u16, features: u64, ram: &Ram) -> Option<()> {
    let (mut engine, net) = engine(of);
    let resources = QueueResources {
        ram: ram.clone(),
        layout: layout(of.queue(), size),
        features,
        kick: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
        events: Arc::new(Unheard),
    };
    let begin = |state| Virtqueue::new(of.queue(), MAX_SIZE, &resources, state).expect("the queue is in memory");
    let mut chain = Chain::new(ram);
    let mut queue = begin(None);
    if engine.start(of.queue(), features, ram).is_err() {
        return None;
    }
    while let Some(step) = input.u8() {
        match Step::ALL[usize::from(step) % Step::ALL.len()] {
            Step::Write => write(input, ram)?,
            Step::Serve => {
                let turn = u32::from(input.u8()?) % 64 + 1;
                queue.disable_kicks();
                let served = engine.serve(&mut queue, &mut chain, &mut Turn::of(turn));
                queue.interrupt();
                if let Err(error) = served {
                    // The driver resets what it has broken.
                    queue.broken(&error);
                    engine.stop(&mut queue);
                    queue = begin(None);
                    engine.start(of.queue(), features, ram).ok()?;
                } else {
                    queue.enable_kicks();
                }
            }
            Step::Packet => {
                let len = usize::from(input.u16()?) % MAX_PACKET;
                if let Some(mut net) = net.as_ref() {
                    // A network may lose packets.
                    let _ = net.write(input.up_to(len));
                }
            }
            Step::Restart => {
                engine.stop(&mut queue);
                queue = begin(Some(queue.state()));
                engine.start(of.queue(), features, ram).ok()?;
            }
        }
    }
    engine.stop(&mut queue);
    Some(())
}

/// A write of the driver's to memory, as in [`Step::Write`].
pub fn write(input: &mut Input<'_>, ram: &Ram) -> Option<()> {
    let at = u64::from(input.u32()?) % MEMORY;
    let len = usize::from(input.u16()?).min((MEMORY - at) as usize);
    ram.write_slice(input.up_to(len), GuestAddress(at)).expect("it is in memory");
    Some(())
}
