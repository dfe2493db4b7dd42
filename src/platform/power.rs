//! The ways a guest tells us that it is done, or up: ACPI sleep and reset, the i8042's reset line, pvpanic, and
//! the boot mark.
//!
//! All registers are bytes. An access of another width reads ones and does nothing, so that no wide write to a
//! neighbour ends the VM.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::bus::{Bus, BusDevice, shared};
use super::{EventSink, GuestEvent, layout};
use crate::memory::RamRegions;

/// `SLP_TYP` of S5, as the DSDT's `\_S5` gives it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Sleep control, sleep status and reset, side by side.
pub const POWER_PORTS: u64 = 3;

/// Resets the machine from real mode: `mov $0x602, %dx; mov $1, %al; out %al, %dx`, then halts for good.
///
/// Linux on hardware-reduced ACPI prefers EFI's reset; without EFI it goes on to the firmware's entry point, not
/// to the ACPI reset register. So that is where the way to the register has to be.
const RESET_STUB: [u8; 9] = [
    0xba,
    layout::RESET_PORT as u8,
    (layout::RESET_PORT >> 8) as u8,
    0xb0,
    layout::RESET_VALUE,
    0xee,
    0xf4,
    0xeb,
    0xfd,
];

/// Puts the reset stub where a guest that wants the firmware's entry point jumps to.
///
/// # Errors
/// When there is no RAM at the reset vector.
pub fn write_reset_vector(ram: &RamRegions) -> Result<(), GuestMemoryError> {
    ram.write_slice(&RESET_STUB, GuestAddress(layout::RESET_VECTOR))
}

type Sink = Arc<dyn EventSink>;

/// Puts all of these devices on the buses; `false` if one of their places is taken.
#[must_use]
pub fn attach(ports: &Bus, mmio: &Bus, sink: &Sink) -> bool {
    ports.insert(layout::SLEEP_CONTROL_PORT.into(), POWER_PORTS, shared(PowerPorts(sink.clone())))
        && ports.insert(layout::I8042_COMMAND_PORT.into(), 1, shared(I8042(sink.clone())))
        && ports.insert(layout::PVPANIC_PORT.into(), 1, shared(PvPanic(sink.clone())))
        && mmio.insert(layout::BOOT_MARK, BOOT_MARK_SIZE, shared(BootMark(sink.clone())))
}

/// Sleep control and status (ACPI 6.4, section 4.8.3.7) and the reset register (4.8.3.6).
pub struct PowerPorts(pub Sink);

impl PowerPorts {
    const CONTROL: u64 = 0;
    const RESET: u64 = (layout::RESET_PORT - layout::SLEEP_CONTROL_PORT) as u64;

    const SLEEP_ENABLE: u8 = 1 << 5;
    /// What powers off: the S5 type in bits 2 to 4, and `SLP_EN`.
    const POWER_OFF: u8 = SLEEP_TYPE_S5 << 2 | Self::SLEEP_ENABLE;
    /// Bits 0, 1, 6 and 7 mean nothing.
    const MEANT: u8 = 0b0011_1100;
}

impl BusDevice for PowerPorts {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // SLP_EN is write-only, and a VM that slept has no one to set WAK_STS for.
        if let [byte] = data {
            *byte = 0;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (Self::CONTROL, &[value]) if value & Self::MEANT == Self::POWER_OFF => {
                self.0.guest_event(GuestEvent::PowerOff);
            }
            (Self::RESET, &[layout::RESET_VALUE]) => self.0.guest_event(GuestEvent::Reset),
            // Other states do not exist, and the guest's clearing of WAK_STS has nothing to clear.
            _ => {}
        }
    }
}

/// The keyboard controller's command port, for the one command a guest without keyboard sends.
pub struct I8042(pub Sink);

impl I8042 {
    /// Pulse output line 0, which is the CPU's reset.
    const PULSE_RESET: u8 = 0xfe;
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status: nothing to read, ready for a command.
        if let [byte] = data {
            *byte = 0;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [Self::PULSE_RESET] {
            self.0.guest_event(GuestEvent::Reset);
        }
    }
}

/// pvpanic: a read gives the events it knows, a write reports them.
pub struct PvPanic(pub Sink);

impl PvPanic {
    /// The only event on offer: a guest that is about to boot its crash kernel is not lost yet.
    const PANICKED: u8 = 1 << 0;
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = Self::PANICKED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let &[events] = data
            && events & Self::PANICKED != 0
        {
            self.0.guest_event(GuestEvent::Panicked);
        }
    }
}

