//! The engine that does one request after the other, and waits for the disk where it has to.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;

use super::ID_BYTES;
use super::request::{Answer, Failure, Ranges, Request};
use crate::backend::Disk;
use crate::backend::limiter::{Limiter, Wait};
use crate::config::CacheMode;
use crate::devices::worker::{Engine, Served, Turn, serve_each};
use crate::memory::Ram;
use crate::observe::guest_warning;
use crate::virtio::{Chain, RingError, Virtqueue};

pub struct SyncEngine {
    pub name: String,
    pub disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    cache: CacheMode,
    pub limiter: Arc<Limiter>,
    /// The driver does not flush, so every write has to last by itself.
    pub write_through: bool,
}

impl SyncEngine {
    pub fn new(name: String, disk: Arc<Disk>, id: [u8; ID_BYTES], cache: CacheMode, limiter: Arc<Limiter>) -> Self {
        Self { name, disk, id, cache, limiter, write_through: false }
    }

    /// Does a flush mean anything?
    pub fn flushes(&self) -> bool {
        self.cache == CacheMode::Writeback
    }

    /// Does what the chain asks and answers it; returns how many bytes were written in front.
    fn request(&self, chain: &mut Chain, queue: &mut Virtqueue) -> Result<u32, Wait> {
        let Some(answer) = self.answer(chain) else { return Ok(0) };
        let request = Request::take(chain, &self.disk);
        self.admit(&request, chain)?;
        let result = request.and_then(|request| self.execute(request, chain, queue));
        Ok(self.give(answer, queue.ram(), &result))
    }

    /// Lets a request pass that is within the limits. One that will be refused is an operation, too.
    pub fn admit(&self, request: &Result<Request, Failure>, chain: &Chain) -> Result<(), Wait> {
        let traffic = &self.limiter.traffic;
        match request {
            Ok(Request::Read { .. }) => self.limiter.take(chain.writable.len() as u64)?,
            Ok(Request::Write { .. }) => {
                let bytes = chain.readable.len() as u64;
                self.limiter.take(bytes)?;
                traffic.writes.count();
                traffic.written_bytes.add(bytes);
            }
            Ok(Request::Flush) => {
                self.limiter.take(0)?;
                traffic.flushes.count();
            }
            _ => self.limiter.take(0)?,
        }
        Ok(())
    }

    /// Where the chain's answer goes.
    pub fn answer(&self, chain: &mut Chain) -> Option<Answer> {
        let answer = Answer::take(chain);
        if answer.is_none() {
            guest_warning!("{}: a request without a status byte", self.name);
        }
        answer
    }

    /// Answers a request, see [`Answer::give`]; tells the log of the host's errors.
    pub fn give(&self, answer: Answer, ram: &Ram, result: &Result<usize, Failure>) -> u32 {
        if result.is_err() {
            self.limiter.traffic.failed.count();
        }
        if let Err(Failure::Host(error)) = result {
            guest_warning!("{}: {}: {error}", self.name, self.disk.path().display());
        }
        answer.give(ram, result)
    }

    /// Returns how many bytes of the chain's data buffers were written. Before it waits for the disk, it
    /// announces what was done before.
    pub fn execute(&self, request: Request, chain: &mut Chain, queue: &mut Virtqueue) -> Result<usize, Failure> {
        match request {
            Request::Read { offset } => {
                let len = chain.writable.len();
                let unannounced = queue.unannounced();
                let mut announce = || queue.interrupt();
                self.disk.read(&mut chain.writable, offset, unannounced.then_some(&mut announce))?;
                Ok(len)
            }
            Request::Write { offset } => {
                let unannounced = queue.unannounced();
                let mut announce = || queue.interrupt();
                self.disk.write(&mut chain.readable, offset, unannounced.then_some(&mut announce))?;
                self.settle(queue)
            }
            Request::Flush => {
                if self.flushes() {
                    queue.interrupt();
                    self.disk.flush()?;
                }
                Ok(0)
            }
            Request::GetId => Ok(chain.writable.copy_from(&self.id)),
            Request::Discard => {
                let ranges = Ranges::of_discard(chain, &self.disk)?;
                queue.interrupt();
                for range in ranges.extents() {
                    self.disk.discard(range.offset, range.len)?;
                }
                self.settle(queue)
            }
            Request::WriteZeroes => {
                let ranges = Ranges::of_write_zeroes(chain, &self.disk)?;
                queue.interrupt();
                for range in ranges.extents() {
                    self.disk.write_zeroes(range.offset, range.len, ranges.unmap)?;
                }
                self.settle(queue)
            }
        }
    }

    /// After a change of the disk: without a flush to come, it has to last already.
    fn settle(&self, queue: &mut Virtqueue) -> Result<usize, Failure> {
        if self.write_through {
            queue.interrupt();
            self.disk.flush()?;
        }
        Ok(0)
    }
}

impl Engine for SyncEngine {
    fn start(&mut self, _index: u16, features: u64, _ram: &Ram) -> io::Result<()> {
        self.write_through = self.flushes() && features & 1 << blk::VIRTIO_BLK_F_FLUSH == 0;
        Ok(())
    }

    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |chain, queue| self.request(chain, queue))
    }

    fn limiters(&self) -> Vec<Arc<Limiter>> {
        vec![self.limiter.clone()]
    }
}
