//! The PCI root: one bus, its configuration space over ports (0xcf8) and memory (ECAM), and where BARs answer.

mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use self::state::PciRootStateV1;
use super::bus::{Bus, BusDevice};
use super::layout;
use crate::virtio::pci::{BAR_SIZE, BarAddress, VirtioPci};

pub const CONFIG_PORTS: u16 = 0xcf8;
pub const CONFIG_PORTS_LEN: u64 = 8;
const DATA_OFFSET: u64 = 4;
const ADDRESS_ENABLE: u32 = 1 << 31;
const SLOTS: usize = 32;

/// Vendor, device, class: a host bridge that needs no driver (QEMU's generic PCIe one).
const HOST_BRIDGE: [u32; 3] = [0x0008_1b36, 0, 0x0600_0000];

/// A function, and where its BAR is on the bus.
struct Function {
    /// None once it has been taken away: whoever still was on the way to it finds nothing.
    virtio: Option<VirtioPci>,
    mapped: BarAddress,
}

/// The bridge's windows, start and end, as the guest's ACPI tables name them. Elsewhere there is RAM, or what KVM or
/// the platform answers: a BAR there could take nothing from them, but its doorbells would be in their way.
type Windows = [Option<(u64, u64)>; 2];

fn is_within(windows: &Windows, bar: u64) -> bool {
    let end = bar.saturating_add(BAR_SIZE);
    windows.iter().flatten().any(|&(from, to)| from <= bar && end <= to)
}

type SharedFunction = Arc<Mutex<Function>>;

pub struct PciRoot {
    slots: [Option<SharedFunction>; SLOTS],
    /// Weak, as this root is on that bus itself: each would keep the other alive, and all devices with them.
    mmio: Weak<Bus>,
    /// Where BARs are decoded.
    windows: Windows,
    /// What was written to 0xcf8.
    address: u32,
}

impl PciRoot {
    /// `mmio` is where BARs appear; `window_64` are the addresses beyond 4 GiB that they may have.
    #[must_use]
    pub fn new(mmio: &Arc<Bus>, window_64: Option<(u64, u64)>) -> Self {
        Self {
            slots: [const { None }; SLOTS],
            mmio: Arc::downgrade(mmio),
            windows: [Some((layout::PCI_WINDOW, layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE)), window_64],
            address: 0,
        }
    }

    /// The address a function in `slot` finds its BAR at; the guest may move it.
    #[must_use]
    pub fn initial_bar(slot: usize) -> u64 {
        layout::PCI_WINDOW + slot as u64 * BAR_SIZE
    }

    /// Puts a function into a slot, 1 to 31, which is free.
    pub fn insert(root: &Mutex<Self>, slot: usize, function: VirtioPci) {
        let function = Function { virtio: Some(function), mapped: None };
        lock(root).slots[slot] = Some(Arc::new(Mutex::new(function)));
    }

    /// The next free slot after that one, around the end.
    pub fn free_slot(root: &Mutex<Self>, after: usize) -> Option<usize> {
        let root = lock(root);
        (after + 1..SLOTS).chain(1..=after).find(|&slot| root.slots[slot].is_none())
    }

    /// Takes the function out of a slot. From now on the guest finds nothing there, nor where its BAR was.
    pub fn remove(root: &Mutex<Self>, slot: usize) -> Option<VirtioPci> {
        let (shared, mmio) = {
            let mut root = lock(root);
            (root.slots[slot].take()?, root.mmio.upgrade())
        };
        let mut function = lock(&shared);
        if let (Some(at), Some(mmio)) = (function.mapped.take(), mmio) {
            mmio.remove(at);
        }
        let mut virtio = function.virtio.take()?;
        // At once, as the guest may have another function's BAR in the same place next.
        virtio.map_doorbells(None);
        Some(virtio)
    }
}

