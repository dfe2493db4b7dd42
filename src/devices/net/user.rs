//! A card whose frames go to passt. Nobody computes checksums or cuts segments on the way, so the guest does both
//! itself; large packets make up for it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::card::Card;
use super::control::ControlEngine;
use super::held::Held;
use super::{ETHERNET_HEADER, NetLimiters, frame_bytes, rx_of, tx_of};
use crate::backend::frames::{FrameError, MAX_FRAME};
use crate::backend::tap::HEADER_BYTES;
use crate::backend::{Limiter, Passt};
use crate::devices::worker::{Engine, Served, Source, Turn};
use crate::memory::{IoBuf, Ram};
use crate::observe::guest_warning;
use crate::virtio::{Chain, RingError, Virtqueue};

/// A frame that the guest sends, with its header.
const PACKET: std::ops::RangeInclusive<usize> = HEADER_BYTES + ETHERNET_HEADER..=HEADER_BYTES + MAX_FRAME;

/// Serves all queues of the card.
pub struct UserEngine {
    name: String,
    passt: Passt,
    card: Arc<Card>,
    limiters: NetLimiters,
    control: ControlEngine,
    held: Option<Held>,
    /// passt is gone.
    down: bool,
    /// Packets that could not be passed on, in either direction.
    dropped: u64,
}

impl UserEngine {
    pub fn new(name: String, passt: Passt, card: Arc<Card>, limiters: NetLimiters) -> Self {
        let control = ControlEngine::new(name.clone(), card.clone());
        Self { name, passt, card, limiters, control, held: None, down: false, dropped: 0 }
    }

    fn receive(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        let Some(held) = &mut self.held else { return Ok(Served::NoWork) };
        while turn.another() {
            if self.down {
                return Ok(Served::NoWork);
            }
            // First, so that nothing is read from passt that would have to wait here.
            if !held.gather(1, queue, chain)? {
                return Ok(Served::NoBuffers);
            }
            let frame = match self.passt.frames.peek() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Served::NoWork),
                Err(error) => {
                    self.lose(&error, queue);
                    return Ok(Served::NoWork);
                }
            };
            let len = HEADER_BYTES + frame.len();
            if PACKET.contains(&len) {
                if !held.gather(len, queue, chain)? {
                    return Ok(Served::NoBuffers);
                }
                if len <= held.buffers.len() {
                    if let Err(wait) = self.limiters.rx.take(frame_bytes(len)) {
                        return Ok(Served::Throttled(wait));
                    }
                    held.buffers.copy_from(&[0; HEADER_BYTES]);
                    held.buffers.copy_from_at(HEADER_BYTES, frame);
                    self.passt.frames.consume();
                    held.deliver(queue, len)?;
                    continue;
                }
            }
            self.passt.frames.consume();
            self.dropped += 1;
            self.limiters.rx.traffic.failed.count();
            guest_warning!("{}: a packet of {len} bytes does not fit, {} dropped", self.name, self.dropped);
        }
        Ok(Served::TurnOver)
    }

    fn send(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        while turn.another() {
            if !self.down {
                match self.passt.frames.flush() {
                    Ok(true) => {}
                    // Not dropped: the guest's TCP would slow down for nothing.
                    Ok(false) => return Ok(Served::NoWork),
                    Err(error) => self.lose(&error, queue),
                }
            }
            if !queue.pop(chain)? {
                return Ok(Served::NoBuffers);
            }
            if !self.down {
                if let Err(wait) = self.limiters.tx.take(frame_bytes(chain.readable.len())) {
                    queue.undo_pop();
                    return Ok(Served::Throttled(wait));
                }
                if let Err(error) = self.send_packet(&mut chain.readable) {
                    self.lose(&error, queue);
                }
            }
            queue.push_used(chain.head, 0)?;
        }
        Ok(Served::TurnOver)
    }

    fn send_packet(&mut self, packet: &mut IoBuf) -> Result<(), FrameError> {
        if !PACKET.contains(&packet.len()) {
            self.dropped += 1;
            self.limiters.tx.traffic.failed.count();
            guest_warning!("{}: no packet has {} bytes, {} dropped", self.name, packet.len(), self.dropped);
            return Ok(());
        }
        // It says nothing: none of what could be in it was offered.
        packet.trim_front(HEADER_BYTES);
        self.passt.frames.send(packet)
    }

    /// The cable is out from now on.
    fn lose(&mut self, error: &FrameError, queue: &Virtqueue) {
        tracing::error!("{}: the user network is gone: {}", self.name, self.passt.end(error));
        self.down = true;
        self.card.set_link_down();
        queue.config_changed();
    }
}

impl Engine for UserEngine {
    fn start(&mut self, index: u16, features: u64, ram: &Ram) -> io::Result<()> {
        if index == rx_of(0) {
            self.held = Some(Held::new(ram, features));
        } else if index != tx_of(0) {
            self.control.start(index, features, ram)?;
        }
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        match queue.index() {
            index if index == rx_of(0) => self.receive(queue, chain, turn),
            index if index == tx_of(0) => self.send(queue, chain, turn),
            _ => self.control.serve(queue, chain, turn),
        }
    }

    fn stop(&mut self, queue: &mut Virtqueue) {
        if queue.index() == rx_of(0)
            && let Some(held) = self.held.take()
        {
            held.release(queue);
        }
    }

    fn sources(&self) -> Vec<Source> {
        let frames = &self.passt.frames;
        vec![
            Source { queue: rx_of(0), fd: frames.reading().as_raw_fd(), events: EventSet::IN, always: false },
            Source { queue: tx_of(0), fd: frames.writing().as_raw_fd(), events: EventSet::OUT, always: false },
        ]
    }

    fn limiters(&self) -> Vec<Arc<Limiter>> {
        self.limiters.both()
    }
}
