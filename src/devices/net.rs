//! virtio-net over a tap (virtio 1.2, section 5.1): one queue each way, frames moved between guest memory and
//! the tap without a copy of ours.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_net as net;
use zerocopy::{Immutable, IntoBytes, little_endian as le};

use super::front::Front;
use super::worker::{Engine, Served, Source, Turn, Worker, serve_each};
use crate::backend::tap::HEADER_BYTES;
use crate::backend::{Offloads, Tap};
use crate::config::MacAddress;
use crate::memory::{IoBuf, Ram};
use crate::observe::guest_warning;
use crate::virtio::{Chain, DeviceKind, RingError, Virtqueue, feature};

/// The queue that receives, and the one that sends.
const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE_SIZE: u16 = 256;

/// Where the header counts the buffers that a received packet takes (`num_buffers`).
const NUM_BUFFERS_AT: usize = 10;

const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;

/// The longest packet with its header: what a segment of 64 KiB comes to (section 5.1.6.3.1).
const MAX_PACKET: usize = 65550 + HEADER_BYTES;
const MIN_PACKET: usize = ETHERNET_HEADER + HEADER_BYTES;

/// Most host vectors that receive buffers may take: a chain more and `readv` would not see them all.
const MAX_VECTORS: usize = libc::UIO_MAXIOV as usize - 2 * QUEUE_SIZE as usize;

/// The smallest MTU that may be announced (section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// `struct virtio_net_config`, to the end of what we offer.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: le::U16,
    max_virtqueue_pairs: le::U16,
    mtu: le::U16,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct NetOptions {
    /// A random one, locally administered, when absent.
    pub mac: Option<MacAddress>,
    /// In bytes, without the Ethernet header; the tap's when absent.
    pub mtu: Option<u16>,
}

pub fn device(name: String, tap: Tap, options: NetOptions) -> io::Result<Front> {
    let mac = match options.mac {
        Some(mac) => mac.0,
        None => random_mac()?,
    };
    let mtu = options.mtu.unwrap_or(tap.mtu());
    // A tap takes any packet with a header, whatever the host then has to do to it.
    let mut features = feature::RING
        | 1 << net::VIRTIO_NET_F_MAC
        | 1 << net::VIRTIO_NET_F_STATUS
        | 1 << net::VIRTIO_NET_F_MRG_RXBUF
        | 1 << net::VIRTIO_NET_F_CSUM
        | 1 << net::VIRTIO_NET_F_HOST_TSO4
        | 1 << net::VIRTIO_NET_F_HOST_TSO6
        | 1 << net::VIRTIO_NET_F_HOST_ECN;
    if tap.can_offload() {
        features |= 1 << net::VIRTIO_NET_F_GUEST_CSUM
            | 1 << net::VIRTIO_NET_F_GUEST_TSO4
            | 1 << net::VIRTIO_NET_F_GUEST_TSO6
            | 1 << net::VIRTIO_NET_F_GUEST_ECN;
    }
    if mtu >= MIN_MTU {
        features |= 1 << net::VIRTIO_NET_F_MTU;
    }
    let config = Config {
        mac,
        status: (net::VIRTIO_NET_S_LINK_UP as u16).into(),
        max_virtqueue_pairs: 1.into(),
        mtu: mtu.into(),
    };
    let engine = NetEngine::new(name.clone(), tap, mtu);
    let worker = Worker::spawn(&name, Box::new(engine), &[(RX, QUEUE_SIZE), (TX, QUEUE_SIZE)])?;
    Ok(Front::new(DeviceKind::Net, name, features, config.as_bytes().to_vec(), vec![Box::new(worker)]))
}

fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom(&mut mac, GetRandomFlags::empty())?;
    // Locally administered, and one station's own.
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

/// Receive buffers taken from the ring before it is known how many of them the next packet needs.
struct Held {
    buffers: IoBuf,
    /// The head and length in bytes of each chain in `buffers`.
    chains: VecDeque<(u16, usize)>,
    /// May a packet take several chains?
    mergeable: bool,
    /// The longest packet to be expected.
    max_packet: usize,
}

impl Held {
    /// Takes chains until any packet fits; `false` if the driver has to make more available first.
    ///
    /// A driver whose whole ring is too small for the longest packet still gets those that fit.
    fn gather(&mut self, queue: &mut Virtqueue, chain: &mut Chain) -> Result<bool, RingError> {
        while !self.suffices(queue.size()) {
            if !queue.pop(chain)? {
                return Ok(false);
            }
            self.chains.push_back((chain.head, chain.writable.len()));
            self.buffers.append(&chain.writable);
        }
        Ok(true)
    }

