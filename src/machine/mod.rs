//! A running VM: the builder, the lifecycle, the one owner of it all.
//!
//! A [`Machine`] belongs to one thread. vCPUs and devices report through an event queue, whose descriptor the
//! owner waits on together with whatever else it serves.

mod board;
mod builder;
mod devices;
mod error;
mod events;
mod lifecycle;
mod parts;

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::error::{KvmError, MachineError};
pub use self::lifecycle::{End, State};
pub use self::parts::{OpenDisk, OpenNic, Parts, SerialSetup, open_initrd, open_kernel};

use self::board::Board;
use self::events::EventQueue;
use self::lifecycle::Request;
use crate::backend::disk::DiskCloser;
use crate::cpu::{ExitHandler, Vcpu, VcpuHandle};
use crate::memory::Ram;
use crate::platform::events::EventDevice;
use crate::platform::serial::SerialPort;

/// A VM, from the moment it is built to its end. Dropping it ends it.
pub struct Machine {
    state: State,
    vcpu_thread: &'static str,
    /// vCPUs before the start; then empty.
    waiting: Vec<Vcpu>,
    // Dropped first: no vCPU runs while the devices go.
    running: Vec<VcpuHandle>,
    board: Arc<Board>,
    event_device: Arc<Mutex<EventDevice>>,
    serial: Arc<SerialPort>,
    events: Arc<EventQueue>,
    /// The disks that keep something in memory.
    disks: Vec<DiskCloser>,
    /// Dropped last: KVM maps it for as long as there are vCPUs.
    _ram: Ram,
}

impl Machine {
    /// Starts all vCPUs.
    ///
    /// # Errors
    /// When the host has no thread for one of them.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.request(Request::Start);
        let handler: Arc<dyn ExitHandler> = self.board.clone();
        #[cfg(feature = "fuzzing")]
        let handler = crate::fuzzing::recorded(handler);
        for vcpu in std::mem::take(&mut self.waiting) {
            self.running.push(vcpu.start(self.vcpu_thread, handler.clone())?);
        }
        Ok(())
    }

    /// Presses the ACPI power button: the guest may power off, or ignore it.
    pub fn press_power_button(&mut self) {
        if self.request(Request::PowerButton) {
            self.event_device.lock().unwrap_or_else(PoisonError::into_inner).press_power_button();
        }
    }

    /// Ends the VM now, as pulling the plug does.
    pub fn kill(&mut self) {
        if self.request(Request::Kill) {
            self.stop_vcpus();
        }
    }

    /// Takes in what vCPUs and devices have reported; call it when [`Self::events_fd`] is readable.
    pub fn handle_events(&mut self) {
        if let Some(end) = self.events.take() {
            self.request(Request::GuestEnded(end));
            self.stop_vcpus();
        }
    }

    /// Lets all vCPUs leave the guest. They are not waited for: one may hang on a console nobody reads.
    fn stop_vcpus(&self) {
        self.running.iter().for_each(VcpuHandle::ask_to_stop);
    }

    /// Brings the disks to rest, for a process that is about to exit: once the VM has ended, however it did.
    pub fn close_disks(&self) {
        self.disks.iter().for_each(DiskCloser::close);
    }

    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    #[must_use]
    pub fn events_fd(&self) -> RawFd {
        self.events.fd()
    }

    #[must_use]
    pub fn serial(&self) -> &SerialPort {
        &self.serial
    }

    fn request(&mut self, request: Request) -> bool {
        let name = request.name();
        if let Some(next) = self.state.after(request) {
            tracing::debug!("{name}: {} -> {}", self.state.name(), next.name());
            self.state = next;
            true
        } else {
            tracing::debug!("{name} means nothing while {}", self.state.name());
            false
        }
    }
}
