//! The common configuration structure (virtio 1.2, 4.1.4.3).
//!
//! Fields are accessed at their own width. 64-bit ones may also be read and written by halves, as drivers do.

use super::msix::{MsixCarrier, NO_VECTOR};
use crate::virtio::core::VirtioCore;
use crate::virtio::signals::Source;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
/// The used ring's address is the last register.
const END: u64 = 0x38;

/// Reads a register; unknown offsets and widths read as zero.
pub fn read(core: &mut VirtioCore, interrupts: &MsixCarrier, offset: u64, data: &mut [u8]) {
    if offset == DEVICE_STATUS && core.settle() {
        interrupts.reset();
    }
    let queue = core.selected_queue();
    let value: u64 = match (offset, data.len()) {
        (DEVICE_FEATURE_SELECT, 4) => core.device_feature_select.into(),
        (DEVICE_FEATURE, 4) => core.device_features().into(),
        (DRIVER_FEATURE_SELECT, 4) => core.driver_feature_select.into(),
        (DRIVER_FEATURE, 4) => core.driver_features().into(),
        (CONFIG_MSIX_VECTOR, 2) => interrupts.vector(Source::Config).into(),
        (NUM_QUEUES, 2) => core.queues.len() as u64,
        (DEVICE_STATUS, 1) => core.status().into(),
        (CONFIG_GENERATION, 1) => core.generation().into(),
        (QUEUE_SELECT, 2) => core.queue_select.into(),
        // A size of zero says that there is no such queue.
        (QUEUE_SIZE, 2) => queue.map_or(0, |q| q.layout.size.into()),
        (QUEUE_MSIX_VECTOR, 2) => selected(core).map_or(NO_VECTOR, |q| interrupts.vector(q)).into(),
        (QUEUE_ENABLE, 2) => queue.map_or(0, |q| q.is_ready().into()),
        (QUEUE_NOTIFY_OFF, 2) => queue.map_or(0, |_| core.queue_select.into()),
        (QUEUE_DESC..END, 4 | 8) => queue.map_or(0, |q| {
            let address = match offset & !7 {
                QUEUE_DESC => q.layout.descriptors,
                QUEUE_DRIVER => q.layout.avail,
                _ => q.layout.used,
            };
            if offset & 4 == 0 { address } else { address >> 32 }
        }),
        _ => 0,
    };
    let bytes = value.to_le_bytes();
    data.fill(0);
    let n = data.len().min(bytes.len());
    data[..n].copy_from_slice(&bytes[..n]);
}

/// Writes a register; unknown offsets and widths, and what is read-only now, are ignored.
pub fn write(core: &mut VirtioCore, interrupts: &MsixCarrier, offset: u64, data: &[u8]) {
    if core.settle() {
        interrupts.reset();
    }
    if core.is_resetting() {
        return;
    }
    let mut bytes = [0; 8];
    let n = data.len().min(bytes.len());
    bytes[..n].copy_from_slice(&data[..n]);
    let value = u64::from_le_bytes(bytes);
    match (offset, data.len()) {
        (DEVICE_FEATURE_SELECT, 4) => core.device_feature_select = value as u32,
        (DRIVER_FEATURE_SELECT, 4) => core.driver_feature_select = value as u32,
        (DRIVER_FEATURE, 4) => core.set_driver_features(value as u32),
        (CONFIG_MSIX_VECTOR, 2) => interrupts.set_vector(Source::Config, value as u16),
        (DEVICE_STATUS, 1) => {
            let was_reset = core.set_status(value as u8);
            if was_reset {
                interrupts.reset();
            }
        }
        (QUEUE_SELECT, 2) => core.queue_select = value as u32,
        (QUEUE_SIZE, 2) => {
            if let Some(queue) = core.queue_to_configure() {
                queue.layout.size = value as u16;
            }
        }
        (QUEUE_MSIX_VECTOR, 2) => {
            if let Some(queue) = selected(core) {
                interrupts.set_vector(queue, value as u16);
            }
        }
        (QUEUE_ENABLE, 2) if value == 1 => core.enable_queue(),
        (QUEUE_DESC..END, 4 | 8) => {
            if let Some(queue) = core.queue_to_configure() {
                let register = match offset & !7 {
                    QUEUE_DESC => &mut queue.layout.descriptors,
                    QUEUE_DRIVER => &mut queue.layout.avail,
                    _ => &mut queue.layout.used,
                };
                *register = merge(*register, offset & 7, data.len(), value);
            }
        }
        _ => {}
    }
}

fn selected(core: &VirtioCore) -> Option<Source> {
    u16::try_from(core.queue_select).ok().map(Source::Queue)
}

/// Replaces the whole of a 64-bit register, or the half that a 4-byte write names.
fn merge(old: u64, offset: u64, len: usize, value: u64) -> u64 {
    match (offset, len) {
        (0, 8) => value,
        (0, _) => old & !0xffff_ffff | value & 0xffff_ffff,
        (4, 4) => old & 0xffff_ffff | value << 32,
        _ => old,
    }
}
