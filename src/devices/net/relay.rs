//! The thread that hears what vhost has to say, where the host's kernel cannot tell the guest by itself: that a
//! driver has broken a ring, and of used buffers where an interrupt takes this process.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::backend::vhost::Silencer;
use crate::threads::{self, Kind};
use crate::virtio::DeviceEvents;

const STACK: usize = 64 << 10;

/// `epoll` data of the bell that ends the thread; all else is a place in `Shared::watched`.
const BELL: u64 = u64::MAX;

/// What it means when a descriptor is signalled.
pub enum Meaning {
    Used,
    /// The ring, which is to be left alone from then on.
    Broken(Silencer),
}

struct Watched {
    fd: EventFd,
    queue: u16,
    meaning: Meaning,
    events: Arc<dyn DeviceEvents>,
}

struct Shared {
    epoll: Epoll,
    bell: EventFd,
    /// By queue and meaning.
    watched: Mutex<Vec<Option<Watched>>>,
}

/// One for all pairs of a card. Dropping it ends its thread.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    pub fn spawn(name: &str, queues: u16) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: Epoll::new()?,
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            watched: Mutex::new((0..2 * queues).map(|_| None).collect()),
        });
        shared.epoll.ctl(ControlOperation::Add, shared.bell.as_raw_fd(), EpollEvent::new(EventSet::IN, BELL))?;
        let theirs = shared.clone();
        let thread = threads::spawn(Kind::Io, name, Some(STACK), move || theirs.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A descriptor that is listened to: when it is signalled, something is passed on.
    pub fn watch(&self, queue: u16, meaning: Meaning, events: &Arc<dyn DeviceEvents>) -> io::Result<EventFd> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let theirs = fd.try_clone()?;
        let place = 2 * usize::from(queue) + usize::from(matches!(meaning, Meaning::Broken(_)));
        let mut watched = self.shared.lock();
        let event = EpollEvent::new(EventSet::IN, place as u64);
        self.shared.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        let before = watched[place].replace(Watched { fd, queue, meaning, events: events.clone() });
        self.shared.ignore(before);
        Ok(theirs)
    }

    /// Passes on what a queue has said already; afterwards nothing any more.
    pub fn finish(&self, queue: u16) {
        let mut watched = self.shared.lock();
        for place in [2 * usize::from(queue), 2 * usize::from(queue) + 1] {
            self.shared.pass_on(&mut watched, place);
            self.shared.ignore(watched[place].take());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ignore(&self, watched: Option<Watched>) {
        if let Some(Watched { fd, .. }) = watched
            && let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
        {
            tracing::error!("a vhost descriptor cannot be ignored: {error}");
        }
    }

    fn run(&self) {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                result => result.unwrap_or_else(|error| unreachable!("epoll_wait of our own descriptor: {error}")),
            };
            for event in &events[..count] {
                if event.data() == BELL {
                    return;
                }
                self.pass_on(&mut self.lock(), event.data() as usize);
            }
        }
    }

    /// Passes on what a descriptor has said, if it is still there and has said something.
    fn pass_on(&self, all: &mut [Option<Watched>], place: usize) {
        let Some(Watched { queue, meaning, events, .. }) = all[place].as_ref().filter(|w| w.fd.read().is_ok()) else {
            return;
        };
        match meaning {
            Meaning::Used => events.queue_interrupt(*queue),
            Meaning::Broken(ring) => {
                ring.silence();
                events.needs_reset(&format_args!("queue {queue}: vhost finds its ring broken"));
                // Once is enough, however often the driver goes on.
                self.ignore(all[place].take());
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // It fails only when the counter is full.
        let _ = self.shared.bell.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
