//! Virtio over PCI (virtio 1.2, 4.1): one function, one memory BAR, MSI-X.
//!
//! ```text
//! BAR 0, 32 KiB
//! 0x0000  common configuration
//! 0x1000  ISR status
//! 0x2000  device configuration
//! 0x3000  notifications: 4 bytes for each queue
//! 0x4000  MSI-X table
//! 0x6000  MSI-X pending bits
//! ```
//! There is no INTx: a driver without MSI-X has to poll.

mod common;
mod config_space;
mod msix;
mod state;
mod window;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::config_space::{ConfigSpace, Identity};
pub use self::msix::MsiMessage;
use self::msix::{MsixCarrier, MsixTable};
pub use self::state::{PciStateV1, VectorStateV1};
use self::window::Window;
use super::core::{SharedRegisters, VirtioCore};
use super::device::{DeviceEvents, DeviceKind, VirtioDevice};
use super::doorbells::Doorbells;
use super::signals::Signals;
use crate::memory::Ram;
use crate::observe::guest_warning;

/// Size and alignment of BAR 0.
pub const BAR_SIZE: u64 = 0x8000;
const REGION: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 1;
const DEVICE: u64 = 2;
const NOTIFY: u64 = 3;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x6000;
const NOTIFY_MULTIPLIER: u32 = 4;

/// What the function needs of its host: doorbells and message-signalled interrupts.
pub trait PciHost: Doorbells {
    /// A number for a message route, the function's own until it gives it back.
    fn allocate_route(&self) -> io::Result<u32>;
    /// Takes back a route that is not connected.
    fn release_route(&self, route: u32);
    /// Sends `message` to the guest whenever `fd` is signalled, what is pending there first.
    fn connect(&self, route: u32, message: MsiMessage, fd: &EventFd) -> io::Result<()>;
    fn disconnect(&self, route: u32, fd: &EventFd);
}

/// Where the guest has put the BAR, while it decodes memory.
pub type BarAddress = Option<u64>;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: ConfigSpace,
    window: Window,
    core: VirtioCore,
    signals: Arc<Signals<MsixCarrier>>,
    msix: MsixTable,
    host: Arc<dyn PciHost>,
    /// Where the doorbells are attached.
    doorbells: BarAddress,
}

impl VirtioPci {
    /// Makes the function; its BAR sits at `bar`, not decoded until the guest turns memory access on.
    pub fn new(device: Box<dyn VirtioDevice>, ram: Ram, host: Arc<dyn PciHost>, bar: u64) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        // One vector a queue, and one for changes of the configuration.
        let vectors = queues + 1;
        let kind = device.kind();
        let shared = Arc::new(SharedRegisters::default());
        let carrier = MsixCarrier::new(vectors, queues, shared.clone())?;
        let signals = Arc::new(Signals::new(device.name(), shared.clone(), carrier));
        let msix = MsixTable::new(signals.clone(), host.clone())?;
        let core = VirtioCore::new(device, ram, shared, signals.clone())?;
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1040 + kind as u16,
            class: match kind {
                DeviceKind::Net => 0x02_0000,
                DeviceKind::Block => 0x01_8000,
                DeviceKind::Rng => 0xff_0000,
            },
        };
        let mut config = ConfigSpace::new(identity);
        config.set_bar0(bar, BAR_SIZE);
        add_capabilities(&mut config, vectors as u16);
        let window = Window::add_to(&mut config);
        Ok(Self { config, window, core, signals, msix, host, doorbells: None })
    }

    /// What the device tells its driver by.
    #[must_use]
    pub fn events(&self) -> Arc<dyn DeviceEvents> {
        self.core.events().clone()
    }

    /// Reads the configuration space; through the window in it, what is in the BAR.
    pub fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((at, len)) = self.window.target(&self.config, offset, data.len()) {
            let mut value = [0; window::DATA_LEN];
            self.bar_read(at, &mut value[..len]);
            self.config.write(self.window.data_at(), &value);
        }
        self.config.read(offset, data);
    }

    /// Writes the configuration space; the caller looks at [`Self::bar_address`] afterwards.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((at, len)) = self.window.target(&self.config, offset, data.len()) {
            let mut value = [0; window::DATA_LEN];
            self.config.read(self.window.data_at(), &mut value);
            self.bar_write(at, &value[..len]);
        }
        if let Some(control) = self.config.msix_control() {
            self.msix.set_control(control);
        }
    }

    /// Where the BAR is decoded now.
    pub fn bar_address(&self) -> BarAddress {
        self.config.bar0()
    }

    /// Moves the doorbells to where the BAR is mapped now (or nowhere).
    pub fn map_doorbells(&mut self, bar: BarAddress) {
        if self.doorbells == bar {
            return;
        }
        for (index, queue) in self.core.queues.iter().enumerate() {
            let offset = NOTIFY * REGION + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            if let Some(old) = self.doorbells {
                self.host.detach_doorbell(old + offset, None, &queue.kick);
            }
            if let Some(new) = bar
                && let Err(error) = self.host.attach_doorbell(new + offset, None, &queue.kick)
            {
                // Notifications then come as exits: slower, but they come.
                guest_warning!("{}: no doorbell for queue {index}: {error}", self.core.device().name());
            }
        }
        self.doorbells = bar;
    }

    pub fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            MSIX_TABLE..MSIX_PBA => self.msix.read(offset - MSIX_TABLE, data),
            MSIX_PBA.. => self.msix.read_pending(offset - MSIX_PBA, data),
            _ => match (offset / REGION, offset % REGION) {
                (COMMON, at) => common::read(&mut self.core, &self.signals.carrier, at, data),
                (ISR, 0) => {
                    data.fill(0);
                    data[0] = self.core.registers().clear_isr(!0);
                }
                (DEVICE, at) => self.core.read_config(at, data),
                _ => data.fill(0),
            },
        }
    }

    pub fn bar_write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            MSIX_TABLE..MSIX_PBA => self.msix.write(offset - MSIX_TABLE, data),
            MSIX_PBA.. => {}
            _ => match (offset / REGION, offset % REGION) {
                (COMMON, at) => common::write(&mut self.core, &self.signals.carrier, at, data),
                (DEVICE, at) => self.core.write_config(at, data),
                (NOTIFY, at) => self.core.kick(at / u64::from(NOTIFY_MULTIPLIER)),
                _ => {}
            },
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.map_doorbells(None);
    }
}

#[cfg(test)]
pub(crate) mod tests;

/// Capability types of virtio (virtio 1.2, 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_WINDOW: u8 = 5;

fn add_capabilities(config: &mut ConfigSpace, vectors: u16) {
    for (kind, region) in [(CAP_COMMON, COMMON), (CAP_ISR, ISR), (CAP_DEVICE, DEVICE)] {
        config.add_capability(config_space::VENDOR_SPECIFIC, &virtio_capability(kind, region * REGION, REGION, &[]));
    }
    let notify = virtio_capability(CAP_NOTIFY, NOTIFY * REGION, REGION, &NOTIFY_MULTIPLIER.to_le_bytes());
    config.add_capability(config_space::VENDOR_SPECIFIC, &notify);
    config.add_msix(vectors, MSIX_TABLE as u32, MSIX_PBA as u32);
}

/// `struct virtio_pci_cap` without its first two bytes: length, type, BAR, id, padding, offset, length.
fn virtio_capability(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let mut bytes = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
    bytes.extend_from_slice(&(offset as u32).to_le_bytes());
    bytes.extend_from_slice(&(length as u32).to_le_bytes());
    bytes.extend_from_slice(extra);
    bytes
}
