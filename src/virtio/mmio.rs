//! Virtio over MMIO (virtio 1.2, 4.2): one page of registers, one interrupt line for everything.
//!
//! Registers are 32 bits wide and aligned; the device configuration from 0x100 on takes any access.

mod state;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use self::state::MmioStateV1;
use super::core::{SharedRegisters, VirtioCore};
use super::device::{DeviceEvents, VirtioDevice};
use super::doorbells::Doorbells;
use super::signals::{Carrier, Signals, Source};
use crate::memory::Ram;
use crate::observe::guest_warning;

/// Size and alignment of a device's registers.
pub const REGISTERS_SIZE: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Of the specification: 1 was the legacy interface.
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"TRNC");

mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    /// Descriptors, driver area, device area: low and high half each, 16 bytes apart.
    pub const QUEUE_ADDRESSES: u64 = 0x80;
    pub const QUEUE_ADDRESSES_END: u64 = 0xa8;
    /// Length and base of a shared memory region, low and high half each.
    pub const SHARED_MEMORY: u64 = 0xb0;
    pub const SHARED_MEMORY_END: u64 = 0xc0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// The device's one line. It is pulsed for every interrupt, even one that the driver has not taken note of: it may
/// share the line, so that only the driver knows which device it has looked at.
struct LineCarrier {
    line: Arc<EventFd>,
    registers: Arc<SharedRegisters>,
}

impl Carrier for LineCarrier {
    fn raise(&self, source: Source) {
        self.registers.set_isr(source.isr());
        // It fails only when the counter is full, and then the interrupt is long pending.
        let _ = self.line.write(1);
    }

    /// The status register has to be set before the line is pulsed, which takes this process.
    fn interrupt_fd(&self, _queue: u16) -> Option<EventFd> {
        None
    }
}

/// A virtio device behind MMIO registers.
pub struct VirtioMmio {
    core: VirtioCore,
    doorbells: Arc<dyn Doorbells>,
    /// Where the registers are.
    address: u64,
    listening: bool,
    line: Arc<EventFd>,
    /// The line is pulsed when it goes on.
    pulse: bool,
}

impl VirtioMmio {
    /// A device with its registers at `address`, which interrupts by `line`.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Ram,
        doorbells: Arc<dyn Doorbells>,
        address: u64,
        line: EventFd,
    ) -> io::Result<Self> {
        let registers = Arc::new(SharedRegisters::default());
        let line = Arc::new(line);
        let carrier = LineCarrier { line: line.clone(), registers: registers.clone() };
        let signals = Arc::new(Signals::new(device.name(), registers.clone(), carrier));
        let core = VirtioCore::new(device, ram, registers, signals)?;
        Ok(Self { core, doorbells, address, listening: false, line, pulse: false })
    }

    /// What the device tells its driver by.
    #[must_use]
    pub fn events(&self) -> Arc<dyn DeviceEvents> {
        self.core.events().clone()
    }

    pub fn registers_read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset.checked_sub(register::CONFIG), data.len()) {
            (Some(at), _) => self.core.read_config(at, data),
            (None, 4) if offset.is_multiple_of(4) => data.copy_from_slice(&self.read_register(offset).to_le_bytes()),
            (None, _) => data.fill(0),
        }
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let core = &mut self.core;
        if [register::STATUS, register::QUEUE_READY].contains(&offset) {
            let _ = core.settle();
        }
        let queue = core.selected_queue();
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE => core.device().kind() as u32,
            register::VENDOR => VENDOR,
            register::DEVICE_FEATURES => core.device_features(),
            register::QUEUE_SIZE_MAX => queue.map_or(0, |q| q.max_size().into()),
            register::QUEUE_READY => queue.map_or(0, |q| q.is_ready().into()),
            register::INTERRUPT_STATUS => core.registers().isr().into(),
            register::STATUS => core.status().into(),
            // There is none, whichever is selected.
            register::SHARED_MEMORY..register::SHARED_MEMORY_END => u32::MAX,
            register::CONFIG_GENERATION => core.generation().into(),
            _ => 0,
        }
    }

    pub fn registers_write(&mut self, offset: u64, data: &[u8]) {
        match (offset.checked_sub(register::CONFIG), data.try_into()) {
            (Some(at), _) => self.core.write_config(at, data),
            (None, Ok(bytes)) => self.write_register(offset, u32::from_le_bytes(bytes)),
            (None, Err(_)) => {}
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let core = &mut self.core;
        let _ = core.settle();
        if core.is_resetting() {
            return;
        }
        match offset {
            register::DEVICE_FEATURES_SELECT => core.device_feature_select = value,
            register::DRIVER_FEATURES => core.set_driver_features(value),
            register::DRIVER_FEATURES_SELECT => core.driver_feature_select = value,
            register::QUEUE_SELECT => core.queue_select = value,
            register::QUEUE_SIZE => {
                if let Some(queue) = core.queue_to_configure() {
                    // No queue has a size of zero, so what is too large stays wrong.
                    queue.layout.size = value.try_into().unwrap_or(0);
                }
            }
            register::QUEUE_READY if value == 0 => core.disable_queue(),
            register::QUEUE_READY if value == 1 => core.enable_queue(),
            register::QUEUE_NOTIFY => core.kick(value.into()),
            register::INTERRUPT_ACK => {
                core.registers().clear_isr(value as u8);
            }
            // Only a zero resets; bits that do not exist set nothing.
            register::STATUS if value == 0 || value as u8 != 0 => {
                let _ = core.set_status(value as u8);
                self.listen();
            }
            register::QUEUE_ADDRESSES..register::QUEUE_ADDRESSES_END => self.set_address(offset, value),
            _ => {}
        }
    }

    fn set_address(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.core.queue_to_configure() else { return };
        let address = match offset & !0xf {
            register::QUEUE_ADDRESSES => &mut queue.layout.descriptors,
            0x90 => &mut queue.layout.avail,
            _ => &mut queue.layout.used,
        };
        match offset & 0xf {
            0 => *address = *address & !0xffff_ffff | u64::from(value),
            4 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    /// Attaches the doorbells once a driver is there: a grace period for each, which a device without one need not
    /// wait for.
    fn listen(&mut self) {
        if self.listening || !self.core.registers().driver_is_ready() {
            return;
        }
        self.listening = true;
        for (index, queue) in (0..).zip(&self.core.queues) {
            if let Err(error) = self.doorbells.attach_doorbell(self.doorbell(), Some(index), &queue.kick) {
                // Notifications then come as exits: slower, but they come.
                guest_warning!("{}: no doorbell for queue {index}: {error}", self.core.device().name());
            }
        }
    }

    fn doorbell(&self) -> u64 {
        self.address + register::QUEUE_NOTIFY
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        if self.listening {
            for (index, queue) in (0..).zip(&self.core.queues) {
                self.doorbells.detach_doorbell(self.doorbell(), Some(index), &queue.kick);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
