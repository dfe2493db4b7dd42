//! What the host has left for a larger VM.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{statfs, statvfs};
use serde::Serialize;

use crate::config::MemorySize;

/// Just now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostLeft {
    pub cpus: usize,
    pub memory_total: MemorySize,
    /// Without swapping.
    pub memory_available: MemorySize,
    pub disks: Vec<DiskLeft>,
}

/// Of the file system that a disk is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskLeft {
    pub path: PathBuf,
    pub free: MemorySize,
}

/// File systems whose files can share blocks: of btrfs and XFS.
const SHARING: [i64; 2] = [0x9123_683e, 0x5846_5342];

impl HostLeft {
    pub(super) fn look() -> Self {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = memory.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib: Option<u64> = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
            MemorySize(kib.unwrap_or(0).saturating_mul(1024))
        };
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_total: field("MemTotal"),
            memory_available: field("MemAvailable"),
            disks: Vec::new(),
        }
    }

    /// Free space beside a disk's file, as far as it can be told; it is shown from then on.
    pub(super) fn look_at_disk(&mut self, path: &Path) -> Option<MemorySize> {
        let space = statvfs(path).ok()?;
        let free = MemorySize(space.f_bavail.saturating_mul(space.f_frsize));
        self.disks.push(DiskLeft { path: path.to_owned(), free });
        Some(free)
    }

    /// Can a copy of this file share its blocks?
    #[expect(clippy::unused_self, reason = "it is the host's")]
    pub(super) fn shares_blocks(&self, path: &Path) -> bool {
        statfs(path).is_ok_and(|about| SHARING.contains(&about.f_type))
    }
}

impl fmt::Display for HostLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (available, total) = (self.memory_available.rounded(), self.memory_total.rounded());
        writeln!(f, "the host has left: {available} of {total} of memory, {} CPUs", self.cpus)?;
        self.disks.iter().try_for_each(|disk| writeln!(f, "  {} beside {}", disk.free.rounded(), disk.path.display()))
    }
}
