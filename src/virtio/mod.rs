//! The virtio 1.2 device contract, its queues, and the two transports.

pub mod core;
pub mod device;
pub mod doorbells;
pub mod mmio;
pub mod pci;
pub mod queue;
pub mod signals;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
pub(crate) mod tests;

pub use device::{DeviceEvents, DeviceKind, QueueLayout, QueueResources, QueueState, StillBusy, VirtioDevice};
pub use doorbells::Doorbells;
pub use queue::{Chain, RingError, Virtqueue};
pub use state::{OwnStateV1, StateError};

/// Feature bits every device offers (virtio 1.2, section 6).
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    /// What the queues themselves implement, for any device.
    pub const RING: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}
