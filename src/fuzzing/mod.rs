//! What fuzzers drive. Each function does with any bytes what Tranche does with those of a guest, a file or a user:
//! it must come to an end, without a panic.
//!
//! - [`queues`]: rings and requests in guest memory, served by a device's engine
//! - [`pci`], [`mmio`]: accesses of a guest to a machine's devices
//! - [`states`]: the saved state of a device
//! - [`snapshots`]: a snapshot's documents
//! - [`kernel`], [`package`], [`qcow2`], [`root`], [`layout`]: files, and disks that a guest brings
//! - [`options`]: what a user types
//! - [`http`]: what comes over the API's socket
//!
//! Compiled for tests, which replay what was once found, and with the feature `fuzzing`, which no release has.

mod disks;
mod files;
mod input;
mod machine;
mod memory_files;
mod messages;
mod queues;
#[cfg(feature = "fuzzing")]
mod recorder;
#[cfg(test)]
mod seeds;
mod snapshots;
mod states;
#[cfg(test)]
mod tests;

pub use self::disks::{layout, qcow2, root};
pub use self::files::{kernel, options, package};
pub use self::machine::{mmio, pci};
pub use self::messages::http;
pub use self::queues::queues;
#[cfg(feature = "fuzzing")]
pub use self::recorder::recorded;
pub use self::snapshots::snapshots;
pub use self::states::states;
