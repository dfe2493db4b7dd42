//! A running VM: the builder, the lifecycle, the one owner of it all.
//!
//! A [`Machine`] belongs to one thread. vCPUs and devices report through an event queue, whose descriptor the
//! owner waits on together with whatever else it serves.

mod board;
mod builder;
mod devices;
mod drive;
mod error;
mod events;
mod hotplug;
mod lifecycle;
mod limits;
mod meters;
mod pager;
mod parts;
mod reset;
mod save;
mod saved;

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::{Kvm, VmFd};

pub use self::builder::look_at_kvm;
pub use self::devices::{DeviceBusy, DeviceId, DevicesStateV1, Presence, RestoreError};
pub use self::drive::Replacement;
pub use self::error::{KvmError, MachineError, PlugError};
pub use self::lifecycle::{End, State};
pub use self::limits::Budgets;
pub use self::meters::Meters;
pub use self::pager::{OpenPager, PagerError};
pub use self::parts::{OpenDisk, OpenNic, Origin, Parts, SavedMemory, SerialSetup, open_initrd, open_kernel};
pub use self::reset::Remains;
pub use self::save::{AtRest, SaveError};
pub use self::saved::{MachineStateV1, StateError};

use self::board::Board;
use self::devices::Devices;
use self::events::EventQueue;
use self::lifecycle::Request;
use self::limits::Limits;
use self::pager::Pager;
use crate::config::{MemoryPolicy, Transport};
use crate::cpu::{ExitHandler, Vcpus};
use crate::memory::Ram;
use crate::platform::events::EventDevice;
use crate::platform::serial::SerialPort;

/// How long [`Machine::pause`] waits for vCPUs: longer than any device of ours holds one.
const PAUSE_PATIENCE: Duration = Duration::from_millis(200);

/// How far a pause has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    Paused,
    /// [`Notice::Paused`] will tell when it is complete, unless the VM is resumed or ends before.
    Pausing,
}

/// What the owner of a machine hears of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A pause that took longer is complete.
    Paused,
    /// The guest has let go of a device as it was asked to, and nothing is left of it here.
    Unplugged(DeviceId),
    /// The disk of that name has another file, which took longer.
    Replaced(String),
}

/// A VM, from the moment it is built to its end. Dropping it ends it.
pub struct Machine {
    state: State,
    vcpu_thread: &'static str,
    memory_policy: MemoryPolicy,
    // Dropped first: no vCPU runs while the devices go.
    vcpus: Vcpus,
    board: Arc<Board>,
    event_device: Arc<Mutex<EventDevice>>,
    serial: Arc<SerialPort>,
    events: Arc<EventQueue>,
    devices: Devices,
    limits: Limits,
    /// Are all pages known that have been written?
    knows_writes: bool,
    /// Has the guest a generation ID? Not if it was saved by a release without.
    generation_id: bool,
    window_64: Option<(u64, u64)>,
    transport: Transport,
    kvm: Kvm,
    vm: Arc<VmFd>,
    /// Who gives the pages of memory, if another process does.
    pager: Option<Pager>,
    /// Dropped last: KVM maps it for as long as there are vCPUs.
    ram: Ram,
}

impl Machine {
    /// Starts all vCPUs.
    ///
    /// # Errors
    /// When the host has no thread for one of them.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.request(Request::Start);
        Ok(self.vcpus.start(self.vcpu_thread, &self.exit_handler())?)
    }

    fn exit_handler(&self) -> Arc<dyn ExitHandler> {
        let handler: Arc<dyn ExitHandler> = self.board.clone();
        #[cfg(feature = "fuzzing")]
        let handler = crate::fuzzing::recorded(handler);
        handler
    }

    /// Gets all vCPUs out of the guest. Its devices go on with what they have in hand, and with what comes from outside.
    ///
    /// That takes a moment, which is waited for; not for a vCPU that hangs in a device, such as a console that nobody
    /// reads. The pause is complete then when that ends: [`Notice::Paused`] tells.
    ///
    /// # Errors
    /// When the VM has not been started, or has ended.
    pub fn pause(&mut self) -> Result<Pause, MachineError> {
        self.demand(Request::Pause)?;
        if matches!(self.state, State::Pausing { .. }) {
            self.vcpus.pause();
            if !self.finish_pause(PAUSE_PATIENCE) {
                return Ok(Pause::Pausing);
            }
        }
        Ok(Pause::Paused)
    }

    /// Lets the vCPUs go on after a pause, or one that is not complete.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.demand(Request::Resume)?;
        self.devices.resume();
        self.vcpus.resume();
        Ok(())
    }

    fn finish_pause(&mut self, patience: Duration) -> bool {
        self.vcpus.are_parked(patience) && self.request(Request::AllParked)
    }

    /// Presses the ACPI power button: the guest may power off, or ignore it. One that is paused finds it pressed when it
    /// goes on.
    pub fn press_power_button(&mut self) {
        if self.request(Request::PowerButton) {
            self.event_device().press_power_button();
        }
    }

    fn event_device(&self) -> MutexGuard<'_, EventDevice> {
        self.event_device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the VM now, as pulling the plug does.
    pub fn kill(&mut self) {
        if self.request(Request::Kill) {
            self.vcpus.stop();
        }
    }

    /// Takes in what vCPUs and devices have reported; call it when [`Self::events_fd`] is readable. Returns what happened
    /// besides changes of the state.
    pub fn handle_events(&mut self) -> Vec<Notice> {
        let mut notices = Vec::new();
        if let Some(end) = self.events.take() {
            self.request(Request::GuestEnded(end));
            self.vcpus.stop();
        }
        if matches!(self.state, State::Pausing { .. }) && self.finish_pause(Duration::ZERO) {
            notices.push(Notice::Paused);
        }
        self.follow_ejections(&mut notices);
        self.follow_replacements(&mut notices);
        notices
    }

    /// Brings the disks to rest, for a process that is about to exit: once the VM has ended, however it did.
    pub fn close_disks(&self) {
        self.devices.close_disks();
    }

    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    #[must_use]
    pub fn events_fd(&self) -> RawFd {
        self.events.fd()
    }

    /// Makes [`Self::events_fd`] readable, from any thread: something that the owner waits for has happened.
    pub fn waker(&self) -> impl Fn() + Send + use<> {
        let events = self.events.clone();
        move || events.look()
    }

    #[must_use]
    pub fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// As [`Self::request`], for whoever has to know that it meant nothing.
    fn demand(&mut self, request: Request) -> Result<(), MachineError> {
        let (name, state) = (request.name(), self.state.name());
        if self.request(request) { Ok(()) } else { Err(MachineError::NotNow { request: name, state }) }
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

#[cfg(test)]
pub(crate) mod tests;
