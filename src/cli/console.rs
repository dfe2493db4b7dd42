//! The serial console's input: standard input or a client of the socket, to the guest's serial port. And the way back, where
//! a client is slow.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use vmm_sys_util::epoll::EventSet;

use super::escape::{self, Action, EscapeFilter};
use super::terminal::RawTerminal;
use crate::backend::{Deed, HostFiles};
use crate::config::SerialConfig;
use crate::platform::serial::{Enqueued, SerialPort};

/// How long the last output may take to be read.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

/// How many keys a user may be ahead of the guest; more are lost.
const MAX_TYPED: usize = 4096;

/// Where keys come from, and those the guest has not taken yet.
pub struct Console {
    source: Source,
    escape: EscapeFilter,
    pending: Vec<u8>,
    /// The guest was writing when we had keys for it, or something to send of what it wrote: try again in a moment.
    busy: bool,
    /// The client has not taken yet all that the guest wrote.
    output_waits: bool,
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
    pub events: EventSet,
    generation: u32,
}

enum Source {
    Nothing,
    Stdin { file: File, terminal: bool },
    Socket { listener: UnixListener, client: Option<Arc<UnixStream>>, file: (PathBuf, Arc<dyn HostFiles>) },
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
        Self {
            source,
            escape,
            pending: Vec::new(),
            busy: false,
            output_waits: false,
            ended: false,
            generation: 0,
            _terminal: terminal,
        }
    }

    /// What to wait on for more input; nothing while the guest has not taken what there is. A terminal is always
    /// listened to: its user may want to quit a guest that takes nothing. A client that reads too slowly is waited for too.
    pub fn input(&self) -> Option<Input> {
        let (fd, is_terminal) = match &self.source {
            Source::Nothing => return None,
            Source::Stdin { file, terminal } => (file.as_raw_fd(), *terminal),
            Source::Socket { client, .. } => (client.as_ref()?.as_raw_fd(), false),
        };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.takes_input() || is_terminal && !self.ended);
        events.set(EventSet::OUT, self.output_waits);
        (!events.is_empty()).then_some(Input { fd, events, generation: self.generation })
    }

    fn takes_input(&self) -> bool {
        !self.ended && self.pending.is_empty()
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

    /// Does what [`Self::input`] is ready for; tells when the user wants to quit.
    pub fn go_on(&mut self, ready: EventSet, serial: &SerialPort) -> Option<Action> {
        if ready.contains(EventSet::OUT) {
            self.push(serial);
        }
        // Whoever has hung up is read too.
        if ready == EventSet::OUT { None } else { self.read_input(serial) }
    }

    fn read_input(&mut self, serial: &SerialPort) -> Option<Action> {
        let mut keys = [0; 1024];
        let takes_input = self.takes_input();
        let (file, terminal) = match &self.source {
            Source::Stdin { file, terminal } => (file.as_fd(), *terminal),
            Source::Socket { client: Some(client), .. } if takes_input => (client.as_fd(), false),
            _ => return None,
        };
        let count = match rustix::io::read(file, &mut keys) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return None,
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

    /// Gives the guest as much of the pending input as it takes, and the client as much of what it wrote.
    pub fn push(&mut self, serial: &SerialPort) {
        self.busy = false;
        if let Source::Socket { .. } = self.source {
            match serial.flush() {
                Some(waits) => self.output_waits = waits,
                None => self.busy = true,
            }
        }
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

    /// Gives a client that is slow a moment for the last that the guest wrote.
    pub fn finish(&mut self, serial: &SerialPort) {
        let deadline = Instant::now() + LAST_PATIENCE;
        self.push(serial);
        while let (true, Source::Socket { client: Some(client), .. }) = (self.output_waits, &self.source) {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
            if !poll(&mut [PollFd::new(client, PollFlags::OUT)], Some(&timeout)).is_ok_and(|ready| ready > 0) {
                return;
            }
            self.push(serial);
        }
    }

    /// Accepts all clients that wait; each replaces the one before. Those that cannot be accepted now wait until the
    /// next one comes.
    pub fn accept(&mut self, serial: &SerialPort) {
        while let Source::Socket { listener, client, .. } = &mut self.source
            && let Ok(stream) = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            let stream = Arc::new(UnixStream::from(stream));
            *client = Some(stream.clone());
            self.pending.clear();
            (self.ended, self.output_waits) = (false, false);
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
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
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
