//! What can be wrong with a snapshot.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::backend::disk::tools::ToolError;

#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no snapshot: it has no manifest.json", .0.display())]
    NotASnapshot(PathBuf),
    #[error("{} is of version {version}, and this release knows {known}", path.display())]
    Version { path: PathBuf, version: u32, known: u32 },
    #[error("{} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{} says that disk '{disk}' lies in '{}', which is no part of the snapshot", path.display(), file.display())]
    NotAPart { path: PathBuf, disk: String, file: PathBuf },
    #[error("there is no place for what the VM writes to its disk '{disk}'")]
    Overlay { disk: String, source: Box<ToolError> },
    #[error("{} does not say what it should", path.display())]
    Syntax { path: PathBuf, source: serde_json::Error },
}

impl SnapshotError {
    /// What a user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Exists(_) => "a snapshot never replaces another: give a new name, or remove the old one",
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "nothing was left behind: make room, or give a place on another file system"
            }
            Self::Write { .. } => "give a place in a directory that exists and is yours to write to",
            Self::Read { .. } | Self::NotASnapshot(_) => "give a directory that 'tranche snapshot create' has made",
            Self::Version { .. } => "use the release that made it, or a newer one",
            Self::Damaged { .. } => "fetch or copy the snapshot again; 'tranche snapshot verify' checks all of it",
            Self::Overlay { .. } => {
                "$TMPDIR or /var/tmp, or the directory given for disks, has to have room and be yours to write to"
            }
            Self::NotAPart { .. } => "put the file back as it was, or say \"stored\": false and a path of this host",
            Self::Syntax { .. } => "put the file back as it was, or mend what was changed",
        })
    }
}
