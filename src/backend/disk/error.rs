//! Why a disk cannot be used, and what the user may do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::SECTOR;

#[derive(Debug, Error)]
pub enum DiskError {
    #[error("cannot open disk {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} is {what}, not a disk image or block device", path.display())]
    NotADisk { path: PathBuf, what: &'static str },
    #[error("disk {} is in use already", path.display())]
    Locked { path: PathBuf, read_only: bool },
    #[error("cannot lock disk {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("cannot find out the size of disk {}", path.display())]
    Size { path: PathBuf, source: io::Error },
    #[error("cannot use io_uring for disk {}", path.display())]
    Uring { path: PathBuf, source: io::Error },
    #[error("disk {} is smaller than one sector of {SECTOR} bytes", path.display())]
    Empty { path: PathBuf },
}

impl DiskError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open { path, source } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some(format!("if reading is enough, attach it read-only: {},ro", path.display()))
                }
                io::ErrorKind::NotFound => Some(format!("an empty disk is made by: truncate -s 1G {}", path.display())),
                _ => None,
            },
            Self::Locked { path, read_only: false } => {
                Some(format!("several VMs can share a disk only if all attach it read-only: {},ro", path.display()))
            }
            Self::Locked { read_only: true, .. } => Some("another VM holds it for writing".into()),
            Self::Uring { source, .. } => Some(super::uring::hint(source).into()),
            Self::NotADisk { .. } => Some("give a raw disk image or a block device".into()),
            Self::Empty { path } => Some(format!("give it a size: truncate -s 1G {}", path.display())),
            _ => None,
        }
    }
}
