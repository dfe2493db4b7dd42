//! The PCI root at rest.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{Function, PciRoot, SLOTS, is_within, lock};
use crate::virtio::StateError;
use crate::virtio::pci::{BAR_SIZE, BarAddress, VirtioPci};

/// What is not one of the functions'. The host bridge has nothing that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciRootStateV1 {
    /// What was written to 0xcf8.
    pub address: u32,
}

impl PciRoot {
    #[must_use]
    pub fn save(root: &Mutex<Self>) -> PciRootStateV1 {
        PciRootStateV1 { address: lock(root).address }
    }

    /// Takes up a state: any can be.
    pub fn restore(root: &Mutex<Self>, state: PciRootStateV1) {
        lock(root).address = state.address;
    }

    /// Can a saved function be put there?
    ///
    /// # Errors
    /// When there is no such slot, or it is taken.
    pub fn check_slot(root: &Mutex<Self>, slot: usize) -> Result<(), StateError> {
        let wrong = |problem| Err(StateError::new("slot", problem));
        match lock(root).slots.get(slot) {
            _ if slot == 0 => wrong("the host bridge is in slot 0".into()),
            None => wrong(format!("{slot}, and there are only {SLOTS}")),
            Some(Some(_)) => wrong(format!("{slot} is another device's too")),
            Some(None) => Ok(()),
        }
    }

    /// Puts a restored function into a slot that has been checked, with its BAR mapped at `bar`.
    ///
    /// # Errors
    /// When no BAR can be there.
    pub fn put_back(root: &Mutex<Self>, slot: usize, function: VirtioPci, bar: BarAddress) -> Result<(), StateError> {
        let wrong = |problem| Err(StateError::new("config", problem));
        let (windows, mmio) = {
            let root = lock(root);
            (root.windows, root.mmio.upgrade())
        };
        Self::insert(root, slot, function);
        let (Some(bar), Some(mmio)) = (bar, mmio) else { return Ok(()) };
        if !is_within(&windows, bar) {
            return wrong(format!("a BAR at {bar:#x} is outside of the bridge's windows"));
        }
        let Some(shared) = lock(root).slots[slot].clone() else { return Ok(()) };
        if !mmio.insert(bar, BAR_SIZE, shared.clone()) {
            return wrong(format!("a BAR at {bar:#x} would cover another device"));
        }
        let mut function = lock(&shared);
        function.mapped = Some(bar);
        if let Some(virtio) = &mut function.virtio {
            virtio.map_doorbells(Some(bar));
        }
        Ok(())
    }

    /// Does something with the function in a slot, if there is one.
    pub fn with<T>(root: &Mutex<Self>, slot: usize, what: impl FnOnce(&mut VirtioPci) -> T) -> Option<T> {
        let shared = lock(root).slots.get(slot)?.clone()?;
        let mut function = lock(&shared);
        let Function { virtio, .. } = &mut *function;
        virtio.as_mut().map(what)
    }
}
