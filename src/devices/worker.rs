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

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::front::QueueServer;
use crate::backend::limiter::{Limiter, Wait};
use crate::memory::Ram;
use crate::virtio::{Chain, QueueResources, QueueState, RingError, StillBusy, Virtqueue};

/// Bytes of stack, ample for what an engine does; only what is touched costs memory.
const STACK: usize = 128 << 10;

/// Requests in one turn of a queue.
const TURN: u32 = 64;

/// The longest rest of a queue before its limits are asked again.
const LONGEST_REST: Duration = Duration::from_secs(3600);

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

enum Command {
    Start { running: Box<Running>, reply: SyncSender<io::Result<()>> },
    Stop { index: u16, reply: SyncSender<Option<QueueState>> },
    Quit,
}

/// The device's end of its thread. Dropping it ends the thread, after the request in hand.
pub struct Worker {
    queues: Vec<(u16, u16)>,
    /// See [`Self::spawn_with`].
    other: Option<(u16, u16)>,
    commands: Sender<Command>,
    called: Arc<AtomicBool>,
    bell: Arc<EventFd>,
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
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        watch(&epoll, ControlOperation::Add, bell.as_raw_fd(), BELL, EventSet::IN)?;
        let mut slots: Vec<_> =
            queues.iter().chain(&other).map(|&(index, _)| Slot { index, ..Slot::default() }).collect();
        for source in engine.sources() {
            let slot = slots.iter().position(|slot| slot.index == source.queue).ok_or(io::ErrorKind::InvalidInput)?;
            let events = if source.always { source.events } else { EventSet::empty() };
            watch(&epoll, ControlOperation::Add, source.fd, slot as u64, events)?;
            slots[slot].source = (!source.always).then_some(Listener { source, listening: false });
        }
        for limiter in engine.limiters() {
            limiter.ring_on_change(bell.clone());
        }
        let called = Arc::new(AtomicBool::new(false));
        let (commands, inbox) = mpsc::channel();
        let service = Service { engine, epoll, slots, ready: 0, called: called.clone(), inbox };
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(move || service.run())?;
        Ok(Self { queues: queues.to_vec(), other, commands, called, bell, stopping: Vec::new(), thread: Some(thread) })
    }

    /// Sends a command; the reply comes from the receiver.
    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> io::Result<Receiver<T>> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(command(reply))?;
        Ok(answer)
    }

    /// The answer to a stop, asked for now or before.
    fn stop_answer(&mut self, index: u16) -> io::Result<Receiver<Option<QueueState>>> {
        match self.stopping.iter().position(|stopping| stopping.0 == index) {
            Some(at) => Ok(self.stopping.swap_remove(at).1),
            None => self.ask(|reply| Command::Stop { index, reply }),
        }
    }

    fn send(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.called.store(true, Ordering::Release);
        self.bell.write(1)
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
}

