//! A machine at rest: a directory that holds all of a VM, and can be restored many times.
//!
//! ```text
//! NAME/
//!   manifest.json   what this is: format, creator, what it needs of a CPU, each part with its size and checksum
//!   config.json     what a person reads and may change: disks, networks
//!   state.json      vCPUs, chips and devices, each with its kind and version
//!   memory          guest RAM; what was never touched is a hole
//!   disks/          the files of the disks, which nobody writes to any more
//! ```
//! It is written under another name beside its own, brought to stable storage, and renamed: it is there whole, or not
//! at all. Nothing of it is ever written to again.

mod disks;
mod error;
mod files;
mod folder;
mod manifest;
mod memory_digest;
mod overlay;
#[cfg(test)]
mod tests;

use std::fs::File;

use serde::{Deserialize, Serialize};

pub use self::error::SnapshotError;
pub use self::files::{NewFiles, config_of_state, write_anew};
pub use self::folder::{CONFIG, Folder, NewFolder};
pub use self::manifest::VERSION as FILE_VERSION;
pub use self::manifest::{CpuNeeds, Manifest, PartEntry};
pub use self::overlay::{Overlay, is_nameless};
use crate::config::SavedVm;
use crate::config::firecracker::VmDescription;
use crate::machine::MachineStateV1;

/// All of a VM but its memory and its disks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    pub config: SavedVm,
    pub state: SavedState,
}

/// What is not for people to change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    pub machine: MachineStateV1,
    /// How clients have described the VM.
    pub description: VmDescription,
}

/// A snapshot that can be restored. Memory has not been looked at.
pub struct Snapshot {
    pub config: SavedVm,
    pub state: SavedState,
    pub memory: File,
    /// What is written to its disks goes there.
    pub overlays: Vec<Overlay>,
}

/// A snapshot that is being written. Dropping it leaves nothing behind.
pub enum NewSnapshot {
    Folder(NewFolder),
    Files(NewFiles),
}

impl NewSnapshot {
    /// Where guest memory goes.
    #[must_use]
    pub fn memory(&self) -> &File {
        match self {
            Self::Folder(new) => new.memory(),
            Self::Files(new) => new.memory(),
        }
    }

    /// Brings all of it to stable storage, and to its place. Takes as long as the disk does.
    ///
    /// # Errors
    /// The host's; nothing is left of it then.
    pub fn finish(self, saved: &Saved) -> Result<(), SnapshotError> {
        match self {
            Self::Folder(new) => new.finish(saved),
            Self::Files(new) => new.finish(saved),
        }
    }
}
