//! The signals that ask the program to end, as a descriptor.

#![expect(unsafe_code, reason = "signalfd has no safe wrapper here")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::signal::{Error, block_signal, create_sigset};

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Readable when one of them came. Made before any thread, which would otherwise take them.
pub struct Signals(File);

impl Signals {
    pub fn block() -> io::Result<Self> {
        // What our parent has us ignore (nohup, a background job of a script) stays ignored.
        let ending: Vec<_> = ENDING.into_iter().filter(|&signal| !is_ignored(signal)).collect();
        for &signal in &ending {
            match block_signal(signal) {
                Ok(()) | Err(Error::SignalAlreadyBlocked(_)) => {}
                Err(error) => return Err(io::Error::other(format!("{error:?}"))),
            }
        }
        // Past the limit of `ulimit -f`, a write to a disk or a console file fails; it does not end the VM.
        // SAFETY: a disposition without a handler.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let set = create_sigset(&ending)?;
        // SAFETY: the set is initialized; the result is checked before it is owned.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// How many came since the last call.
    pub fn take(&mut self) -> usize {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        std::iter::from_fn(|| self.0.read(&mut info).ok()).count()
    }

    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: all zeroes are a valid `sigaction`; without a new action the call only fills in the old one.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut old) == 0 && old.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_are_blocked_already_are_heard_and_ignored_ones_are_not() {
        // Masks are a thread's own; SIGHUP's disposition is the process's, and put back.
        let _ = block_signal(libc::SIGTERM);
        // SAFETY: plain dispositions, no handlers.
        let before = unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let mut signals = Signals::block().unwrap();
        for signal in [libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: the thread is this one; the signals are blocked, or ignored.
            unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
        }
        assert_eq!(signals.take(), 1);
        // SAFETY: as above.
        unsafe { libc::signal(libc::SIGHUP, before) };
    }
}
