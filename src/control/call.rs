//! What can be asked, and answered.

use std::path::PathBuf;

use crate::backend::{HostFile, Right};
use crate::config::firecracker as fc;
use crate::snapshot::{NewFiles, NewFolder};

use super::{Drives, Fault, ResizeRequest, RestoreRequest, SnapshotRequest};

/// A request to the owner. Bodies are checked as far as they can be by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Id, state and version of the VM.
    GetInstance,
    GetVersion,
    /// The whole configuration.
    GetDescription,
    GetMachineConfig,
    PutMachineConfig(fc::MachineConfig),
    PatchMachineConfig(fc::MachineConfigPatch),
    PutCpuConfig(fc::CpuConfig),
    PutBootSource(fc::BootSource),
    PutDrive(Box<fc::Drive>),
    PatchDrive(fc::DrivePatch),
    DeleteDrive(String),
    PutNetwork(Box<fc::NetworkInterface>),
    PatchNetwork(fc::NetworkPatch),
    DeleteNetwork(String),
    PutEntropy(fc::Entropy),
    PutSerial(fc::Serial),
    PutLogger(fc::Logger),
    PutMetrics(fc::Metrics),
    Act(fc::ActionType),
    SetState(fc::WantedState),
    /// Something that is not there yet: what, and when it could be asked for.
    Missing(&'static str, When),
    /// State, lifecycle and devices, as our own API shows them.
    GetVm,
    GetMetrics,
    Power(Power),
    Resize(ResizeRequest),
    Snapshot(SnapshotRequest),
    Restore(RestoreRequest),
    /// A snapshot in two files.
    CreateFiles(fc::SnapshotCreate),
    LoadFiles(Box<fc::SnapshotLoad>),
}

/// When a call has a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Before,
    After,
    Always,
}

/// What a machine's power can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// Starts the VM.
    On,
    /// Presses the power button.
    Off,
    /// Presses the reset button: the VM starts anew, with nothing in its memory.
    Reset,
    /// Pulls the plug.
    Kill,
}

/// What comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// A JSON document.
    Json(String),
    /// Metrics, as Prometheus reads them.
    Text(String),
}

/// Whoever waits for the answer; called once, from any thread, and does not block.
pub type Answerer = Box<dyn FnOnce(Result<Answer, Fault>) + Send>;

impl Call {
    /// Does it change nothing? Then it is answered from what is published.
    #[must_use]
    pub fn only_asks(&self) -> bool {
        matches!(
            self,
            Self::GetInstance
                | Self::GetVersion
                | Self::GetDescription
                | Self::GetMachineConfig
                | Self::GetVm
                | Self::GetMetrics
        )
    }

    /// What a VM may ask its host for because a client has named it, call by call as groups of what is done once. Calls from
    /// before the start name nothing: until then, a VM asks for what it likes. `drives` are those there are.
    #[must_use]
    pub fn named(&self, drives: &Drives) -> Vec<Vec<Right>> {
        let disk = |path: &PathBuf, read_only| Right::Open(HostFile::Disk { path: path.clone(), read_only });
        match self {
            Self::PutDrive(drive) => {
                let path = drive.path_on_host.iter();
                vec![path.map(|path| disk(path, drive.is_read_only.unwrap_or(false))).collect()]
            }
            Self::PatchDrive(patch) => {
                let read_only = drives.get(&patch.drive_id).copied().unwrap_or(true);
                patch.path_on_host.iter().map(|path| vec![disk(path, read_only)]).collect()
            }
            Self::PutNetwork(nic) => vec![vec![Right::JoinTap(nic.host_dev_name.clone())]],
            Self::Snapshot(request) => vec![NewFolder::rights(&request.path)],
            Self::CreateFiles(request) => NewFiles::rights(&request.snapshot_path, &request.mem_file_path),
            Self::GetInstance
            | Self::GetVersion
            | Self::GetDescription
            | Self::GetMachineConfig
            | Self::PutMachineConfig(_)
            | Self::PatchMachineConfig(_)
            | Self::PutCpuConfig(_)
            | Self::PutBootSource(_)
            | Self::DeleteDrive(_)
            | Self::PatchNetwork(_)
            | Self::DeleteNetwork(_)
            | Self::PutEntropy(_)
            | Self::PutSerial(_)
            | Self::PutLogger(_)
            | Self::PutMetrics(_)
            | Self::Act(_)
            | Self::SetState(_)
            | Self::Missing(..)
            | Self::GetVm
            | Self::GetMetrics
            | Self::Power(_)
            | Self::Resize(_)
            | Self::Restore(_)
            | Self::LoadFiles(_) => Vec::new(),
        }
    }

    pub fn when(&self) -> When {
        match self {
            Self::GetInstance
            | Self::GetVersion
            | Self::GetDescription
            | Self::GetMachineConfig
            | Self::PutDrive(_)
            | Self::PutNetwork(_)
            | Self::GetVm
            | Self::GetMetrics
            | Self::Resize(_)
            | Self::Power(_) => When::Always,
            Self::PutMachineConfig(_)
            | Self::PatchMachineConfig(_)
            | Self::PutCpuConfig(_)
            | Self::PutBootSource(_)
            | Self::PutEntropy(_)
            | Self::PutSerial(_)
            | Self::PutLogger(_)
            | Self::PutMetrics(_)
            | Self::Restore(_)
            | Self::LoadFiles(_)
            | Self::Act(fc::ActionType::InstanceStart) => When::Before,
            Self::PatchDrive(_)
            | Self::DeleteDrive(_)
            | Self::PatchNetwork(_)
            | Self::DeleteNetwork(_)
            | Self::Act(fc::ActionType::FlushMetrics | fc::ActionType::SendCtrlAltDel)
            | Self::SetState(_)
            | Self::Snapshot(_)
            | Self::CreateFiles(_) => When::After,
            Self::Missing(_, when) => *when,
        }
    }
}
