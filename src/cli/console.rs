//! The serial console's input: standard input or a client of the socket, to the guest's serial port.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::escape::{self, Action, EscapeFilter};
use super::terminal::RawTerminal;
use crate::backend::HostFiles;
use crate::config::SerialConfig;
use crate::platform::serial::{Enqueued, SerialPort};

/// Where keys come from, and those the guest has not taken yet.
pub struct Console {
    source: Source,
    escape: EscapeFilter,
    pending: Vec<u8>,
    /// The guest was writing when we had keys for it: try again in a moment.
    busy: bool,
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
    Socket { listener: UnixListener, client: Option<File>, path: PathBuf },
}

impl Console {
    /// Takes the input that goes with the output `config` names.
    pub fn open(config: &SerialConfig, host: &dyn HostFiles) -> io::Result<Self> {
        let mut raw = None;
        let source = match config {
            SerialConfig::Null | SerialConfig::File(_) => Source::Nothing,
            SerialConfig::Stdio => {
                raw = RawTerminal::enter()?;
                let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                Source::Stdin { file, terminal: raw.is_some() }
            }
            SerialConfig::Socket(path) => {
                let listener = host.listen(path)?;
                listener.set_nonblocking(true)?;
                Source::Socket { listener, client: None, path: path.clone() }
            }
        };
        let escape = EscapeFilter::default();
        Ok(Self { source, escape, pending: Vec::new(), busy: false, generation: 0, _terminal: raw })
    }

    /// What to wait on for more input; nothing while the guest has not taken what there is.
    pub fn input(&self) -> Option<Input> {
        let fd = match &self.source {
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
            match &mut self.source {
                Source::Socket { client, .. } => *client = None,
                source => *source = Source::Nothing,
            }
            return None;
        }
        let action = if terminal {
            self.escape.feed(&keys[..count], &mut self.pending)
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

    /// Accepts a client, which replaces the one before.
    pub fn accept(&mut self, serial: &SerialPort) {
        if let Source::Socket { listener, client, .. } = &mut self.source
            && let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
            && let Ok(input) = stream.try_clone()
        {
            *client = Some(File::from(std::os::fd::OwnedFd::from(input)));
            self.pending.clear();
            self.generation = self.generation.wrapping_add(1);
            serial.connect(stream);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Source::Socket { path, .. } = &self.source {
            let _ = std::fs::remove_file(path);
        }
    }
}
