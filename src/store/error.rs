//! What can be wrong with named VMs.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::DefinitionError;

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("there is no place for VMs: neither XDG_STATE_HOME nor HOME says where")]
    NoPlace,
    #[error(
        "a VM cannot be called '{0}': a name has 1 to 48 letters, digits, '-', '_' and '.', and begins with a letter or digit"
    )]
    Name(String),
    #[error("there is no VM '{0}'")]
    Unknown(String),
    #[error("there is a VM '{0}' already")]
    Exists(String),
    #[error("the VM '{0}' runs")]
    Running(String),
    #[error("the VM '{0}' does not run")]
    NotRunning(String),
    #[error("the VM '{0}' is being changed by another command")]
    Busy(String),
    #[error("the definition {} cannot be used", path.display())]
    Definition { path: PathBuf, source: DefinitionError },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl StoreError {
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// What a user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown(_) => "'tranche ls' lists those there are".into(),
            Self::Exists(name) => format!("'tranche rm {name}' removes it; or take another name"),
            Self::Running(name) => format!("'tranche stop {name}' stops it"),
            Self::NotRunning(name) => format!("'tranche start {name}' starts it"),
            Self::Busy(_) => "wait until that is done".into(),
            Self::Definition { .. } => "'tranche inspect' of another VM shows what one looks like".into(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "it has to be a directory of yours".into()
            }
            Self::NoPlace | Self::Name(_) | Self::Io { .. } => return None,
        })
    }
}
