//! A pair whose frames the host's kernel moves (vhost-net). We only tell it where the rings are.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::card::Card;
use super::relay::{Meaning, Relay};
use super::{QUEUE_SIZE, rx_of, tx_of};
use crate::backend::Tap;
use crate::backend::vhost::{Ring, VhostNet};
use crate::devices::front::QueueServer;
use crate::memory::Ram;
use crate::virtio::{QueueResources, QueueState, Virtqueue};

/// A running ring.
struct Running {
    ram: Ram,
    /// Where its used index is.
    used_index: GuestAddress,
}

/// Serves pair number `pair`.
pub struct VhostPair {
    vhost: VhostNet,
    tap: Arc<Tap>,
    card: Arc<Card>,
    relay: Arc<Relay>,
    queues: [(u16, u16); 2],
    running: [Option<Running>; 2],
}

impl VhostPair {
    pub fn new(pair: u16, vhost: VhostNet, tap: Arc<Tap>, card: Arc<Card>, relay: Arc<Relay>) -> Self {
        let queues = [(rx_of(pair), QUEUE_SIZE), (tx_of(pair), QUEUE_SIZE)];
        Self { vhost, tap, card, relay, queues, running: [None, None] }
    }

    fn ring_of(&self, index: u16) -> Option<usize> {
        self.queues.iter().position(|queue| queue.0 == index)
    }
}

impl QueueServer for VhostPair {
    fn queues(&self) -> &[(u16, u16)] {
        &self.queues
    }

    fn start(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()> {
        let ring = self.ring_of(index).ok_or(io::ErrorKind::InvalidInput)?;
        if self.running[ring].is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // What we refuse of other queues is refused here too.
        Virtqueue::new(index, QUEUE_SIZE, &resources, state)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        if self.running.iter().all(Option::is_none) {
            self.vhost.prepare(resources.features, &resources.ram)?;
        }
        if index == rx_of(0) {
            self.card.apply_offloads(resources.features)?;
        }
        let events = &resources.events;
        let error = self.relay.watch(index, Meaning::Broken(self.vhost.silencer(ring as u32)), events)?;
        let call = match events.interrupt_fd(index) {
            Some(call) => call,
            None => self.relay.watch(index, Meaning::Used, events)?,
        };
        let layout = resources.layout;
        let description = Ring {
            size: layout.size,
            descriptors: layout.descriptors,
            avail: layout.avail,
            used: layout.used,
            next_avail: state.unwrap_or_default().next_avail,
            kick: resources.kick.as_raw_fd(),
            call: call.as_raw_fd(),
            error: error.as_raw_fd(),
        };
        if let Err(error) = self.vhost.start(ring as u32, &description, self.tap.as_fd()) {
            self.relay.finish(index);
            return Err(error);
        }
        let used_index = GuestAddress(layout.used + 2);
        self.running[ring] = Some(Running { ram: resources.ram, used_index });
        // There may be buffers from before it listened.
        resources.kick.write(1)
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        let ring = self.ring_of(index)?;
        let running = self.running[ring].take()?;
        let stopped = self.vhost.stop(ring as u32);
        self.relay.finish(index);
        match stopped {
            Ok(next_avail) => {
                // Ours to read only from the ring. The driver may have written it meanwhile: to its own loss.
                let used = running.ram.load(running.used_index, Ordering::Acquire).map_or(next_avail, u16::from_le);
                Some(QueueState { next_avail, next_used: used })
            }
            Err(error) => {
                tracing::error!("vhost does not stop queue {index}: {error}");
                None
            }
        }
    }
}

impl Drop for VhostPair {
    fn drop(&mut self) {
        for (index, _) in self.queues {
            self.stop(index);
        }
    }
}