impl Drop for Worker {
    fn drop(&mut self) {
        // If the thread cannot be told, it has ended already.
        let _ = self.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A queue in service.
struct Running {
    queue: Virtqueue,
    chain: Chain,
    kick: EventFd,
    features: u64,
    /// The driver broke the ring: nothing is done with it until it is stopped.
    broken: bool,
}

/// A queue of the device, running or not.
#[derive(Default)]
struct Slot {
    index: u16,
    running: Option<Box<Running>>,
    source: Option<Listener>,
    /// Until when it rests because of its limits.
    throttled: Option<Instant>,
}

/// A source that is listened to at times.
struct Listener {
    source: Source,
    listening: bool,
}

/// `epoll` data of the bell; all else is the slot of the queue that has work.
const BELL: u64 = u64::MAX;

/// What the thread owns.
struct Service {
    engine: Box<dyn Engine>,
    epoll: Epoll,
    slots: Vec<Slot>,
    /// One bit per slot whose queue has to be served.
    ready: u64,
    called: Arc<AtomicBool>,
    inbox: Receiver<Command>,
}

impl Service {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let mut rung = false;
            match self.epoll.wait(self.timeout(), &mut events) {
                Ok(count) => {
                    for event in &events[..count] {
                        match event.data() {
                            BELL => rung = true,
                            slot => self.ready |= 1 << slot,
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => unreachable!("epoll_wait of our own descriptor: {error}"),
            }
            if self.called.swap(false, Ordering::Acquire) {
                while let Ok(command) = self.inbox.try_recv() {
                    match command {
                        // Nobody waits for the reply only if the device is gone, and then we are asked to quit.
                        Command::Start { running, reply } => drop(reply.send(self.start(running))),
                        Command::Stop { index, reply } => drop(reply.send(self.stop(index))),
                        Command::Quit => return,
                    }
                }
            }
            // Limits may have changed when the bell has rung.
            self.end_rests(rung);
            for slot in 0..self.slots.len() {
                if self.ready & (1 << slot) != 0 {
                    self.ready &= !(1 << slot);
                    self.serve(slot);
                }
            }
        }
    }

    /// Milliseconds to wait for events, at most.
    fn timeout(&self) -> i32 {
        if self.ready != 0 {
            return 0;
        }
        let Some(due) = self.slots.iter().filter_map(|slot| slot.throttled).min() else { return -1 };
        let rest = due.saturating_duration_since(Instant::now());
        rest.as_micros().div_ceil(1000).try_into().unwrap_or(i32::MAX)
    }

    /// Has queues served again that rest because of their limits: those whose time has come, or all of them.
    fn end_rests(&mut self, all: bool) {
        for (at, slot) in self.slots.iter().enumerate() {
            if slot.throttled.is_some_and(|due| all || due <= Instant::now()) {
                self.ready |= 1 << at;
            }
        }
    }

    fn slot_of(&self, index: u16) -> Option<usize> {
        self.slots.iter().position(|slot| slot.index == index)
    }

    fn start(&mut self, running: Box<Running>) -> io::Result<()> {
        let slot = self.slot_of(running.queue.index()).ok_or(io::ErrorKind::InvalidInput)?;
        if self.slots[slot].running.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.engine.start(running.queue.index(), running.features, running.queue.ram())?;
        watch(&self.epoll, ControlOperation::Add, running.kick.as_raw_fd(), slot as u64, EventSet::IN)?;
        self.slots[slot].running = Some(running);
        // There may be buffers from before we watched.
        self.ready |= 1 << slot;
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        let slot = self.slot_of(index)?;
        let mut running = self.slots[slot].running.take()?;
        self.ready &= !(1 << slot);
        self.slots[slot].throttled = None;
        self.listen(slot, false);
        self.engine.stop(&mut running.queue);
        if !running.broken {
            running.queue.interrupt();
            self.ignore(&running.kick);
        }
        Some(running.queue.state())
    }

    fn serve(&mut self, slot: usize) {
        self.slots[slot].throttled = None;
        let Some(running) = self.slots[slot].running.as_mut().filter(|running| !running.broken) else { return };
        let queue = &mut running.queue;
        queue.disable_kicks();
        let mut turn = Turn { left: TURN, called: &self.called };
        let result = self.engine.serve(queue, &mut running.chain, &mut turn);
        queue.interrupt();
        match result {
            Ok(Served::TurnOver) => self.ready |= 1 << slot,
            Ok(Served::NoWork) => self.listen(slot, true),
            Ok(Served::Throttled(Wait(time))) => {
                self.slots[slot].throttled = Some(Instant::now() + time.min(LONGEST_REST));
                self.listen(slot, false);
            }
            Ok(Served::NoBuffers) => {
                if queue.enable_kicks() {
                    self.ready |= 1 << slot;
                }
                self.listen(slot, false);
            }
            Err(error) => {
                running.broken = true;
                queue.broken(&error);
                self.listen(slot, false);
                if let Some(running) = &self.slots[slot].running {
                    self.ignore(&running.kick);
                }
            }
        }
    }

    /// Listens to a queue's source, if it has one, or no longer.
    fn listen(&mut self, slot: usize, listen: bool) {
        let Some(Listener { source, listening }) = &mut self.slots[slot].source else { return };
        if *listening == listen {
            return;
        }
        // A change of events looks at the descriptor anew: what came meanwhile is not lost.
        let events = if listen { source.events } else { EventSet::empty() };
        if let Err(error) = watch(&self.epoll, ControlOperation::Modify, source.fd, slot as u64, events) {
            tracing::error!("a device's host side cannot be watched: {error}");
        }
        *listening = listen;
    }

    /// The transport holds the same eventfd, so that closing our descriptor would not end the watch.
    fn ignore(&self, kick: &EventFd) {
        let removed = self.epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default());
        if let Err(error) = removed {
            tracing::error!("a queue's kick cannot be ignored: {error}");
        }
    }
}

fn watch(epoll: &Epoll, operation: ControlOperation, fd: RawFd, data: u64, events: EventSet) -> io::Result<()> {
    epoll.ctl(operation, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, data))
}
