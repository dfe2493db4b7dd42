//! The serial port (a 16550A at 0x3f8): output as the guest writes it, input as the guest has room for it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::observe::{Milestone, Timeline};

/// Where the guest's output goes.
pub enum SerialOutput {
    Null,
    File(File),
    /// Whoever is connected; nobody at first. A reader that is too slow loses bytes.
    Socket(Option<UnixStream>),
}

struct Output {
    to: SerialOutput,
    timeline: Arc<Timeline>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.timeline.mark(Milestone::FirstConsoleByte);
        match &mut self.to {
            SerialOutput::Null | SerialOutput::Socket(None) => Ok(bytes.len()),
            // A full disk or a closed pipe loses console output, not the VM.
            SerialOutput::File(file) => file.write(bytes),
            SerialOutput::Socket(Some(stream)) => {
                match stream.write(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => self.to = SerialOutput::Socket(None),
                    Ok(_) => {}
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

/// The port, shared by the vCPUs (through [`SerialDevice`]) and whoever feeds its input.
pub struct SerialPort {
    uart: Mutex<Serial<Line, Room, Output>>,
    room: EventFd,
}

impl SerialPort {
    /// `interrupt` raises the port's GSI.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new(interrupt: EventFd, to: SerialOutput, timeline: Arc<Timeline>) -> io::Result<Self> {
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let events = Room(room.try_clone()?);
        let uart = Serial::with_events(Line(interrupt), events, Output { to, timeline });
        Ok(Self { uart: Mutex::new(uart), room })
    }

    /// Offers input; returns how many bytes the guest's FIFO took. Zero means: wait for [`Self::room`], or, if
    /// the guest is just writing to a slow output, a moment.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        match self.uart.try_lock() {
            Ok(mut uart) => uart.enqueue_raw_bytes(bytes).unwrap_or(0),
            Err(TryLockError::Poisoned(uart)) => uart.into_inner().enqueue_raw_bytes(bytes).unwrap_or(0),
            Err(TryLockError::WouldBlock) => 0,
        }
    }

    /// Readable when the guest has taken all its input.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// Sends output to a new client of the socket, instead of the one before.
    pub fn connect(&self, client: UnixStream) {
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
