//! A pair of queues, one each way: frames move between guest memory and the tap without a copy of ours.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net as net;

use super::card::{Card, offloads};
use super::control::ControlEngine;
use super::{QUEUE_SIZE, rx_of, tx_of};
use crate::backend::Tap;
use crate::backend::tap::HEADER_BYTES;
use crate::devices::worker::{Engine, Served, Source, Turn, serve_each};
use crate::memory::{IoBuf, Ram};
use crate::observe::guest_warning;
use crate::virtio::{Chain, RingError, Virtqueue};

/// Where the header counts the buffers that a received packet takes (`num_buffers`).
const NUM_BUFFERS_AT: usize = 10;

const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;

/// The longest packet with its header: what a segment of 64 KiB comes to (section 5.1.6.3.1).
const MAX_PACKET: usize = 65550 + HEADER_BYTES;
const MIN_PACKET: usize = ETHERNET_HEADER + HEADER_BYTES;

/// Most host vectors that receive buffers may take: a chain more and `readv` would not see them all.
const MAX_VECTORS: usize = libc::UIO_MAXIOV as usize - 2 * QUEUE_SIZE as usize;

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

/// Serves one pair; the first one serves the control queue as well, whose commands are too rare for a thread.
pub struct PairEngine {
    name: String,
    pair: u16,
    tap: Arc<Tap>,
    card: Arc<Card>,
    control: Option<ControlEngine>,
    held: Option<Held>,
    /// Packets that could not be passed on, in either direction.
    dropped: u64,
}

impl PairEngine {
    pub fn new(name: String, pair: u16, tap: Arc<Tap>, card: Arc<Card>) -> Self {
        let control = (pair == 0).then(|| ControlEngine::new(name.clone(), card.clone()));
        Self { name, pair, tap, card, control, held: None, dropped: 0 }
    }

    fn receives(&self, index: u16) -> bool {
        index == rx_of(self.pair)
    }

    fn receive(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        let Some(held) = &mut self.held else { return Ok(Served::NoWork) };
        while turn.another() {
            if !held.gather(queue, chain)? {
                return Ok(Served::NoBuffers);
            }
            match held.buffers.read_packet(&*self.tap) {
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
            packet.write_to(&*self.tap)
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

impl Engine for PairEngine {
    fn start(&mut self, index: u16, features: u64, ram: &Ram) -> io::Result<()> {
        if !self.receives(index) {
            return match &mut self.control {
                Some(control) if index != tx_of(self.pair) => control.start(index, features, ram),
                _ => Ok(()),
            };
        }
        if self.pair == 0 {
            self.card.apply_offloads(features)?;
        }
        let longest_frame = ETHERNET_HEADER + VLAN_TAG + usize::from(self.card.mtu().max(self.tap.mtu()));
        // Whatever is chosen later is among these.
        let offloads = offloads(features);
        let segments = offloads.tso4 || offloads.tso6 || offloads.uso;
        self.held = Some(Held {
            buffers: IoBuf::new(ram.clone()),
            chains: VecDeque::with_capacity(QUEUE_SIZE.into()),
            mergeable: features & 1 << net::VIRTIO_NET_F_MRG_RXBUF != 0,
            max_packet: if segments { MAX_PACKET } else { HEADER_BYTES + longest_frame },
        });
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        if self.receives(queue.index()) {
            return self.receive(queue, chain, turn);
        }
        match &mut self.control {
            Some(control) if queue.index() != tx_of(self.pair) => control.serve(queue, chain, turn),
            _ => serve_each(queue, chain, turn, |chain, _| {
                self.send(&chain.readable);
                0
            }),
        }
    }

    fn stop(&mut self, queue: &mut Virtqueue) {
        if self.receives(queue.index())
            && let Some(held) = self.held.take()
        {
            for _ in held.chains {
                queue.undo_pop();
            }
        }
    }

    fn source(&self) -> Option<Source> {
        Some(Source { queue: rx_of(self.pair), fd: self.tap.as_fd().as_raw_fd(), always: false })
    }
}
