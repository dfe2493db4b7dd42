//! From what a device has to tell to an interrupt, whatever carries it.

use std::fmt::Display;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::core::SharedRegisters;
use super::device::DeviceEvents;
use crate::observe::guest_warning;

/// What an interrupt is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Queue(u16),
    Config,
}

impl Source {
    /// Its bit in the ISR status (virtio 1.2, 4.1.4.5 and 4.2.2).
    #[must_use]
    pub fn isr(self) -> u8 {
        match self {
            Self::Queue(_) => 1,
            Self::Config => 2,
        }
    }
}

/// The way of a transport's interrupts to the driver.
pub trait Carrier: Send + Sync {
    fn raise(&self, source: Source);

    /// See [`DeviceEvents::interrupt_fd`].
    fn interrupt_fd(&self, queue: u16) -> Option<EventFd>;
}

/// A device's line to its driver.
pub struct Signals<C> {
    name: String,
    registers: Arc<SharedRegisters>,
    pub carrier: C,
}

impl<C: Carrier> Signals<C> {
    pub fn new(name: &str, registers: Arc<SharedRegisters>, carrier: C) -> Self {
        Self { name: name.to_owned(), registers, carrier }
    }
}

impl<C: Carrier> DeviceEvents for Signals<C> {
    fn queue_interrupt(&self, queue: u16) {
        self.carrier.raise(Source::Queue(queue));
    }

    fn interrupt_fd(&self, queue: u16) -> Option<EventFd> {
        self.carrier.interrupt_fd(queue)
    }

    fn driver_is_ready(&self) -> bool {
        self.registers.driver_is_ready()
    }

    fn config_changed(&self) {
        self.registers.bump_generation();
        // Before there is a driver nobody may be interrupted (virtio 1.2, 2.3.1), and it has read nothing yet.
        if self.registers.driver_is_ready() {
            self.carrier.raise(Source::Config);
        }
    }

    fn needs_reset(&self, why: &dyn Display) {
        // Once until the next reset, so a guest cannot fill the log faster than it can reset the device.
        if self.registers.mark_needs_reset() {
            guest_warning!("{}: needs a reset: {why}", self.name);
            self.carrier.raise(Source::Config);
        }
    }
}
