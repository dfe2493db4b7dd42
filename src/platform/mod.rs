//! What a PC needs: memory map, ACPI tables, buses, interrupts, PCI root, serial, reset.

pub mod acpi;
pub mod bus;
pub mod chips;
pub mod events;
pub mod generation;
pub mod interrupts;
pub mod layout;
pub mod pci;
pub mod power;
pub mod serial;

/// What a guest does that the machine's owner has to hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestEvent {
    /// ACPI S5.
    PowerOff,
    /// ACPI reset register, i8042, or a triple fault.
    Reset,
    /// The guest's kernel wrote to pvpanic.
    Panicked,
    /// Userspace is up: the guest wrote the boot mark.
    BootMark,
}

/// Where platform devices report [`GuestEvent`]s; callable from any thread.
pub trait EventSink: Send + Sync {
    fn guest_event(&self, event: GuestEvent);
}
