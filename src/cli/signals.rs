//! The signals that ask the program to end, as a descriptor.

#![expect(unsafe_code, reason = "signalfd has no safe wrapper here")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::signal::{Error, block_signal, create_sigset};

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Readable when one of them came. Made before any thread, which would otherwise take them.
pub struct Signals {
    file: File,
    /// Each is a byte, from another process, and no signal of the kernel's.
    is_passed_on: bool,
}

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
        Ok(Self { file: unsafe { File::from_raw_fd(fd) }, is_passed_on: false })
    }

    /// Those that another process passes on, as bytes.
    pub fn passed_on(from: UnixStream) -> io::Result<Self> {
        from.set_nonblocking(true)?;
        Ok(Self { file: File::from(OwnedFd::from(from)), is_passed_on: true })
    }

    /// The number of one that came.
    pub fn next(&mut self) -> Option<libc::c_int> {
        if self.is_passed_on {
            let mut number = [0];
            self.file.read_exact(&mut number).ok()?;
            return Some(number[0].into());
        }
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.file.read_exact(&mut info).ok()?;
        // `ssi_signo`, the first member.
        let number = info.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))?;
        libc::c_int::try_from(number).ok()
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Ends the process as `signal` does to one that does not care.
pub fn die_of(signal: libc::c_int) -> ! {
    // SAFETY: a disposition without a handler, and a signal to this process; the set is made from it alone.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        if let Ok(set) = create_sigset(&[signal]) {
            libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        }
        libc::raise(signal);
    }
    std::process::exit(128 + signal)
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
        assert_eq!((signals.next(), signals.next()), (Some(libc::SIGTERM), None));
        // SAFETY: as above.
        unsafe { libc::signal(libc::SIGHUP, before) };
    }
}
