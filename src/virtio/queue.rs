//! A split virtqueue as a device uses it: chains come out as checked host buffers, used entries go in.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::device::{DeviceEvents, QueueResources, QueueState};
use super::feature;
use crate::memory::{IoBuf, IoBufError, Ram};

/// A rule of the ring that the driver broke. The queue is unusable until it is reset.
#[derive(Debug, Error)]
pub enum RingError {
    #[error("queue of {0} entries: the size is not a power of two up to the maximum")]
    Size(u16),
    #[error("the rings are misaligned or not in guest memory")]
    Layout,
    #[error("the ring's indices are out of step: {0}")]
    Index(virtio_queue::Error),
    #[error("a descriptor chain has a loop, a bad index, a bad table or no buffer")]
    Chain,
    #[error("a descriptor chain has a readable buffer after a writable one")]
    Order,
    #[error(transparent)]
    Buffer(#[from] IoBufError),
}

/// One request: the driver's readable buffers, then its writable ones. Filled by [`Virtqueue::pop`], reused.
pub struct Chain {
    pub head: u16,
    pub readable: IoBuf,
    pub writable: IoBuf,
}

impl Chain {
    #[must_use]
    pub fn new(ram: &Ram) -> Self {
        Self { head: 0, readable: IoBuf::new(ram.clone()), writable: IoBuf::new(ram.clone()) }
    }
}

/// A running queue.
pub struct Virtqueue {
    queue: Queue,
    ram: Ram,
    index: u16,
    events: Arc<dyn DeviceEvents>,
}

impl Virtqueue {
    /// Checks the layout and takes up the queue where `state` left it.
    pub fn new(
        index: u16,
        max_size: u16,
        resources: &QueueResources,
        state: Option<QueueState>,
    ) -> Result<Self, RingError> {
        let layout = resources.layout;
        let mut queue = Queue::new(max_size).map_err(|_| RingError::Size(max_size))?;
        queue.try_set_size(layout.size).map_err(|_| RingError::Size(layout.size))?;
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors)).map_err(|_| RingError::Layout)?;
        queue.try_set_avail_ring_address(GuestAddress(layout.avail)).map_err(|_| RingError::Layout)?;
        queue.try_set_used_ring_address(GuestAddress(layout.used)).map_err(|_| RingError::Layout)?;
        queue.set_event_idx(resources.features & feature::EVENT_IDX != 0);
        let state = state.unwrap_or_default();
        queue.set_next_avail(state.next_avail);
        queue.set_next_used(state.next_used);
        queue.set_ready(true);
        if !queue.is_valid(&*resources.ram) {
            return Err(RingError::Layout);
        }
        Ok(Self { queue, ram: resources.ram.clone(), index, events: resources.events.clone() })
    }

    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Where the queue stands, to be taken up later.
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Takes the next available chain into `chain`; `false` when there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        chain.readable.clear();
        chain.writable.clear();
        let size = usize::from(self.queue.size());
        let mut available = self.queue.iter(&*self.ram).map_err(RingError::Index)?;
        let Some(descriptors) = available.next() else { return Ok(false) };
        chain.head = descriptors.head_index();
        let mut count = 0;
        // The iterator ends without a word at a bad link; a chain is whole when its last descriptor has no next.
        let mut whole = false;
        for descriptor in descriptors {
            whole = !descriptor.has_next();
            count += 1;
            if count > size {
                return Err(RingError::Chain);
            }
            if descriptor.is_write_only() {
                chain.writable.push(descriptor.addr().0, descriptor.len())?;
            } else if chain.writable.segments() > 0 {
                return Err(RingError::Order);
            } else {
                chain.readable.push(descriptor.addr().0, descriptor.len())?;
            }
        }
        if whole { Ok(true) } else { Err(RingError::Chain) }
    }

    /// Gives the chain popped last back to the ring, to be popped again.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail((Wrapping(self.queue.next_avail()) - Wrapping(1)).0);
    }

    /// Is there anything to pop?
    #[must_use]
    pub fn has_available(&self) -> bool {
        // `Acquire` pairs with the driver's publication of the ring entries.
        self.queue.avail_idx(&*self.ram, Ordering::Acquire).is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Hands a chain back with `written` bytes in its writable buffers.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.queue.add_used(&*self.ram, head, written).map_err(RingError::Index)
    }

    /// Interrupts the driver if it asked to hear of what was used since the last interrupt.
    pub fn interrupt(&mut self) {
        // The rings were checked when the queue started: an error here means they are gone, and nobody listens.
        if self.queue.needs_notification(&*self.ram).unwrap_or(false) {
            self.events.queue_interrupt(self.index);
        }
    }

    /// Asks the driver not to kick while the device is at work anyway.
    pub fn disable_kicks(&mut self) {
        let _ = self.queue.disable_notification(&*self.ram);
    }

    /// Asks for kicks again; `true` if buffers came meanwhile and have to be looked at first.
    pub fn enable_kicks(&mut self) -> bool {
        self.queue.enable_notification(&*self.ram).unwrap_or(false)
    }

    /// Reports a broken ring to the driver. The caller stops using the queue.
    pub fn broken(&self, error: &RingError) {
        self.events.needs_reset(&format_args!("queue {}: {error}", self.index));
    }
}
