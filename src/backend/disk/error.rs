//! Why a disk cannot be used, and what the user may do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::SECTOR;
use super::qcow2::header::ImageError;

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
    #[error("disk {} comes too late for io_uring: the jail has no ring left", path.display())]
    NoRing { path: PathBuf },
    #[error("disk {} is smaller than one sector of {SECTOR} bytes", path.display())]
    Empty { path: PathBuf },
    #[error("disk {} begins like a qcow2 image, and its format is not given", path.display())]
    LooksLikeQcow2 { path: PathBuf, option: &'static str },
    #[error("cannot use the qcow2 image {}", path.display())]
    Image { path: PathBuf, source: ImageError },
    #[error("the qcow2 image {} has a backing file, which it calls '{}', and none is named here", path.display(), name.escape_debug())]
    BackingNotNamed { path: PathBuf, name: String, format: Option<String> },
    #[error("disk {} has no backing file behind it, and one is named", path.display())]
    NoBacking { path: PathBuf },
    #[error("the backing file of {} is of format '{}', which has to be said", path.display(), format.escape_debug())]
    BackingFormat { path: PathBuf, format: String },
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
            Self::LooksLikeQcow2 { option, .. } => {
                Some(format!("say {option}=qcow2, or {option}=raw to take its bytes as they are"))
            }
            Self::Image { source: ImageError::Dirty, path } => Some(format!(
                "attach it once without ro, or: tranche disk repair {}, to count its clusters anew",
                path.display()
            )),
            Self::Image { source: ImageError::ReadOnly(_), path } => Some(format!(
                "attach it read-only, or copy it: tranche disk convert --from qcow2 --to qcow2 {} NEW",
                path.display()
            )),
            Self::Image { source: ImageError::NotQcow2, .. } => Some("if it is a raw disk, say format=raw".into()),
            Self::Image { source: ImageError::Damaged(_), path } => {
                Some(format!("look at it with: qemu-img check {}", path.display()))
            }
            Self::Image { .. } => Some("copy it to what can be used: qemu-img convert -O qcow2 OLD NEW".into()),
            Self::BackingNotNamed { format, .. } => Some(format!(
                "add backing=PATH,backing-format={}",
                format.as_deref().filter(|format| ["raw", "qcow2"].contains(format)).unwrap_or("raw, or qcow2")
            )),
            Self::NoBacking { .. } => Some("take backing= away".into()),
            Self::BackingFormat { .. } => Some("add backing-format=qcow2, or raw, if that is what it is".into()),
            Self::Empty { path } => Some(format!("give it a size: truncate -s 1G {}", path.display())),
            _ => None,
        }
    }
}
