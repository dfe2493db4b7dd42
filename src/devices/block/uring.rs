//! The engine that has many requests in the host's hands at a time, through io_uring.
//!
//! What the host can do at once (a read of what is in its page cache, say) is done at once: that is faster than
//! any queue. Only what would have to wait goes into the ring, and the driver is told of what came back in one
//! batch, with one interrupt. What is rare, and what no ring makes faster, is left to [`SyncEngine`].

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::request::{Answer, Failure, Request};
use super::sync::SyncEngine;
use crate::backend::disk::uring::{Operation, Uring};
use crate::backend::limiter::{Limiter, Wait};
use crate::devices::worker::{Engine, Served, Source, Turn};
use crate::memory::Ram;
use crate::virtio::{Chain, RingError, Virtqueue};

/// A request whose transfer is in flight.
pub struct Pending {
    head: u16,
    answer: Answer,
    /// What a read wrote when all is well.
    written: usize,
    /// A change of the disk that has to last before it is answered.
    then_flush: bool,
}

pub struct UringEngine {
    index: u16,
    /// Dropped first: it waits for what is in flight.
    ring: Uring<Pending>,
    /// For all that does not go into the ring.
    sync: SyncEngine,
    /// Is what the host can do at once done at once?
    at_once: bool,
    broken: bool,
}

impl UringEngine {
    /// An engine for queue `index`.
    pub fn new(index: u16, ring: Uring<Pending>, sync: SyncEngine, at_once: bool) -> Self {
        Self { index, ring, sync, at_once, broken: false }
    }

    /// Begins what the chain asks. If it is done already, returns how many bytes were written in front.
    fn request(&mut self, chain: &mut Chain, queue: &mut Virtqueue) -> Result<Option<u32>, Wait> {
        let Some(answer) = self.sync.answer(chain) else { return Ok(Some(0)) };
        let request = Request::take(chain, &self.sync.disk);
        self.sync.admit(&request, chain)?;
        let done = match request.and_then(|request| self.execute(request, answer, chain, queue)) {
            Ok(None) => return Ok(None),
            Ok(Some(written)) => Ok(written),
            Err(failure) => Err(failure),
        };
        Ok(Some(self.sync.give(answer, queue.ram(), &done)))
    }

    /// `None` if the answer comes later.
    fn execute(
        &mut self,
        request: Request,
        answer: Answer,
        chain: &mut Chain,
        queue: &mut Virtqueue,
    ) -> Result<Option<usize>, Failure> {
        let disk = &self.sync.disk;
        let mut pending = Pending { head: chain.head, answer, written: 0, then_flush: false };
        match request {
            Request::Read { offset } => {
                pending.written = chain.writable.len();
                let done = if self.at_once { disk.read_ready(&mut chain.writable, offset)? } else { 0 };
                if chain.writable.is_empty() {
                    return Ok(Some(pending.written));
                }
                self.ring.begin(Operation::Read, &mut chain.writable, offset + done, pending);
                Ok(None)
            }
            Request::Write { offset } => {
                pending.then_flush = self.sync.write_through;
                let done = if self.at_once { disk.write_ready(&mut chain.readable, offset)? } else { 0 };
                if !chain.readable.is_empty() {
                    if disk.tells_ready_writes() || !self.at_once {
                        self.ring.begin(Operation::Write, &mut chain.readable, offset + done, pending);
                        return Ok(None);
                    }
                    // Most file systems cannot tell. A copy into the page cache is then still much faster than
                    // the ring, which hands it to a thread of the kernel's.
                    queue.interrupt();
                    disk.write(&mut chain.readable, offset + done, None)?;
                }
                if pending.then_flush {
                    pending.then_flush = false;
                    self.ring.begin(Operation::Flush, &mut chain.readable, 0, pending);
                    return Ok(None);
                }
                Ok(Some(0))
            }
            Request::Flush if self.sync.flushes() => {
                // It has to cover what was answered before, and that is in the page cache already.
                chain.readable.clear();
                self.ring.begin(Operation::Flush, &mut chain.readable, 0, pending);
                Ok(None)
            }
            _ => self.sync.execute(request, chain, queue).map(Some),
        }
    }

    /// Answers what has come back.
    fn reap(&mut self, queue: &mut Virtqueue) -> Result<(), RingError> {
        let mut any = false;
        while let Some((mut pending, result)) = self.ring.complete() {
            if result.is_ok() && pending.then_flush {
                pending.then_flush = false;
                let mut nothing = crate::memory::IoBuf::new(queue.ram().clone());
                self.ring.begin(Operation::Flush, &mut nothing, 0, pending);
                continue;
            }
            let result = result.map(|()| pending.written).map_err(Failure::from);
            let written = self.sync.give(pending.answer, queue.ram(), &result);
            queue.stage_used(pending.head, written)?;
            any = true;
        }
        if any { queue.publish_used() } else { Ok(()) }
    }

    fn serve_until(
        &mut self,
        queue: &mut Virtqueue,
        chain: &mut Chain,
        turn: &mut Turn<'_>,
    ) -> Result<Served, RingError> {
        self.reap(queue)?;
        loop {
            if !self.ring.has_room() {
                self.ring.submit();
                self.reap(queue)?;
                if !self.ring.has_room() {
                    return Ok(Served::NoWork);
                }
            }
            if !turn.another() {
                return Ok(Served::TurnOver);
            }
            if !queue.pop(chain)? {
                return Ok(Served::NoBuffers);
            }
            match self.request(chain, queue) {
                Ok(Some(written)) => queue.push_used(chain.head, written)?,
                Ok(None) => {}
                Err(wait) => {
                    queue.undo_pop();
                    return Ok(Served::Throttled(wait));
                }
            }
        }
    }
}

impl Engine for UringEngine {
    fn start(&mut self, index: u16, features: u64, ram: &Ram) -> io::Result<()> {
        self.broken = false;
        self.sync.start(index, features, ram)
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        let served = self.serve_until(queue, chain, turn).and_then(|served| {
            // All at once, and then what has come back by now.
            self.ring.submit();
            self.reap(queue)?;
            self.ring.submit();
            Ok(served)
        });
        self.broken = served.is_err();
        served
    }

    /// Waits for all that is in flight, however long the host takes: the kernel may write to guest memory until then.
    fn stop(&mut self, queue: &mut Virtqueue) {
        while self.ring.in_flight() > 0 {
            self.ring.wait();
            if self.broken {
                while self.ring.complete().is_some() {}
            } else if self.reap(queue).is_err() {
                self.broken = true;
            }
        }
        self.ring.release();
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { queue: self.index, fd: self.ring.fd(), events: EventSet::IN, always: true }]
    }

    fn limiters(&self) -> Vec<Arc<Limiter>> {
        self.sync.limiters()
    }
}
