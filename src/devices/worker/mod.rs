//! The thread that serves a device's queues.
//!
//! ```text
//!   transport ── start_queue, stop_queue ──▶ commands ─┐
//!   guest ────── kick (eventfd) ───────────────────────┼─▶ epoll ─▶ Engine::serve, one turn per queue
//!   host ─────── the engine's source (a tap) ──────────┘
//! ```
//!
//! The thread is made with its device, before rights are taken away, and sleeps in `epoll_wait` unless there is
//! work. It serves a queue for a bounded turn, so that no guest keeps it from its other queues, and ends the
//! turn after the request in hand when a command is waiting. A queue whose next request is over its limits rests
//! until the request may pass; nobody waits for that who wants it stopped.
//!
//! Everything is watched edge-triggered: an eventfd needs no read to be quiet again, and a descriptor in error
//! does not wake the thread for ever.

mod service;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;

pub use self::service::Line;
use self::service::{Command, Running, Service};
use super::front::QueueServer;
use crate::backend::limiter::{Limiter, Wait};
use crate::memory::Ram;
use crate::threads::{self, Kind};
use crate::virtio::{Chain, QueueResources, QueueState, RingError, StillBusy, Virtqueue};

/// Bytes of stack, ample for what an engine does; only what is touched costs memory.
const STACK: usize = 128 << 10;

/// What a device does with its queues. All calls come from the device's thread.
pub trait Engine: Send {
    /// A queue is about to be served, under the features the driver accepted.
    ///
    /// # Errors
    /// They become the errors of `start_queue`.
    fn start(&mut self, _index: u16, _features: u64, _ram: &Ram) -> io::Result<()> {
        Ok(())
    }

    /// Serves requests until there is nothing to do or the turn is over. `chain` is scratch space that keeps its
    /// allocations. Used entries may be left unannounced, unless the engine is about to wait for something.
    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError>;

    /// A queue is about to be stopped: chains popped but not used go back to it, or are used first. The device
    /// touches guest memory no more when this returns. After an error of [`Self::serve`] the queue is to be left
    /// as it is.
    fn stop(&mut self, _queue: &mut Virtqueue) {}

    /// Descriptors that bring work for queues, besides the driver's kicks: one a queue at most, and none twice.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// What its requests may have to wait for: when it changes, they are tried again.
    fn limiters(&self) -> Vec<Arc<Limiter>> {
        Vec::new()
    }
}

/// Where a queue's work comes from when it comes from the host.
#[derive(Clone, Copy)]
pub struct Source {
    pub queue: u16,
    /// Open as long as the engine lives.
    pub fd: RawFd,
    /// What it is listened to for.
    pub events: EventSet,
    /// Listened to at all times, because it speaks only of what the engine has begun itself; else only after
    /// [`Served::NoWork`].
    pub always: bool,
}

/// How a turn of a queue ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Because it was over; there may be more to do.
    TurnOver,
    /// For want of buffers: the driver's kick goes on with it.
    NoBuffers,
    /// For want of work from the engine's source, which goes on with it. The driver need not kick.
    NoWork,
    /// Because the next request is over its limits: it is tried again in time. Neither the driver nor the source is
    /// listened to before.
    Throttled(Wait),
}

/// A bounded number of requests.
pub struct Turn<'a> {
    left: u32,
    /// Is a command waiting?
    called: &'a AtomicBool,
}

impl Turn<'_> {
    /// One that nobody cuts short.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn of(left: u32) -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self { left, called: &NEVER }
    }

    /// May one more request be served?
    pub fn another(&mut self) -> bool {
        if self.left == 0 || self.called.load(Ordering::Relaxed) {
            return false;
        }
        self.left -= 1;
        true
    }
}

