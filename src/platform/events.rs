//! The event device: tells the guest's ACPI (the GED of the DSDT) that something happened to the machine.
//!
//! Registers of 32 bits, little endian, at [`layout::EVENT_DEVICE`](super::layout::EVENT_DEVICE); any other
//! width or offset reads ones and does nothing:
//!
//! | offset | register | read | write |
//! |--------|----------|------|-------|
//! | 0      | events   | what happened since the last read; clears | - |
//! | 4      | PCI up   | slots that got a device, one bit each; clears | - |
//! | 8      | PCI down | slots whose device should go; clears | - |
//! | 12     | PCI eject | 0 | bit of the slot whose device the guest has let go |
//!
//! The interrupt is an edge: it is raised after the bits are set, and a guest that reads the bits after the
//! edge misses none.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::layout::PCI_HOTPLUG_SLOTS;

pub const REGISTERS_SIZE: u64 = 16;

/// Bits of the events register.
pub const POWER_BUTTON: u32 = 1 << 0;
pub const PCI_SLOTS: u32 = 1 << 1;
pub const GENERATION: u32 = 1 << 2;

const EVENTS: u64 = 0;
const PCI_UP: u64 = 4;
const PCI_DOWN: u64 = 8;
const PCI_EJECT: u64 = 12;

/// What the guest has not read yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventDeviceStateV1 {
    pub events: u32,
    pub pci_up: u32,
    pub pci_down: u32,
}

/// Called when the guest has let go of the device in a slot (1 to 31). It runs on the vCPU that wrote the
/// register, with the event device locked: it may only pass the news on.
pub type OnEject = Box<dyn FnMut(u8) + Send>;

pub struct EventDevice {
    state: EventDeviceStateV1,
    /// An irqfd for `layout::EVENT_GSI`.
    interrupt: EventFd,
    on_eject: OnEject,
}

impl EventDevice {
    #[must_use]
    pub fn new(interrupt: EventFd, on_eject: OnEject) -> Self {
        Self { state: EventDeviceStateV1::default(), interrupt, on_eject }
    }

    #[must_use]
    pub fn save(&self) -> EventDeviceStateV1 {
        self.state
    }

    /// Takes over a saved state. An edge may have been on its way when it was saved, so there is a new one if
    /// anything is unread; a guest that had seen the first finds nothing to do.
    pub fn restore(&mut self, state: EventDeviceStateV1) {
        self.state = state;
        if state.events != 0 {
            self.raise(0);
        }
    }

    pub fn press_power_button(&mut self) {
        self.raise(POWER_BUTTON);
    }

    /// Tells the guest that its generation ID is another.
    pub fn generation_changed(&mut self) {
        self.raise(GENERATION);
    }

    /// Tells the guest that `slot` has a device now.
    ///
    /// # Panics
    /// If `slot` is not one of [`PCI_HOTPLUG_SLOTS`].
    pub fn slot_added(&mut self, slot: u8) {
        self.state.pci_up |= slot_bit(slot);
        self.raise(PCI_SLOTS);
    }

    /// Asks the guest to let go of the device in `slot`.
    ///
    /// # Panics
    /// If `slot` is not one of [`PCI_HOTPLUG_SLOTS`].
    pub fn slot_removal_requested(&mut self, slot: u8) {
        self.state.pci_down |= slot_bit(slot);
        self.raise(PCI_SLOTS);
    }

    /// Forgets what the guest has not read about `slot`, which is empty now.
    ///
    /// # Panics
    /// If `slot` is not one of [`PCI_HOTPLUG_SLOTS`].
    pub fn slot_vacated(&mut self, slot: u8) {
        self.state.pci_up &= !slot_bit(slot);
        self.state.pci_down &= !slot_bit(slot);
    }

    fn raise(&mut self, events: u32) {
        self.state.events |= events;
        // Fails only when the counter is about to overflow, and then an edge is pending anyway.
        let _ = self.interrupt.write(1);
    }
}