/// Reads the configuration space. The root is not held meanwhile: a function that waits for its device keeps
/// nobody from the others.
fn read_config(root: &Mutex<PciRoot>, slot: usize, offset: u16, data: &mut [u8]) {
    data.fill(0xff);
    if slot == 0 {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::from(offset) + i;
            *byte = HOST_BRIDGE.get(at / 4).map_or(0, |word| word.to_le_bytes()[at % 4]);
        }
        return;
    }
    let function = lock(root).slots[slot].clone();
    if let Some(function) = function {
        lock(&function).config_read(offset, data);
    }
}

/// Writes the configuration space, and maps the BAR where it is now.
fn write_config(root: &Mutex<PciRoot>, slot: usize, offset: u16, data: &[u8]) {
    let (shared, mmio, windows) = {
        let root = lock(root);
        (root.slots[slot].clone(), root.mmio.upgrade(), root.windows)
    };
    let (Some(shared), Some(mmio)) = (shared, mmio) else { return };
    // The bus holds no lock of its own while it waits for a function, so it may be taken under this one.
    let mut function = lock(&shared);
    let Function { virtio: Some(virtio), mapped } = &mut *function else { return };
    virtio.config_write(offset, data);
    let wanted = virtio.bar_address();
    if wanted == *mapped {
        return;
    }
    if let Some(old) = mapped.take() {
        mmio.remove(old);
    }
    if let Some(new) = wanted {
        if !is_within(&windows, new) {
            crate::observe::guest_warning!("a BAR at {new:#x} is outside of the bridge's windows: it stays unmapped");
        } else if mmio.insert(new, BAR_SIZE, shared.clone()) {
            *mapped = wanted;
        } else {
            crate::observe::guest_warning!("a BAR at {new:#x} would cover another device: it stays unmapped");
        }
    }
    virtio.map_doorbells(*mapped);
}

impl Function {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some(virtio) = &mut self.virtio {
            virtio.config_read(offset, data);
        }
    }
}

impl BusDevice for Function {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(virtio) = &mut self.virtio {
            virtio.bar_read(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(virtio) = &mut self.virtio {
            virtio.bar_write(offset, data);
        }
    }
}

/// Configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2): address at 0xcf8, data at 0xcfc.
pub struct ConfigPorts(pub Arc<Mutex<PciRoot>>);

impl ConfigPorts {
    /// Slot and offset of a data access, if the address names a function that can exist.
    fn target(address: u32, offset: u64, len: usize) -> Option<(usize, u16)> {
        let at = offset.checked_sub(DATA_OFFSET)?;
        let bus_and_function = address >> 16 & 0xff | address >> 8 & 7;
        let valid = address & ADDRESS_ENABLE != 0 && bus_and_function == 0 && at + len as u64 <= 4;
        valid.then_some(((address >> 11 & 0x1f) as usize, (address & 0xfc) as u16 + at as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let address = lock(&self.0).address;
        if let Some((slot, at)) = Self::target(address, offset, data.len()) {
            read_config(&self.0, slot, at, data);
        } else if offset < DATA_OFFSET && offset as usize + data.len() <= 4 {
            data.copy_from_slice(&address.to_le_bytes()[offset as usize..][..data.len()]);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let address = lock(&self.0).address;
        if let Some((slot, at)) = Self::target(address, offset, data.len()) {
            write_config(&self.0, slot, at, data);
        } else if let (0, Ok(bytes)) = (offset, data.try_into()) {
            lock(&self.0).address = u32::from_le_bytes(bytes);
        }
    }
}

/// The enhanced configuration access mechanism (PCI Express Base, 7.2.2): 4 KiB for each function of bus 0.
pub struct Ecam(pub Arc<Mutex<PciRoot>>);

impl Ecam {
    fn target(offset: u64, len: usize) -> Option<(usize, u16)> {
        let (devfn, at) = ((offset >> 12) as usize, (offset & 0xfff) as u16);
        let valid = devfn < SLOTS * 8 && devfn.is_multiple_of(8) && usize::from(at) + len <= 0x1000;
        valid.then_some((devfn / 8, at))
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some((slot, at)) = Self::target(offset, data.len()) {
            read_config(&self.0, slot, at, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((slot, at)) = Self::target(offset, data.len()) {
            write_config(&self.0, slot, at, data);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