/// Serves a queue's chains one by one: `request` returns how many bytes it wrote. One that has to wait has done nothing
/// yet, and stays in the ring.
pub fn serve_each(
    queue: &mut Virtqueue,
    chain: &mut Chain,
    turn: &mut Turn<'_>,
    mut request: impl FnMut(&mut Chain, &mut Virtqueue) -> Result<u32, Wait>,
) -> Result<Served, RingError> {
    while turn.another() {
        if !queue.pop(chain)? {
            return Ok(Served::NoBuffers);
        }
        match request(chain, queue) {
            Ok(written) => queue.push_used(chain.head, written)?,
            Err(wait) => {
                queue.undo_pop();
                return Ok(Served::Throttled(wait));
            }
        }
    }
    Ok(Served::TurnOver)
}

/// The device's end of its thread. Dropping it ends the thread, after the request in hand.
pub struct Worker {
    queues: Vec<(u16, u16)>,
    /// See [`Self::spawn_with`].
    other: Option<(u16, u16)>,
    line: Line,
    /// Queues that have been asked to stop, and where the answer will come.
    stopping: Vec<(u16, Receiver<Option<QueueState>>)>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, called `name`, for these queues: index and largest size of each.
    pub fn spawn(name: &str, engine: Box<dyn Engine>, queues: &[(u16, u16)]) -> io::Result<Self> {
        Self::spawn_with(name, engine, queues, None)
    }

    /// As [`Self::spawn`], for a device one of whose queues may also be found at an index that is another server's.
    pub fn spawn_with(
        name: &str,
        engine: Box<dyn Engine>,
        queues: &[(u16, u16)],
        other: Option<(u16, u16)>,
    ) -> io::Result<Self> {
        let (line, inbox) = Line::new()?;
        let indices = queues.iter().chain(&other).map(|&(index, _)| index);
        let service = Service::new(engine, indices, &line, inbox)?;
        let thread = threads::spawn(Kind::Io, name, Some(STACK), move || service.run())?;
        Ok(Self { queues: queues.to_vec(), other, line, stopping: Vec::new(), thread: Some(thread) })
    }

    /// To have the thread do other things than what a transport asks for.
    pub fn line(&self) -> Line {
        self.line.clone()
    }

    /// Sends a command; the reply comes from the receiver.
    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> io::Result<Receiver<T>> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.line.send(command(reply))?;
        Ok(answer)
    }

    /// The answer to a stop, asked for now or before.
    fn stop_answer(&mut self, index: u16) -> io::Result<Receiver<Option<QueueState>>> {
        match self.stopping.iter().position(|stopping| stopping.0 == index) {
            Some(at) => Ok(self.stopping.swap_remove(at).1),
            None => self.ask(|reply| Command::Stop { index, reply }),
        }
    }
}

impl QueueServer for Worker {
    fn queues(&self) -> &[(u16, u16)] {
        &self.queues
    }

    fn start(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()> {
        let mut queues = self.queues.iter().chain(&self.other);
        let max_size = queues.find(|queue| queue.0 == index).ok_or(io::ErrorKind::InvalidInput)?.1;
        let queue = Virtqueue::new(index, max_size, &resources, state)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let running = Box::new(Running {
            chain: Chain::new(queue.ram()),
            queue,
            kick: resources.kick,
            features: resources.features,
            broken: false,
        });
        let answer = self.ask(|reply| Command::Start { running, reply })?;
        answer.recv().map_err(|_| io::ErrorKind::BrokenPipe)?
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.stop_answer(index).ok()?.recv().ok().flatten()
    }

    fn stop_within(&mut self, index: u16, patience: Duration) -> Result<Option<QueueState>, StillBusy> {
        let Ok(answer) = self.stop_answer(index) else { return Ok(None) };
        match answer.recv_timeout(patience) {
            Ok(state) => Ok(state),
            Err(RecvTimeoutError::Timeout) => {
                self.stopping.push((index, answer));
                Err(StillBusy)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
        }
    }

    fn go_on(&mut self, index: u16) {
        self.stopping.retain(|stopping| stopping.0 != index);
        // If the thread cannot be told, it has ended.
        let _ = self.line.send(Command::GoOn { index });
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // If the thread cannot be told, it has ended already.
        let _ = self.line.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
