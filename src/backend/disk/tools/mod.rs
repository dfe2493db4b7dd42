//! What is done to disks while no VM has them: make, look at, resize, copy.
//!
//! These run as their user, outside of any VM, and so open the files that they make by themselves.

mod convert;
mod create;
mod info;
mod new_file;
mod resize;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{DiskError, SECTOR};

pub use self::convert::{Source, convert};
pub use self::create::{create, make_overlay};
pub use self::info::{DiskInfo, Use, info};
pub use self::resize::{look, open_alone, repair, resize};

#[derive(Debug, Error)]
pub enum ToolError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("{} is there already", path.display())]
    Exists { path: PathBuf },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{size} bytes are not a size for a disk: {what}")]
    Size { size: u64, what: &'static str },
    #[error("{} has {from} bytes: to make it smaller cuts off what is behind {to} bytes", path.display())]
    Shrink { path: PathBuf, from: u64, to: u64 },
    #[error("a qcow2 image cannot be made smaller")]
    ShrinkQcow2,
    #[error("{} is a block device, whose size is not ours to change", path.display())]
    BlockDevice { path: PathBuf },
    #[error("the name of the backing file {} is not UTF-8, or too long for an image to hold", path.display())]
    BackingName { path: PathBuf },
}

impl ToolError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Disk(error) => error.hint(),
            Self::Exists { .. } => Some("give another name, or --force to replace it".into()),
            Self::Size { .. } => Some("give a size such as 10G".into()),
            Self::Shrink { .. } => Some("make its file systems smaller first, then give --shrink".into()),
            Self::ShrinkQcow2 => Some("convert it to raw, and make that smaller".into()),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room there, or give a place on another file system".into())
            }
            Self::Write { .. } => Some("give a path in a directory that exists and is yours to write to".into()),
            Self::BlockDevice { .. } => Some("give a file".into()),
            Self::BackingName { .. } => Some("give it another name, or a shorter path".into()),
            Self::Read { .. } => Some("is its disk in order? 'dmesg' may tell".into()),
        }
    }
}

/// Sizes are whole sectors, so that no disk loses its tail, and small enough for every tool around.
fn check_size(size: u64) -> Result<(), ToolError> {
    const LARGEST: u64 = 1 << 50;
    match size {
        0 => Err(ToolError::Size { size, what: "it has to be one sector of 512 bytes at least" }),
        _ if !size.is_multiple_of(SECTOR) => Err(ToolError::Size { size, what: "it has to be a multiple of 512" }),
        _ if size > LARGEST => Err(ToolError::Size { size, what: "1 PiB is the most" }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
