//! The signals that ask the program to end, as a descriptor.

#![expect(unsafe_code, reason = "signalfd has no safe wrapper here")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Readable when one of them came. Made before any thread, which would otherwise take them.
pub struct Signals(File);

impl Signals {
    pub fn block() -> io::Result<Self> {
        for signal in ENDING {
            block_signal(signal).map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
        let set = create_sigset(&ENDING)?;
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