fn slot_bit(slot: u8) -> u32 {
    assert!(PCI_HOTPLUG_SLOTS.contains(&slot), "slot {slot}");
    1 << slot
}

impl BusDevice for EventDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            EVENTS => std::mem::take(&mut self.state.events),
            PCI_UP => std::mem::take(&mut self.state.pci_up),
            PCI_DOWN => std::mem::take(&mut self.state.pci_down),
            PCI_EJECT => 0,
            _ => return,
        };
        *data = value.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (PCI_EJECT, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) else { return };
        let slots = u32::from_le_bytes(data);
        for slot in PCI_HOTPLUG_SLOTS.filter(|slot| slots & (1 << slot) != 0) {
            (self.on_eject)(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::mpsc;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn device() -> (EventDevice, EventFd, mpsc::Receiver<u8>) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, ejected) = mpsc::channel();
        let on_eject = Box::new(move |slot| sender.send(slot).unwrap());
        (EventDevice::new(interrupt.try_clone().unwrap(), on_eject), interrupt, ejected)
    }

    fn read(device: &mut EventDevice, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_is_seen_once() {
        let (mut device, interrupt, _) = device();
        assert!(interrupt.read().is_err());
        device.press_power_button();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut device, EVENTS), POWER_BUTTON);
        assert_eq!(read(&mut device, EVENTS), 0);
        assert!(interrupt.read().is_err());
    }

    #[test]
    fn slots_come_and_go() {
        let (mut device, interrupt, ejected) = device();
        device.slot_added(1);
        device.slot_added(31);
        device.slot_removal_requested(7);
        assert_eq!(interrupt.read().unwrap(), 3);
        assert_eq!(read(&mut device, EVENTS), PCI_SLOTS);
        assert_eq!(read(&mut device, PCI_UP), 1 << 31 | 1 << 1);
        assert_eq!(read(&mut device, PCI_DOWN), 1 << 7);
        assert_eq!(read(&mut device, PCI_UP) | read(&mut device, PCI_DOWN), 0);
        device.slot_removal_requested(7);
        device.slot_removal_requested(8);
        device.slot_vacated(7);
        assert_eq!(read(&mut device, PCI_DOWN), 1 << 8);

        device.write(PCI_EJECT, &(1u32 << 7 | 1 << 31).to_le_bytes());
        assert_eq!(ejected.try_iter().collect::<Vec<_>>(), [7, 31]);
        // Slot 0 is the host bridge.
        device.write(PCI_EJECT, &1u32.to_le_bytes());
        assert_eq!(ejected.try_iter().next(), None);
    }

    #[test]
    fn an_unread_event_survives_a_restore_with_its_interrupt() {
        let (mut device, _, _) = device();
        device.press_power_button();
        let state = device.save();
        let (mut device, interrupt, _) = self::device();
        device.restore(state);
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut device, EVENTS), POWER_BUTTON);
        device.generation_changed();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut device, EVENTS), GENERATION);
        device.restore(EventDeviceStateV1::default());
        assert!(interrupt.read().is_err());
    }

    proptest! {
        /// Whatever else a guest does leaves the state alone and reads ones.
        #[test]
        fn odd_accesses_do_nothing(offset in 0u64..0x1000, width in prop::sample::select(vec![0usize, 1, 2, 3, 4, 8])) {
            let (mut device, _, ejected) = device();
            device.press_power_button();
            device.slot_added(3);
            device.slot_removal_requested(4);
            let before = device.save();
            let regular = width == 4 && offset < REGISTERS_SIZE && offset % 4 == 0;

            device.write(offset, &vec![0xff; width]);
            prop_assert_eq!(device.save(), before);
            prop_assert_eq!(ejected.try_iter().count(), if regular && offset == PCI_EJECT { 31 } else { 0 });

            let mut data = vec![0xff; width];
            device.read(offset, &mut data);
            if !regular {
                prop_assert_eq!(device.save(), before);
                prop_assert!(data.iter().all(|&byte| byte == 0xff));
            }
        }
    }
}
