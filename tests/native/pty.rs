//! A terminal for the program under test.

#![expect(unsafe_code, reason = "the ioctls that make a pseudo-terminal")]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use rustix::termios::{LocalModes, OutputModes, Termios, tcgetattr};

use crate::support::{Running, Transcript};

pub struct Pty {
    /// The person's side.
    master: File,
    /// The program's side.
    slave: File,
    before: String,
}

impl Pty {
    pub fn new() -> Self {
        let master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let unlocked: libc::c_int = 0;
        // SAFETY: the descriptor is open, and the request reads an int.
        assert_eq!(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }, 0);
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: the request takes flags and gives a new descriptor, which is checked before it is owned.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
        assert!(slave >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: a fresh descriptor that nobody else owns.
        let slave = File::from(unsafe { OwnedFd::from_raw_fd(slave) });
        let before = describe(&tcgetattr(&slave).unwrap());
        Self { master, slave, before }
    }

    /// Starts a program with this as standard input and output. What it shows becomes its output.
    pub fn start(&self, command: &mut Command) -> Running {
        let side = || Stdio::from(self.slave.try_clone().unwrap());
        let mut running = Running::spawn(command.stdin(side()).stdout(side()).stderr(Stdio::piped()));
        running.output = Transcript::of(self.master.try_clone().unwrap());
        running
    }

    pub fn type_keys(&self, keys: &[u8]) {
        (&self.master).write_all(keys).unwrap();
    }

    #[track_caller]
    pub fn expect_raw(&self) {
        let now = tcgetattr(&self.slave).unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(!now.local_modes.intersects(cooked), "{now:?}");
        assert!(!now.output_modes.contains(OutputModes::OPOST), "{now:?}");
    }

    #[track_caller]
    pub fn expect_as_before(&self) {
        assert_eq!(describe(&tcgetattr(&self.slave).unwrap()), self.before, "the terminal is as it was");
    }
}

fn describe(termios: &Termios) -> String {
    format!("{termios:?}")
}
