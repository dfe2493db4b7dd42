//! Receive buffers on their way from the driver to a packet.

use std::collections::VecDeque;

use virtio_bindings::virtio_net as net;

use super::QUEUE_SIZE;
use crate::memory::{IoBuf, Ram};
use crate::virtio::{Chain, RingError, Virtqueue};

/// Where the header counts the buffers that a received packet takes (`num_buffers`).
const NUM_BUFFERS_AT: usize = 10;

/// Most host vectors that receive buffers may take: a chain more and `readv` would not see them all.
const MAX_VECTORS: usize = libc::UIO_MAXIOV as usize - 2 * QUEUE_SIZE as usize;

/// Receive buffers taken from the ring before it is known how many of them the next packet needs.
pub struct Held {
    pub buffers: IoBuf,
    /// The head and length in bytes of each chain in `buffers`.
    chains: VecDeque<(u16, usize)>,
    /// May a packet take several chains?
    mergeable: bool,
}

impl Held {
    pub fn new(ram: &Ram, features: u64) -> Self {
        Self {
            buffers: IoBuf::new(ram.clone()),
            chains: VecDeque::with_capacity(QUEUE_SIZE.into()),
            mergeable: features & 1 << net::VIRTIO_NET_F_MRG_RXBUF != 0,
        }
    }

    /// Takes chains until a packet of `len` bytes fits; `false` if the driver has to make more available first.
    ///
    /// A driver whose whole ring is too small for that still gets packets that fit.
    pub fn gather(&mut self, len: usize, queue: &mut Virtqueue, chain: &mut Chain) -> Result<bool, RingError> {
        while !self.suffices(len, queue.size()) {
            if !queue.pop(chain)? {
                return Ok(false);
            }
            self.chains.push_back((chain.head, chain.writable.len()));
            self.buffers.append(&chain.writable);
        }
        Ok(true)
    }

    fn suffices(&self, len: usize, queue_size: u16) -> bool {
        match self.chains.len() {
            0 => false,
            _ if !self.mergeable => true,
            n => self.buffers.len() >= len || n >= queue_size.into() || self.buffers.segments() > MAX_VECTORS,
        }
    }

    /// Hands over the chains that hold a packet of `len` bytes, all at once.
    pub fn deliver(&mut self, queue: &mut Virtqueue, len: usize) -> Result<(), RingError> {
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

    /// Gives all chains back to the ring.
    pub fn release(self, queue: &mut Virtqueue) {
        for _ in self.chains {
            queue.undo_pop();
        }
    }
}
