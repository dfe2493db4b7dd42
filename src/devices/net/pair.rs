//! A pair of queues, one each way: frames move between guest memory and the tap without a copy of ours.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::card::{Card, offloads};
use super::control::ControlEngine;
use super::held::Held;
use super::{ETHERNET_HEADER, NetLimiters, VLAN_TAG, frame_bytes, rx_of, tx_of};
use crate::backend::tap::HEADER_BYTES;
use crate::backend::{Limiter, Tap};
use crate::devices::worker::{Engine, Served, Source, Turn, serve_each};
use crate::memory::{IoBuf, Ram};
use crate::observe::guest_warning;
use crate::virtio::{Chain, RingError, Virtqueue};

/// The longest packet with its header: what a segment of 64 KiB comes to (section 5.1.6.3.1).
const MAX_PACKET: usize = 65550 + HEADER_BYTES;
const MIN_PACKET: usize = ETHERNET_HEADER + HEADER_BYTES;

/// Serves one pair; the first one serves the control queue as well, whose commands are too rare for a thread.
pub struct PairEngine {
    name: String,
    pair: u16,
    tap: Arc<Tap>,
    card: Arc<Card>,
    limiters: NetLimiters,
    control: Option<ControlEngine>,
    held: Option<Held>,
    /// The longest packet to be expected.
    max_packet: usize,
    /// Packets that could not be passed on, in either direction.
    dropped: u64,
}

impl PairEngine {
    pub fn new(name: String, pair: u16, tap: Arc<Tap>, card: Arc<Card>, limiters: NetLimiters) -> Self {
        let control = (pair == 0).then(|| ControlEngine::new(name.clone(), card.clone()));
        Self { name, pair, tap, card, limiters, control, held: None, max_packet: MAX_PACKET, dropped: 0 }
    }

    fn receives(&self, index: u16) -> bool {
        index == rx_of(self.pair)
    }

    fn receive(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        let Some(held) = &mut self.held else { return Ok(Served::NoWork) };
        while turn.another() {
            if !held.gather(self.max_packet, queue, chain)? {
                return Ok(Served::NoBuffers);
            }
            // Before it is read: what has to wait does so in the tap.
            if let Err(wait) = self.limiters.rx.check() {
                return Ok(Served::Throttled(wait));
            }
            match held.buffers.read_packet(&*self.tap) {
                Ok(0) => return Ok(Served::NoWork),
                Ok(len) if (MIN_PACKET..=held.buffers.len()).contains(&len) => {
                    self.limiters.rx.charge(frame_bytes(len));
                    held.deliver(queue, len)?;
                }
                Ok(len) => {
                    self.dropped += 1;
                    self.limiters.rx.traffic.failed.count();
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
            self.limiters.tx.traffic.failed.count();
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
        self.max_packet = if segments { MAX_PACKET } else { HEADER_BYTES + longest_frame };
        self.held = Some(Held::new(ram, features));
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        if self.receives(queue.index()) {
            return self.receive(queue, chain, turn);
        }
        match &mut self.control {
            Some(control) if queue.index() != tx_of(self.pair) => control.serve(queue, chain, turn),
            _ => serve_each(queue, chain, turn, |chain, _| {
                self.limiters.tx.take(frame_bytes(chain.readable.len()))?;
                self.send(&chain.readable);
                Ok(0)
            }),
        }
    }

    fn stop(&mut self, queue: &mut Virtqueue) {
        if self.receives(queue.index())
            && let Some(held) = self.held.take()
        {
            held.release(queue);
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { queue: rx_of(self.pair), fd: self.tap.as_fd().as_raw_fd(), events: EventSet::IN, always: false }]
    }

    fn limiters(&self) -> Vec<Arc<Limiter>> {
        self.limiters.both()
    }
}
