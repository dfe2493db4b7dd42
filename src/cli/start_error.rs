//! Why a VM with an API does not start.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::exit::{self, Exit};
use crate::backend::netns::NetNamespaceError;
use crate::config::OverrideError;
use crate::control::Fault;
use crate::jail::JailError;
use crate::kernels::KernelsError;
use crate::machine::MachineError;
use crate::resize::ResizeError;
use crate::snapshot::SnapshotError;
use crate::store::StoreError;

#[derive(Debug, Error)]
pub enum StartError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("cannot listen on the API socket {}", path.display())]
    ApiSocket { path: PathBuf, source: io::Error },
    #[error("cannot read the description of the VM, {}", path.display())]
    Description { path: PathBuf, source: Box<dyn Error + Send + Sync> },
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("cannot change what the saved VM is on")]
    Override(#[source] OverrideError),
    #[error(transparent)]
    Network(#[from] NetNamespaceError),
    #[error(transparent)]
    Kernels(#[from] KernelsError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Resize(#[from] ResizeError),
    #[error("the VMM cannot be jailed")]
    Jail(#[source] JailError),
    #[error("the VM cannot be as it is described")]
    Fault(#[source] Fault),
}

impl From<Fault> for StartError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Machine(error) => Self::Machine(error),
            Fault::Snapshot(error) => Self::Snapshot(error),
            fault => Self::Fault(fault),
        }
    }
}

impl StartError {
    /// Prints why, and tells the exit code.
    pub fn report(&self) -> Exit {
        let (exit, hint) = match self {
            Self::Machine(error) => return exit::report(error),
            Self::Snapshot(error) => return super::snapshot::report(error),
            Self::Resize(error) => return super::vm::report_resize(error),
            Self::Kernels(error) => return exit::report_kernels(error),
            Self::Store(error) => return exit::report_store(error),
            Self::Override(_) => (Exit::Usage, Some("'tranche snapshot inspect DIR' shows what it has")),
            Self::Network(error) => (Exit::TapUnusable, Some(error.hint())),
            Self::ApiSocket { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                (Exit::ApiSocket, Some("another VM listens there, or it is no socket: give another path"))
            }
            Self::ApiSocket { .. } => (
                Exit::ApiSocket,
                Some("give a path of at most 107 bytes, in a directory that exists and is yours to write to"),
            ),
            Self::Description { .. } => (Exit::Description, Some("docs/api.md has an example of such a file")),
            Self::Jail(error) => (Exit::NoJail, error.hint()),
            Self::Fault(_) => (Exit::Description, None),
        };
        exit::report_with(self, exit, hint.map(str::to_owned))
    }
}
