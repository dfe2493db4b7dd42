//! What vCPUs and devices report to the machine's owner. Bounded: each kind of news is kept once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::End;

pub struct EventQueue {
    fd: EventFd,
    end: Mutex<Option<End>>,
}

impl EventQueue {
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { fd, end: Mutex::default() })
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

    /// Has the owner look at what it waits for: it may have happened.
    pub fn look(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = self.fd.write(1);
    }

    pub fn take(&self) -> Option<End> {
        let _ = self.fd.read();
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
