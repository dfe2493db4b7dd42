//! The serial console's input: standard input or a client of the socket, to the guest's serial port.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use super::escape::{self, Action, EscapeFilter};
use super::terminal::RawTerminal;
use crate::backend::{Deed, HostFiles};
use crate::config::SerialConfig;
use crate::platform::serial::{Enqueued, SerialPort};

/// How many keys a user may be ahead of the guest; more are lost.
const MAX_TYPED: usize = 4096;

/// Where keys come from, and those the guest has not taken yet.
pub struct Console {
    source: Source,
    escape: EscapeFilter,
    pending: Vec<u8>,
    /// The guest was writing when we had keys for it: try again in a moment.
    busy: bool,
    /// The input has ended. Its descriptor stays open until whoever waits on it has let go of it: epoll watches
    /// what is behind a descriptor, which is open elsewhere too, and could not be told any more.
    ended: bool,
    /// Counts clients: a new one may have the descriptor number of the one before.
    generation: u32,
    // Restores the terminal when the console goes.
    _terminal: Option<RawTerminal>,
}

/// A descriptor to wait on, told apart from an earlier one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Input {
    pub fd: RawFd,
    generation: u32,
}

enum Source {
    Nothing,
    Stdin { file: File, terminal: bool },
    Socket { listener: UnixListener, client: Option<File>, file: (PathBuf, Arc<dyn HostFiles>) },
}

impl Console {
    /// Takes the input that goes with the output `config` names.
    pub fn open(config: &SerialConfig, host: &Arc<dyn HostFiles>) -> io::Result<Self> {
        let mut raw = None;
        let source = match config {
            SerialConfig::Null | SerialConfig::File(_) | SerialConfig::Open(_) => Source::Nothing,
            SerialConfig::Stdio => {
                raw = RawTerminal::enter()?;
                let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                Source::Stdin { file, terminal: raw.is_some() }
            }
            SerialConfig::Socket(path) => {
                let listener = host.listen(path)?;
                listener.set_nonblocking(true)?;
                Source::Socket { listener, client: None, file: (path.clone(), host.clone()) }
            }
        };
        Ok(Self::of(source, raw))
    }

    /// No keys at all.
    pub fn none() -> Self {
        Self::of(Source::Nothing, None)
    }

    /// Takes keys from a file that is no terminal.
    pub fn of_keys(file: File) -> Self {
        Self::of(Source::Stdin { file, terminal: false }, None)
    }

    fn of(source: Source, terminal: Option<RawTerminal>) -> Self {
        let escape = EscapeFilter::default();
        Self { source, escape, pending: Vec::new(), busy: false, ended: false, generation: 0, _terminal: terminal }
    }

    /// What to wait on for more input; nothing while the guest has not taken what there is. A terminal is always
    /// listened to: its user may want to quit a guest that takes nothing.
    pub fn input(&self) -> Option<Input> {
        let fd = match &self.source {
            _ if self.ended => None,
            Source::Stdin { file, terminal: true } => Some(file.as_raw_fd()),
            _ if !self.pending.is_empty() => None,
            Source::Nothing => None,
            Source::Stdin { file, .. } => Some(file.as_raw_fd()),
            Source::Socket { client, .. } => client.as_ref().map(AsRawFd::as_raw_fd),
        }?;
        Some(Input { fd, generation: self.generation })
    }

    /// What to wait on for a client.
    pub fn listener_fd(&self) -> Option<RawFd> {
        match &self.source {
            Source::Socket { listener, .. } => Some(listener.as_raw_fd()),
            _ => None,
        }
    }

    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Reads input that is there; tells when the user wants to quit.
    pub fn read_input(&mut self, serial: &SerialPort) -> Option<Action> {
        let mut keys = [0; 1024];
        let (file, terminal) = match &mut self.source {
            Source::Stdin { file, terminal } => (file, *terminal),
            Source::Socket { client: Some(client), .. } => (client, false),
            _ => return None,
        };
        let count = match file.read(&mut keys) {
            Ok(count) => count,
            Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => {
                return None;
            }
            Err(_) => 0,
        };
        if count == 0 {
            // The end of the input is not the end of the VM.
            self.ended = true;
            return None;
        }
        let action = if terminal {
            let action = self.escape.feed(&keys[..count], &mut self.pending);
            self.pending.truncate(MAX_TYPED);
            action
        } else {
            self.pending.extend_from_slice(&keys[..count]);
            None
        };
        if action == Some(Action::Help) {
            let _ = io::stderr().write_all(escape::HELP.as_bytes());
        }
        self.push(serial);
        action
    }

    /// Gives the guest as much of the pending input as it takes.
    pub fn push(&mut self, serial: &SerialPort) {
        self.busy = false;
        while !self.pending.is_empty() {
            match serial.enqueue(&self.pending) {
                Enqueued::Taken(count) => drop(self.pending.drain(..count)),
                Enqueued::Full => return,
                Enqueued::Busy => {
                    self.busy = true;
                    return;
                }
            }
        }
    }

    /// Accepts all clients that wait; each replaces the one before. Those that cannot be accepted now wait until the
    /// next one comes.
    pub fn accept(&mut self, serial: &SerialPort) {
        while let Source::Socket { listener, client, .. } = &mut self.source
            && let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
            && let Ok(input) = stream.try_clone()
        {
            *client = Some(File::from(std::os::fd::OwnedFd::from(input)));
            self.pending.clear();
            self.ended = false;
            self.generation = self.generation.wrapping_add(1);
            serial.connect(stream);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Source::Socket { file: (path, host), .. } = &self.source {
            let _ = host.perform(&Deed::RemoveFile(path.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Timeline;
    use crate::platform::serial::SerialOutput;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::Instant;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    fn serial() -> SerialPort {
        let timeline = Arc::new(Timeline::from(Instant::now()));
        SerialPort::new(EventFd::new(EFD_NONBLOCK).unwrap(), SerialOutput::Null, timeline, None).unwrap()
    }

    fn stdin(stream: &UnixStream, terminal: bool) -> Console {
        let file = File::from(std::os::fd::OwnedFd::from(stream.try_clone().unwrap()));
        Console::of(Source::Stdin { file, terminal }, None)
    }

    /// Standard input is open a second time, so that a watch does not go with our descriptor.
    #[test]
    fn an_input_that_has_ended_can_be_let_go_of() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (serial, mut console) = (serial(), stdin(&ours, false));
        let epoll = Epoll::new().unwrap();
        let input = console.input().unwrap();
        epoll.ctl(ControlOperation::Add, input.fd, EpollEvent::new(EventSet::IN, 0)).unwrap();
        drop(theirs);
        assert_eq!(epoll.wait(0, &mut [EpollEvent::default()]).unwrap(), 1);
        assert_eq!(console.read_input(&serial), None);
        assert_eq!(console.input(), None);
        epoll.ctl(ControlOperation::Delete, input.fd, EpollEvent::default()).unwrap();
        assert_eq!(epoll.wait(0, &mut [EpollEvent::default()]).unwrap(), 0, "no busy loop");
    }

    #[test]
    fn a_user_can_quit_a_guest_that_takes_no_keys() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (serial, mut console) = (serial(), stdin(&ours, true));
        for _ in 0..10 {
            theirs.write_all(&[b'x'; 1000]).unwrap();
            assert!(console.input().is_some());
            assert_eq!(console.read_input(&serial), None);
        }
        assert_eq!(console.pending.len(), MAX_TYPED);
        theirs.write_all(b"\x01x").unwrap();
        assert_eq!(console.read_input(&serial), Some(Action::Quit));
    }
}
