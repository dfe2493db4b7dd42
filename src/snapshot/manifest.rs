//! What a snapshot says of itself.

use serde::{Deserialize, Serialize};

/// The first thing in a manifest.
pub const FORMAT: &str = "tranche-snapshot";
/// Of the directory's layout; states have versions of their own.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    /// The release that made it.
    pub creator: String,
    /// When, as of RFC 3339.
    pub created: String,
    pub cpu: CpuNeeds,
    pub parts: Vec<PartEntry>,
}

/// What it needs of a host's CPU and KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuNeeds {
    pub vendor: String,
    /// By the names in Linux's `/proc/cpuinfo`.
    pub features: Vec<String>,
}

/// A file of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartEntry {
    pub name: String,
    /// In bytes, holes included.
    pub size: u64,
    /// SHA-256 of its bytes; of `memory`, of each page that is not all zeroes, with its number in front.
    pub sha256: String,
}

impl Manifest {
    #[must_use]
    pub fn part(&self, name: &str) -> Option<&PartEntry> {
        self.parts.iter().find(|part| part.name == name)
    }
}

/// This release.
#[must_use]
pub fn creator() -> String {
    concat!("tranche ", env!("CARGO_PKG_VERSION")).into()
}
