//! Buses: which device answers a port or an address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::virtio::mmio::VirtioMmio;

/// A device behind ports or MMIO addresses. Accesses are 1, 2, 4 or 8 bytes at an offset into its range.
pub trait BusDevice: Send {
    /// Fills `data`, which comes as all ones: what an access to nothing reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.registers_read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.registers_write(offset, data);
    }
}

pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// A device as a bus holds it.
pub fn shared<D: BusDevice>(device: D) -> Arc<Mutex<D>> {
    Arc::new(Mutex::new(device))
}

#[derive(Clone)]
struct Mapping {
    len: u64,
    device: SharedDevice,
}

/// An address space of devices. Looking one up takes a read lock that is contended only while a mapping changes.
#[derive(Default)]
pub struct Bus {
    mappings: RwLock<BTreeMap<u64, Mapping>>,
}

impl Bus {
    /// Puts a device at `start..start + len`; `false` if something is there already or the range is empty.
    #[must_use]
    pub fn insert(&self, start: u64, len: u64, device: SharedDevice) -> bool {
        let Some(end) = start.checked_add(len).filter(|&end| end > start) else { return false };
        let mut mappings = self.mappings.write().unwrap_or_else(PoisonError::into_inner);
        if mappings.range(..end).next_back().is_some_and(|(&at, m)| at + m.len > start) {
            return false;
        }
        mappings.insert(start, Mapping { len, device });
        true
    }

    pub fn remove(&self, start: u64) {
        self.mappings.write().unwrap_or_else(PoisonError::into_inner).remove(&start);
    }

    fn find(&self, addr: u64) -> Option<(u64, SharedDevice)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, mapping) = mappings.range(..=addr).next_back()?;
        (addr - start < mapping.len).then(|| (addr - start, mapping.device.clone()))
    }

    /// Reads; addresses of no device give ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(addr) {
            lock(&device).read(offset, data);
        }
    }

    /// Writes; addresses of no device ignore it.
    pub fn write(&self, addr: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(addr) {
            lock(&device).write(offset, data);
        }
    }
}

/// A device whose handler panicked would be a bug of ours; its data is still there, and the VM goes on.
fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Probe(u8);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn probe(id: u8) -> SharedDevice {
        Arc::new(Mutex::new(Probe(id)))
    }

    #[test]
    fn accesses_reach_their_device_and_nothing_else() {
        let bus = Bus::default();
        assert!(bus.insert(0x100, 0x10, probe(1)));
        assert!(!bus.insert(0x10f, 4, probe(2)));
        assert!(!bus.insert(0xff, 2, probe(2)));
        assert!(!bus.insert(0x200, 0, probe(2)));
        assert!(!bus.insert(u64::MAX, 2, probe(2)));
        let mut byte = [0];
        for (addr, expected) in [(0xff, 0xff), (0x100, 1), (0x10f, 16), (0x110, 0xff), (u64::MAX, 0xff)] {
            bus.read(addr, &mut byte);
            assert_eq!(byte[0], expected, "{addr:#x}");
        }
        bus.remove(0x100);
        bus.read(0x100, &mut byte);
        assert_eq!(byte[0], 0xff);
    }

    proptest! {
        #[test]
        fn no_two_mappings_overlap(ranges in proptest::collection::vec((0u64..200, 0u64..50), 1..20)) {
            let bus = Bus::default();
            let mut owner = [None; 256];
            for (id, (start, len)) in ranges.into_iter().enumerate() {
                let cells = &mut owner[start as usize..(start + len) as usize];
                let free = len > 0 && cells.iter().all(Option::is_none);
                prop_assert_eq!(bus.insert(start, len, probe(0)), free);
                if free {
                    cells.fill(Some(id));
                }
            }
        }
    }
}
