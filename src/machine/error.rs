//! Why a machine cannot be built.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::devices::{DeviceBusy, DeviceId, RestoreError};
use super::pager::PagerError;
use super::saved::StateError;
use crate::backend::disk::DiskError;
use crate::backend::passt::PasstError;
use crate::backend::tap::TapError;
use crate::backend::vhost::VhostError;
use crate::boot::BootError;
use crate::config::{ConfigError, MAX_DEVICES};
use crate::cpu::CpuError;
use crate::memory::MemoryError;
use crate::platform::acpi::AcpiError;

#[derive(Debug, Error)]
pub enum MachineError {
    #[error("the VM's configuration is not valid")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Vhost(#[from] VhostError),
    #[error(transparent)]
    Passt(#[from] PasstError),
    #[error("cannot open the serial port's output {}", path.display())]
    Serial { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    Plug(#[from] PlugError),
    #[error(transparent)]
    Busy(#[from] DeviceBusy),
    #[error(transparent)]
    Pager(#[from] PagerError),
    #[error("the VM's saved devices cannot be restored")]
    Restore(#[from] RestoreError),
    #[error("the saved VM's {place} is not there as it was")]
    NotThere {
        /// As it is overridden: `disk.NAME` or `net.NAME`.
        place: String,
        source: Box<MachineError>,
    },
    #[error("the saved VM cannot go on here")]
    State(#[from] StateError),
    #[error("{request} means nothing while the VM is {state}")]
    NotNow { request: &'static str, state: &'static str },
    #[error("the host has no resources left to {what}")]
    Host { what: &'static str, source: io::Error },
}

/// Why a device cannot come or go.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlugError {
    #[error("the VM has no PCI bus, and devices come and go on that alone")]
    NoPci,
    #[error("the PCI bus has no free slot: it has {MAX_DEVICES}")]
    NoSlot,
    #[error("there is a {0} already")]
    IdInUse(DeviceId),
    #[error("the guest has not let go of the {0} that there is")]
    Leaving(DeviceId),
    #[error("there is no {0}")]
    Unknown(DeviceId),
    #[error("the {0} is read-only, or no raw disk: it gets another size while its VM is stopped")]
    FixedSize(DeviceId),
    #[error("the {id} has {bytes} bytes: while its VM runs it becomes larger, by whole sectors of 512 bytes")]
    Size { id: DeviceId, bytes: u64 },
}

/// What is wrong with KVM on this host.
#[derive(Debug, Error)]
pub enum KvmError {
    #[error("this host has no KVM: cannot open /dev/kvm")]
    Missing(#[source] io::Error),
    #[error("no permission to use /dev/kvm")]
    Permission(#[source] io::Error),
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    #[error("/dev/kvm is not the device of KVM")]
    NotKvm(#[source] io::Error),
    #[error("/dev/kvm speaks version {0} of the KVM API, not 12")]
    Version(i32),
    #[error("this host's KVM lacks {0}")]
    Capability(&'static str),
    #[error("this host's KVM lacks capability {0}, which the CPU configuration asks for")]
    WantedCapability(u32),
    #[error("this host's KVM runs at most {max} vCPUs in a VM, not {wanted}")]
    Cpus { wanted: u8, max: usize },
    #[error("KVM could not {what}")]
    Call { what: &'static str, source: io::Error },
}

impl MachineError {
    pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

impl KvmError {
    pub(super) fn call(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Call { what, source: error.into() }
    }
}