const BOOT_MARK_SIZE: u64 = layout::EVENT_DEVICE - layout::BOOT_MARK;

/// A page whose first byte takes the mark.
pub struct BootMark(pub Sink);

impl BootMark {
    const MARK: u8 = 123;
}

impl BusDevice for BootMark {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [Self::MARK] {
            self.0.guest_event(GuestEvent::BootMark);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use GuestEvent::{Panicked, PowerOff, Reset};
    use proptest::prelude::*;

    #[derive(Default)]
    struct Heard(std::sync::Mutex<Vec<GuestEvent>>);

    impl EventSink for Heard {
        fn guest_event(&self, event: GuestEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    struct Machine {
        ports: Bus,
        mmio: Bus,
        heard: Arc<Heard>,
    }

    impl Machine {
        fn new() -> Self {
            let (ports, mmio, heard) = (Bus::default(), Bus::default(), Arc::new(Heard::default()));
            assert!(attach(&ports, &mmio, &(heard.clone() as Sink)));
            Self { ports, mmio, heard }
        }

        fn after_port_write(&self, port: u16, data: &[u8]) -> Option<GuestEvent> {
            self.ports.write(port.into(), data);
            self.heard.0.lock().unwrap().pop()
        }

        fn port(&self, port: u16) -> u8 {
            let mut byte = [0];
            self.ports.read(port.into(), &mut byte);
            byte[0]
        }
    }

    #[test]
    fn only_s5_with_enable_powers_off() {
        let machine = Machine::new();
        for value in 0..=255u8 {
            let expected = (value >> 2 & 0xf == 0b1101).then_some(PowerOff);
            assert_eq!(machine.after_port_write(layout::SLEEP_CONTROL_PORT, &[value]), expected, "{value:#x}");
            assert_eq!(machine.after_port_write(layout::SLEEP_STATUS_PORT, &[value]), None);
            let expected = (value == layout::RESET_VALUE).then_some(Reset);
            assert_eq!(machine.after_port_write(layout::RESET_PORT, &[value]), expected, "{value:#x}");
            let expected = (value == 0xfe).then_some(Reset);
            assert_eq!(machine.after_port_write(layout::I8042_COMMAND_PORT, &[value]), expected, "{value:#x}");
            let expected = (value & 1 == 1).then_some(Panicked);
            assert_eq!(machine.after_port_write(layout::PVPANIC_PORT, &[value]), expected, "{value:#x}");
        }
        assert_eq!(machine.port(layout::SLEEP_CONTROL_PORT), 0);
        assert_eq!(machine.port(layout::SLEEP_STATUS_PORT), 0);
        assert_eq!(machine.port(layout::I8042_COMMAND_PORT), 0);
        assert_eq!(machine.port(layout::PVPANIC_PORT), 1);
    }

    #[test]
    fn the_boot_mark_is_one_byte_at_one_address() {
        let machine = Machine::new();
        for (offset, data) in [(0, &[122][..]), (1, &[123]), (0, &[123, 0]), (0, &[123, 0, 0, 0]), (0xfff, &[123])] {
            machine.mmio.write(layout::BOOT_MARK + offset, data);
            assert!(machine.heard.0.lock().unwrap().is_empty(), "{offset} {data:?}");
        }
        machine.mmio.write(layout::BOOT_MARK, &[123]);
        assert_eq!(*machine.heard.0.lock().unwrap(), [GuestEvent::BootMark]);
        let mut data = [0; 4];
        machine.mmio.read(layout::BOOT_MARK, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    proptest! {
        #[test]
        fn wide_accesses_do_nothing(
            port in prop::sample::select(vec![0x64u16, 0x505, 0x600, 0x601, 0x602]),
            data in prop::collection::vec(any::<u8>(), 2..=8),
        ) {
            let machine = Machine::new();
            prop_assert_eq!(machine.after_port_write(port, &data), None);
            let mut read = data.clone();
            machine.ports.read(port.into(), &mut read);
            prop_assert!(read.iter().all(|&byte| byte == 0xff));
        }
    }

    #[test]
    fn the_reset_vector_leads_to_the_reset_register() {
        let ram = crate::memory::anonymous(&layout::ram_ranges(1 << 21)).unwrap();
        write_reset_vector(&ram).unwrap();
        let mut code = [0; 9];
        ram.read_slice(&mut code, GuestAddress(0xf_fff0)).unwrap();
        // mov $0x602, %dx; mov $1, %al; out %al, %dx; hlt; jmp back to the hlt
        assert_eq!(code, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]);
    }
}
