//! A split virtqueue as a device uses it: chains come out as checked host buffers, used entries go in.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::device::{DeviceEvents, QueueLayout, QueueResources, QueueState};
use super::feature;
use crate::memory::{IoBuf, IoBufError, Ram};

/// The driver's wish not to be interrupted, when `EVENT_IDX` was not negotiated.
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A rule of the ring that the driver broke. The queue is unusable until it is reset.
#[derive(Debug, Error)]
pub enum RingError {
    #[error("queue of {0} entries: the size is not a power of two up to the maximum")]
    Size(u16),
    #[error("the rings are misaligned or not in guest memory")]
    Layout,
    #[error("the ring's indices are out of step: {0}")]
    Index(virtio_queue::Error),
    #[error("a used entry could not be written")]
    Used,
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
    /// Used entries written but not yet published.
    staged: u16,
    /// `next_used` when an interrupt was last considered.
    announced: u16,
}

/// A queue of that layout, at its beginning.
fn checked(max_size: u16, layout: &QueueLayout, ram: &Ram) -> Result<Queue, RingError> {
    let mut queue = Queue::new(max_size).map_err(|_| RingError::Size(max_size))?;
    queue.try_set_size(layout.size).map_err(|_| RingError::Size(layout.size))?;
    queue.try_set_desc_table_address(GuestAddress(layout.descriptors)).map_err(|_| RingError::Layout)?;
    queue.try_set_avail_ring_address(GuestAddress(layout.avail)).map_err(|_| RingError::Layout)?;
    queue.try_set_used_ring_address(GuestAddress(layout.used)).map_err(|_| RingError::Layout)?;
    queue.set_ready(true);
    if queue.is_valid(&**ram) { Ok(queue) } else { Err(RingError::Layout) }
}

impl Virtqueue {
    /// Could there be a queue of that layout?
    pub fn check(max_size: u16, layout: &QueueLayout, ram: &Ram) -> Result<(), RingError> {
        checked(max_size, layout, ram).map(drop)
    }

    /// Checks the layout and takes up the queue where `state` left it.
    pub fn new(
        index: u16,
        max_size: u16,
        resources: &QueueResources,
        state: Option<QueueState>,
    ) -> Result<Self, RingError> {
        let mut queue = checked(max_size, &resources.layout, &resources.ram)?;
        queue.set_event_idx(resources.features & feature::EVENT_IDX != 0);
        let state = state.unwrap_or_default();
        queue.set_next_avail(state.next_avail);
        queue.set_next_used(state.next_used);
        Ok(Self {
            queue,
            ram: resources.ram.clone(),
            index,
            events: resources.events.clone(),
            staged: 0,
            announced: state.next_used,
        })
    }

    /// Which of the device's queues this is.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
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
        self.stage_used(head, written)?;
        self.publish_used()
    }

    /// Writes a used entry that the driver does not see before [`Self::publish_used`]. At most one per chain
    /// popped.
    pub fn stage_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let slot = (Wrapping(self.queue.next_used()) + Wrapping(self.staged)).0 % self.queue.size();
        let addr = self.queue.used_ring() + 4 + 8 * u64::from(slot);
        let entry = u64::from(head) | u64::from(written) << 32;
        self.ram.write_obj(entry.to_le(), GuestAddress(addr)).map_err(|_| RingError::Used)?;
        self.staged += 1;
        Ok(())
    }

    /// Shows the driver all staged entries at once, as it expects of a packet in several chains.
    pub fn publish_used(&mut self) -> Result<(), RingError> {
        let next = (Wrapping(self.queue.next_used()) + Wrapping(std::mem::take(&mut self.staged))).0;
        self.queue.set_next_used(next);
        // `Release` makes the entries visible before the index.
        self.ram
            .store(next.to_le(), GuestAddress(self.queue.used_ring() + 2), Ordering::Release)
            .map_err(|_| RingError::Used)
    }

    /// Were entries published since the last [`Self::interrupt`]?
    #[must_use]
    pub fn unannounced(&self) -> bool {
        self.announced != self.queue.next_used()
    }

    /// Interrupts the driver if there are used entries it has not been told of and wants to hear about.
    pub fn interrupt(&mut self) {
        let (used, before) = (Wrapping(self.queue.next_used()), Wrapping(self.announced));
        if used == before {
            return;
        }
        self.announced = used.0;
        // The driver publishes its wish and then looks at the used index; we go the other way. The fence makes
        // sure that one of us sees what the other wrote.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            // Did `used_event` lie among the entries that are new? (virtio 1.2, section 2.7.10)
            self.avail_field(4 + 2 * u64::from(self.queue.size()))
                .is_some_and(|event| used - Wrapping(event) - Wrapping(1) < used - before)
        } else {
            self.avail_field(0).is_some_and(|flags| flags & AVAIL_F_NO_INTERRUPT == 0)
        };
        if wanted {
            self.events.queue_interrupt(self.index);
        }
    }

    /// A 16-bit field of the available ring. The ring was checked when the queue started: `None` means that
    /// its memory is gone, and nobody listens.
    fn avail_field(&self, offset: u64) -> Option<u16> {
        self.ram.load(GuestAddress(self.queue.avail_ring() + offset), Ordering::Relaxed).ok().map(u16::from_le)
    }

    /// Asks the driver not to kick while the device is at work anyway.
    pub fn disable_kicks(&mut self) {
        let _ = self.queue.disable_notification(&*self.ram);
    }

    /// Asks for kicks again; `true` if buffers came meanwhile and have to be looked at first.
    pub fn enable_kicks(&mut self) -> bool {
        self.queue.enable_notification(&*self.ram).unwrap_or(false)
    }

    /// Tells the driver that the device's configuration space has changed.
    pub fn config_changed(&self) {
        self.events.config_changed();
    }

    /// Reports a queue that cannot go on to the driver. The caller stops using the queue.
    pub fn broken(&self, error: &dyn std::fmt::Display) {
        self.events.needs_reset(&format_args!("queue {}: {error}", self.index));
    }
}