    fn suffices(&self, queue_size: u16) -> bool {
        match self.chains.len() {
            0 => false,
            _ if !self.mergeable => true,
            n => {
                self.buffers.len() >= self.max_packet || n >= queue_size.into() || self.buffers.segments() > MAX_VECTORS
            }
        }
    }

    /// Hands over the chains that hold a packet of `len` bytes, all at once.
    fn deliver(&mut self, queue: &mut Virtqueue, len: usize) -> Result<(), RingError> {
        let (mut left, mut count, mut bytes) = (len, 0u16, 0);
        while left > 0
            && let Some((head, room)) = self.chains.pop_front()
        {
            let written = left.min(room);
            queue.stage_used(head, written as u32)?;
            left -= written;
            count += 1;
            bytes += room;
        }
        self.buffers.copy_from_at(NUM_BUFFERS_AT, &count.to_le_bytes());
        self.buffers.trim_front(bytes);
        queue.publish_used()
    }
}

pub(super) struct NetEngine {
    name: String,
    tap: Tap,
    mtu: u16,
    held: Option<Held>,
    /// Packets that could not be passed on, in either direction.
    dropped: u64,
}

impl NetEngine {
    pub(super) fn new(name: String, tap: Tap, mtu: u16) -> Self {
        Self { name, tap, mtu, held: None, dropped: 0 }
    }

    fn receive(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        let Some(held) = &mut self.held else { return Ok(Served::NoWork) };
        while turn.another() {
            if !held.gather(queue, chain)? {
                return Ok(Served::NoBuffers);
            }
            match held.buffers.read_packet(&self.tap) {
                Ok(0) => return Ok(Served::NoWork),
                Ok(len) if (MIN_PACKET..=held.buffers.len()).contains(&len) => held.deliver(queue, len)?,
                Ok(len) => {
                    self.dropped += 1;
                    guest_warning!("{}: a packet of {len} bytes does not fit, {} dropped", self.name, self.dropped);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Served::NoWork),
                Err(error) => {
                    guest_warning!("{}: tap {} cannot be read: {error}", self.name, self.tap.name());
                    return Ok(Served::NoWork);
                }
            }
        }
        Ok(Served::TurnOver)
    }

    /// Writes one packet to the tap. What the tap refuses is lost, as on any network.
    fn send(&mut self, packet: &IoBuf) {
        let sent = if (MIN_PACKET..=MAX_PACKET).contains(&packet.len()) {
            packet.write_to(&self.tap)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        };
        if let Err(error) = sent {
            self.dropped += 1;
            let hint = if error.raw_os_error() == Some(libc::EIO) { " (is it up?)" } else { "" };
            guest_warning!(
                "{}: tap {} does not take a packet of {} bytes: {error}{hint}, {} dropped",
                self.name,
                self.tap.name(),
                packet.len(),
                self.dropped
            );
        }
    }
}

impl Engine for NetEngine {
    fn start(&mut self, index: u16, features: u64, ram: &Ram) -> io::Result<()> {
        if index != RX {
            return Ok(());
        }
        let has = |bit: u32| features & 1 << bit != 0;
        let offloads = Offloads {
            checksum: has(net::VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(net::VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(net::VIRTIO_NET_F_GUEST_TSO6),
            ecn: has(net::VIRTIO_NET_F_GUEST_ECN),
        };
        self.tap.set_offloads(offloads)?;
        let longest_frame = ETHERNET_HEADER + VLAN_TAG + usize::from(self.mtu.max(self.tap.mtu()));
        self.held = Some(Held {
            buffers: IoBuf::new(ram.clone()),
            chains: VecDeque::with_capacity(QUEUE_SIZE.into()),
            mergeable: has(net::VIRTIO_NET_F_MRG_RXBUF),
            max_packet: if offloads.tso4 || offloads.tso6 { MAX_PACKET } else { HEADER_BYTES + longest_frame },
        });
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        match queue.index() {
            RX => self.receive(queue, chain, turn),
            _ => serve_each(queue, chain, turn, |chain, _| {
                self.send(&chain.readable);
                0
            }),
        }
    }

    fn stop(&mut self, queue: &mut Virtqueue) {
        if queue.index() == RX
            && let Some(held) = self.held.take()
        {
            for _ in held.chains {
                queue.undo_pop();
            }
        }
    }

    fn source(&self) -> Option<Source> {
        Some(Source { queue: RX, fd: self.tap.as_fd().as_raw_fd(), always: false })
    }
}
