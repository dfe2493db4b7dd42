//! The serial port (a 16550A at 0x3f8): output as the guest writes it, input as the guest has room for it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::backend::Limiter;
use crate::config::RateLimits;
use crate::observe::{Milestone, Timeline};

/// Where the guest's output goes.
pub enum SerialOutput {
    Null,
    File(File),
    /// Whoever is connected; nobody at first.
    Socket(Option<Client>),
}

/// Most bytes that wait for a client that does not read. What comes after them is lost.
const BACKLOG: usize = 64 << 10;

/// A client of the socket, which takes no byte while it does not read: one that comes alone costs a socket as much room as a
/// thousand together.
pub struct Client {
    /// Its input is read elsewhere.
    stream: Arc<UnixStream>,
    backlog: Vec<u8>,
}

impl Client {
    /// Sends what waits, as far as the socket takes it.
    fn flush(&mut self) -> io::Result<()> {
        while !self.backlog.is_empty() {
            match (&*self.stream).write(&self.backlog) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

struct Output {
    to: SerialOutput,
    /// What comes too fast is lost: a vCPU must not wait for its console.
    limiter: Limiter,
    timeline: Arc<Timeline>,
    wake: EventFd,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.timeline.mark(Milestone::FirstConsoleByte);
        if self.limiter.take(bytes.len() as u64).is_err() {
            return Ok(bytes.len());
        }
        match &mut self.to {
            SerialOutput::Null | SerialOutput::Socket(None) => Ok(bytes.len()),
            // A full disk or a closed pipe loses console output, not the VM.
            SerialOutput::File(file) => file.write(bytes),
            SerialOutput::Socket(Some(client)) => {
                let waits = !client.backlog.is_empty();
                if client.backlog.len() < BACKLOG {
                    client.backlog.extend_from_slice(bytes);
                }
                if !waits {
                    if client.flush().is_err() {
                        self.to = SerialOutput::Socket(None);
                    } else if !client.backlog.is_empty() {
                        let _ = self.wake.write(1);
                    }
                }
                Ok(bytes.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the owner that the guest has read its input.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

/// What became of offered input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// The guest's FIFO took this many bytes, at least one.
    Taken(usize),
    /// Wait for [`SerialPort::wake`].
    Full,
    /// A vCPU is just writing, perhaps to an output that is slow: try again in a moment.
    Busy,
}

/// The port's registers, and what the guest has not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialStateV1 {
    pub baud_divisor: u16,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub input: Vec<u8>,
}

impl SerialStateV1 {
    fn registers(&self) -> SerialState {
        let [baud_divisor_low, baud_divisor_high] = self.baud_divisor.to_le_bytes();
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.input.clone(),
        }
    }
}

/// The port, shared by the vCPUs (through [`SerialDevice`]) and whoever feeds its input.
pub struct SerialPort {
    uart: Mutex<Serial<Line, Room, Output>>,
    wake: EventFd,
}

impl SerialPort {
    /// `interrupt` raises the port's GSI.
    ///
    /// # Errors
    /// When the host is out of descriptors; of a saved state also when it says what no port can be.
    pub fn new(
        interrupt: EventFd,
        to: SerialOutput,
        timeline: Arc<Timeline>,
        saved: Option<&SerialStateV1>,
    ) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (line, events) = (Line(interrupt), Room(wake.try_clone()?));
        let output = Output { to, limiter: Limiter::default(), timeline, wake: wake.try_clone()? };
        let uart = match saved {
            None => Serial::with_events(line, events, output),
            Some(state) => Serial::from_state(&state.registers(), line, events, output)
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "more input than a port holds"))?,
        };
        Ok(Self { uart: Mutex::new(uart), wake })
    }

    /// What it is; no vCPU may be at it.
    #[must_use]
    pub fn save(&self) -> SerialStateV1 {
        let state = self.uart.lock().unwrap_or_else(PoisonError::into_inner).state();
        SerialStateV1 {
            baud_divisor: u16::from_le_bytes([state.baud_divisor_low, state.baud_divisor_high]),
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Offers input to the guest.
    pub fn enqueue(&self, bytes: &[u8]) -> Enqueued {
        let Some(mut uart) = self.try_lock() else { return Enqueued::Busy };
        if uart.fifo_capacity() == 0 {
            return Enqueued::Full;
        }
        // In loop-back mode the line is cut: what comes in is lost.
        match uart.enqueue_raw_bytes(bytes) {
            Ok(0) | Err(_) => Enqueued::Taken(bytes.len()),
            Ok(count) => Enqueued::Taken(count),
        }
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Serial<Line, Room, Output>>> {
        match self.uart.try_lock() {
            Ok(uart) => Some(uart),
            Err(TryLockError::Poisoned(uart)) => Some(uart.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Sends what waits for the socket's client; does something wait still? Nothing comes back while a vCPU is writing.
    pub fn flush(&self) -> Option<bool> {
        let mut uart = self.try_lock()?;
        let output = uart.writer_mut();
        let SerialOutput::Socket(Some(client)) = &mut output.to else { return Some(false) };
        if client.flush().is_err() {
            output.to = SerialOutput::Socket(None);
            return Some(false);
        }
        Some(!client.backlog.is_empty())
    }

    /// Readable when the guest has taken all its input, and when output begins to wait for the socket's client.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Limits the output; see [`Limiter::update`].
    pub fn limit(&self, limits: RateLimits) {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner).writer_mut().limiter.update(limits);
    }

    /// Takes the output away, for another port. What is written from now on is lost.
    #[must_use]
    pub fn disconnect(&self) -> SerialOutput {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut uart.writer_mut().to, SerialOutput::Null)
    }

    /// Sends output to a new client of the socket, which does not block, instead of the one before.
    pub fn connect(&self, stream: Arc<UnixStream>) {
        let client = Client { stream, backlog: Vec::new() };
        self.uart.lock().unwrap_or_else(PoisonError::into_inner).writer_mut().to = SerialOutput::Socket(Some(client));
    }
}

/// The port on the bus.
pub struct SerialDevice(pub Arc<SerialPort>);

impl BusDevice for SerialDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.0.uart.lock().unwrap_or_else(PoisonError::into_inner).read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // An output that fails loses the byte, as a line with nobody at its end does.
            let _ = self.0.uart.lock().unwrap_or_else(PoisonError::into_inner).write(offset as u8, *byte);
        }
    }
}

/// Standard output as a file of its own, unbuffered.
///
/// # Errors
/// When it is closed.
pub fn stdout_file() -> io::Result<File> {
    fn own(fd: BorrowedFd<'_>) -> io::Result<File> {
        fd.try_clone_to_owned().map(File::from)
    }
    own(io::stdout().as_fd())
}
