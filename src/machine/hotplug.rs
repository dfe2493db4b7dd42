//! Devices that come and go while the guest runs.
//!
//! ```text
//!   plug ─────▶ Present ── unplug ──▶ Leaving ── the guest ejects ──▶ Ejected ── taken apart ──▶ Notice::Unplugged
//!                  ▲                     │ ▲
//!                  └── (never by itself) ┘ └── unplug: asks again
//! ```
//! The guest is told through ACPI, and needs no rescan. It lets go of nothing that it was not asked for: a device that
//! it ejects on its own stays, as whoever plugged it still counts on it.

use super::devices::{DeviceId, Presence};
use super::error::MachineError;
use super::lifecycle::State;
use super::limits::Limits;
use super::parts::{OpenDisk, OpenNic};
use super::{Machine, Notice};
use crate::observe::guest_warning;

impl Machine {
    /// Gives the guest one more disk.
    ///
    /// # Errors
    /// When the VM does not run, has no PCI bus or no free slot, or there is a disk of that name.
    pub fn plug_disk(&mut self, disk: OpenDisk) -> Result<(), MachineError> {
        self.check_started("to plug in a disk")?;
        let limits = Limits::of(std::slice::from_ref(&disk), &[]);
        self.limits.accept(&limits)?;
        let slot = self.devices.plug_disk(disk)?;
        self.limits.add(limits);
        self.announce(slot);
        Ok(())
    }

    /// Gives the guest one more network card.
    ///
    /// # Errors
    /// As [`Self::plug_disk`].
    pub fn plug_nic(&mut self, nic: OpenNic) -> Result<(), MachineError> {
        self.check_started("to plug in a network card")?;
        let limits = Limits::of(&[], std::slice::from_ref(&nic));
        self.limits.accept(&limits)?;
        let writes_unknown = nic.writes_behind_our_back();
        let slot = self.devices.plug_nic(nic)?;
        // For good: what it has written stays when it is gone.
        self.knows_writes &= !writes_unknown;
        self.limits.add(limits);
        self.announce(slot);
        Ok(())
    }

    /// Asks the guest to let go of a device, or asks it again. [`Notice::Unplugged`] tells when it has; a guest need not.
    ///
    /// # Errors
    /// When the VM does not run, or the device is not there or not on PCI.
    pub fn unplug(&mut self, id: &DeviceId) -> Result<(), MachineError> {
        self.check_started("to unplug a device")?;
        if let Some(slot) = self.devices.expect_to_leave(id)? {
            self.event_device().slot_removal_requested(slot as u8);
        }
        Ok(())
    }

    /// All disks and network cards.
    pub fn devices(&self) -> impl Iterator<Item = (&DeviceId, Presence)> {
        self.devices.iter()
    }

    fn announce(&self, slot: usize) {
        self.event_device().slot_added(slot as u8);
    }

    /// Takes in what the guest has let go of, and what has been taken apart since.
    pub(super) fn follow_ejections(&mut self, notices: &mut Vec<Notice>) {
        for slot in self.events.take_ejected() {
            if self.devices.eject(slot, &self.events) {
                // A request that it has not looked at is not to hit what comes next.
                self.event_device().slot_vacated(slot as u8);
            } else {
                guest_warning!("the guest ejects the device in PCI slot {slot} without being asked: it stays");
            }
        }
        for slot in self.events.take_dismantled() {
            if let Some(id) = self.devices.forget(slot) {
                self.limits.forget(&id);
                notices.push(Notice::Unplugged(id));
            }
        }
    }

    pub(super) fn check_started(&self, request: &'static str) -> Result<(), MachineError> {
        match &self.state {
            State::Running | State::Stopping | State::Pausing { .. } | State::Paused { .. } => Ok(()),
            state @ (State::Built | State::Ended(_)) => Err(MachineError::NotNow { request, state: state.name() }),
        }
    }
}
