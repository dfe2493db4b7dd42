//! What vCPUs and devices report to the machine's owner. Bounded: each kind of news is kept once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::End;

pub struct EventQueue {
    fd: EventFd,
    end: Mutex<Option<End>>,
    /// PCI slots, a bit each.
    ejected: AtomicU32,
    dismantled: AtomicU32,
}

impl EventQueue {
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { fd, end: Mutex::default(), ejected: AtomicU32::default(), dismantled: AtomicU32::default() })
    }

    /// Reports an end. A panic outranks the reset that the guest's kernel follows it up with; otherwise the
    /// first one counts.
    pub fn end(&self, end: End) {
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() || matches!(end, End::Panicked) {
            *slot = Some(end);
        }
        drop(slot);
        self.look();
    }

    /// Reports that the guest has let go of the device in a PCI slot.
    pub fn ejected(&self, slot: usize) {
        self.ejected.fetch_or(1 << slot, Ordering::AcqRel);
        self.look();
    }

    pub fn take_ejected(&self) -> impl Iterator<Item = usize> + use<> {
        bits(self.ejected.swap(0, Ordering::AcqRel))
    }

    /// Reports that nothing is left of the device that was in a PCI slot.
    pub fn dismantled(&self, slot: usize) {
        self.dismantled.fetch_or(1 << slot, Ordering::AcqRel);
        self.look();
    }

    pub fn take_dismantled(&self) -> impl Iterator<Item = usize> + use<> {
        bits(self.dismantled.swap(0, Ordering::AcqRel))
    }

    /// Has the owner look at what it waits for: it may have happened.
    pub fn look(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = self.fd.write(1);
    }

    /// Takes the end, if there is one. From now on the descriptor is silent until there is more.
    pub fn take(&self) -> Option<End> {
        let _ = self.fd.read();
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn bits(set: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |bit| set & 1 << bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_told_once() {
        let queue = EventQueue::new().unwrap();
        [31, 1, 31].into_iter().for_each(|slot| queue.ejected(slot));
        queue.dismantled(7);
        assert_eq!(queue.take_ejected().collect::<Vec<_>>(), [1, 31]);
        assert_eq!(queue.take_ejected().count(), 0);
        assert_eq!(queue.take_dismantled().collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn a_panic_outranks_the_reset_around_it() {
        for ends in [[End::Panicked, End::Reset], [End::Reset, End::Panicked]] {
            let queue = EventQueue::new().unwrap();
            ends.into_iter().for_each(|end| queue.end(end));
            assert!(matches!(queue.take(), Some(End::Panicked)));
            assert!(queue.take().is_none());
        }
    }
}
