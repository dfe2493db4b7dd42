//! Why a call cannot be done.

use std::error::Error;

use thiserror::Error;

use super::Work;
use crate::config::OverrideError;
use crate::config::firecracker::InvalidValue;
use crate::machine::{MachineError, SaveError};
use crate::snapshot::SnapshotError;

#[derive(Debug, Error)]
pub enum Fault {
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    #[error("The VM has ended.")]
    Ended,
    #[error(transparent)]
    Invalid(#[from] InvalidValue),
    #[error("{0} is not supported by this version.")]
    Missing(&'static str),
    #[error("There is no {what} {id:?}.")]
    NoSuch { what: &'static str, id: String },
    #[error("Cannot start a microVM without a kernel: PUT /boot-source first.")]
    NoKernel,
    #[error("Drive {0:?} is the root device already: a VM has one.")]
    SecondRoot(String),
    #[error("The MAC address {mac} is in use by interface {id:?}.")]
    RepeatedMac { mac: String, id: String },
    #[error("The boot arguments have {0} bytes with what is appended: 2048 at most.")]
    BootArguments(usize),
    #[error("Devices come and go on PCI only: start with --enable-pci.")]
    NoHotplug,
    #[error("Metrics have been set up already.")]
    RepeatedMetrics,
    #[error("Cannot open {path}: {source}")]
    Open { path: String, source: std::io::Error },
    #[error("{}", chain(.0))]
    Machine(#[from] MachineError),
    #[error("{}", chain(.0))]
    Save(#[from] SaveError),
    #[error(transparent)]
    Override(OverrideError),
    #[error("{}", chain(.0))]
    Snapshot(#[from] SnapshotError),
    #[error(
        "Disk {0:?} lies in a file without a name, which goes with this VM: save the VM with its disks (tranche snapshot \
         create), or restore it with a directory for them (--disks)."
    )]
    NamelessDisk(String),
    #[error("The VM is {}: ask again when that is done.", .0.name())]
    Busy(Work),
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Size(String),
}

/// What sort of failure it is, for APIs that tell by a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The request makes no sense.
    Invalid,
    NotFound,
    /// It would make sense at another time.
    Conflict,
    /// It is understood, and not there.
    Missing,
    /// The host does not let us.
    Host,
}

impl Fault {
    #[must_use]
    pub fn kind(&self) -> FaultKind {
        match self {
            Self::AfterStart
            | Self::BeforeStart
            | Self::Ended
            | Self::NoKernel
            | Self::SecondRoot(_)
            | Self::RepeatedMac { .. }
            | Self::RepeatedMetrics
            | Self::NoHotplug
            | Self::Busy(_)
            | Self::NamelessDisk(_)
            | Self::Conflict(_) => FaultKind::Conflict,
            Self::Invalid(_) | Self::BootArguments(_) | Self::Open { .. } => FaultKind::Invalid,
            Self::Save(SaveError::NotPaused(_) | SaveError::Busy(_)) | Self::Snapshot(SnapshotError::Exists(_)) => {
                FaultKind::Conflict
            }
            Self::Save(SaveError::State(_) | SaveError::Memory(_) | SaveError::Disk { .. })
            | Self::Snapshot(SnapshotError::Write { .. } | SnapshotError::Overlay { .. }) => FaultKind::Host,
            Self::Snapshot(_) | Self::Override(_) | Self::Size(_) => FaultKind::Invalid,
            Self::NoSuch { .. } => FaultKind::NotFound,
            Self::Missing(_) => FaultKind::Missing,
            Self::Machine(error) => match error {
                MachineError::Kvm(_) | MachineError::Cpu(_) | MachineError::Host { .. } | MachineError::Memory(_) => {
                    FaultKind::Host
                }
                _ => FaultKind::Invalid,
            },
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&e| e.source()).map(ToString::to_string);
    std::iter::once(error.to_string()).chain(causes).collect::<Vec<_>>().join(": ")
}
