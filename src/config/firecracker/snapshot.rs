//! Bodies of requests about snapshots.

use std::path::PathBuf;

use serde::Deserialize;

use super::InvalidValue;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum SnapshotType {
    #[default]
    Full,
    Diff,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    #[cfg_attr(test, schema(value_type = String))]
    pub snapshot_path: PathBuf,
    #[cfg_attr(test, schema(value_type = String))]
    pub mem_file_path: PathBuf,
    #[serde(default)]
    pub snapshot_type: SnapshotType,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum MemoryBackendType {
    File,
    Uffd,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    pub backend_type: MemoryBackendType,
    #[cfg_attr(test, schema(value_type = String))]
    pub backend_path: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct VsockOverride {
    #[cfg_attr(test, schema(value_type = String))]
    pub uds_path: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    #[cfg_attr(test, schema(value_type = String))]
    pub snapshot_path: PathBuf,
    pub mem_backend: Option<MemoryBackend>,
    /// Deprecated.
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub mem_file_path: Option<PathBuf>,
    /// Also by the name that it had once.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    #[serde(default)]
    pub resume_vm: bool,
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    pub vsock_override: Option<VsockOverride>,
    #[serde(default)]
    pub clock_realtime: bool,
}

impl SnapshotLoad {
    pub fn check(&self) -> Result<(), InvalidValue> {
        match (&self.mem_backend, &self.mem_file_path) {
            (None, None) => Err(InvalidValue::Other("Either mem_backend or mem_file_path has to be given.".into())),
            (Some(_), Some(_)) => Err(InvalidValue::Other("mem_backend and mem_file_path exclude each other.".into())),
            _ => Ok(()),
        }
    }
}
