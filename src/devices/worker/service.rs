//! What runs on a worker's thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Engine, Served, Source, Turn};
use crate::backend::limiter::Wait;
use crate::virtio::{Chain, QueueState, Virtqueue};

/// Requests in one turn of a queue.
const TURN: u32 = 64;

/// The longest rest of a queue before its limits are asked again.
const LONGEST_REST: Duration = Duration::from_secs(3600);

/// What the thread is asked to do.
pub enum Command {
    Start {
        running: Box<Running>,
        reply: SyncSender<io::Result<()>>,
    },
    Stop {
        index: u16,
        reply: SyncSender<Option<QueueState>>,
    },
    /// Takes back the stop before it, which may be done or not.
    GoOn {
        index: u16,
    },
    Exchange {
        engine: Box<dyn Engine>,
        done: Box<dyn FnOnce() + Send>,
    },
    Quit,
}

/// The way to the thread.
#[derive(Clone)]
pub struct Line {
    commands: Sender<Command>,
    called: Arc<AtomicBool>,
    bell: Arc<EventFd>,
}

impl Line {
    pub(super) fn new() -> io::Result<(Self, Receiver<Command>)> {
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (commands, inbox) = mpsc::channel();
        Ok((Self { commands, called: Arc::default(), bell }, inbox))
    }

    pub(super) fn send(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.called.store(true, Ordering::Release);
        self.bell.write(1)
    }

    /// Has another engine go on with the queues, under the same limiters, when the requests of the present one have come
    /// to their end; then calls `done`.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn exchange(&self, engine: Box<dyn Engine>, done: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        self.send(Command::Exchange { engine, done })
    }
}

/// A queue in service.
pub struct Running {
    pub queue: Virtqueue,
    pub chain: Chain,
    pub kick: EventFd,
    pub features: u64,
    /// The driver broke the ring: nothing is done with it until it is stopped.
    pub broken: bool,
}

/// A queue of the device, running or not.
#[derive(Default)]
struct Slot {
    index: u16,
    running: Option<Box<Running>>,
    /// The one that was stopped last, until another is started.
    stopped: Option<Box<Running>>,
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
pub struct Service {
    engine: Box<dyn Engine>,
    epoll: Epoll,
    slots: Vec<Slot>,
    /// One bit per slot whose queue has to be served.
    ready: u64,
    called: Arc<AtomicBool>,
    inbox: Receiver<Command>,
}

impl Service {
    /// For queues of these indices.
    pub fn new(
        engine: Box<dyn Engine>,
        queues: impl Iterator<Item = u16>,
        line: &Line,
        inbox: Receiver<Command>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        watch(&epoll, ControlOperation::Add, line.bell.as_raw_fd(), BELL, EventSet::IN)?;
        for limiter in engine.limiters() {
            limiter.ring_on_change(line.bell.clone());
        }
        let slots = queues.map(|index| Slot { index, ..Slot::default() }).collect();
        let mut service = Self { engine, epoll, slots, ready: 0, called: line.called.clone(), inbox };
        service.watch_sources()?;
        Ok(service)
    }

    fn watch_sources(&mut self) -> io::Result<()> {
        for source in self.engine.sources() {
            let slot = self.slot_of(source.queue).ok_or(io::ErrorKind::InvalidInput)?;
            let events = if source.always { source.events } else { EventSet::empty() };
            watch(&self.epoll, ControlOperation::Add, source.fd, slot as u64, events)?;
            self.slots[slot].source = (!source.always).then_some(Listener { source, listening: false });
        }
        Ok(())
    }

    pub fn run(mut self) {
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
                        Command::GoOn { index } => self.go_on(index),
                        Command::Exchange { engine, done } => {
                            self.exchange(engine);
                            done();
                        }
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
        self.slots[slot].stopped = None;
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
        let state = running.queue.state();
        self.slots[slot].stopped = Some(running);
        Some(state)
    }

    fn go_on(&mut self, index: u16) {
        let Some(slot) = self.slot_of(index) else { return };
        let Some(mut running) = self.slots[slot].stopped.take() else { return };
        if running.broken {
            self.slots[slot].running = Some(running);
            return;
        }
        let started = self.engine.start(index, running.features, running.queue.ram()).and_then(|()| {
            watch(&self.epoll, ControlOperation::Add, running.kick.as_raw_fd(), slot as u64, EventSet::IN)
        });
        if let Err(error) = started {
            running.broken = true;
            running.queue.broken(&error);
        }
        self.slots[slot].running = Some(running);
        self.ready |= 1 << slot;
    }

    fn exchange(&mut self, engine: Box<dyn Engine>) {
        for running in self.slots.iter_mut().filter_map(|slot| slot.running.as_mut()) {
            self.engine.stop(&mut running.queue);
            if !running.broken {
                running.queue.interrupt();
            }
        }
        for source in self.engine.sources() {
            if let Err(error) = self.epoll.ctl(ControlOperation::Delete, source.fd, EpollEvent::default()) {
                tracing::error!("a device's host side cannot be ignored: {error}");
            }
        }
        self.engine = engine;
        if let Err(error) = self.watch_sources() {
            tracing::error!("a device's host side cannot be watched: {error}");
        }
        for (at, slot) in self.slots.iter_mut().enumerate() {
            slot.throttled = None;
            let Some(running) = slot.running.as_mut().filter(|running| !running.broken) else { continue };
            let queue = &running.queue;
            if let Err(error) = self.engine.start(queue.index(), running.features, queue.ram()) {
                running.broken = true;
                queue.broken(&error);
            }
            self.ready |= 1 << at;
        }
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
