//! Drives.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{InvalidValue, RateLimiter, check_id};
use crate::config::{CacheMode, DiskConfig, DiskFormat, Image, IoEngine};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    pub drive_id: String,
    pub partuuid: Option<String>,
    pub is_root_device: bool,
    pub cache_type: Option<CacheType>,
    pub is_read_only: Option<bool>,
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub path_on_host: Option<PathBuf>,
    pub rate_limiter: Option<RateLimiter>,
    pub io_engine: Option<DriveEngine>,
    /// Of a vhost-user back end.
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub socket: Option<PathBuf>,
}

/// Does the drive offer flushes?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum CacheType {
    Unsafe,
    Writeback,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum DriveEngine {
    Sync,
    Async,
}

/// A change of a drive that the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    pub drive_id: String,
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub path_on_host: Option<PathBuf>,
    pub rate_limiter: Option<RateLimiter>,
}

/// Longest serial number of a virtio disk, in bytes.
const SERIAL_BYTES: usize = 20;

impl Drive {
    pub fn check(&self) -> Result<(), InvalidValue> {
        check_id(&self.drive_id)?;
        if self.socket.is_some() {
            return Err(InvalidValue::VhostUser);
        }
        if self.path_on_host.as_ref().is_none_or(|path| path.as_os_str().is_empty()) {
            return Err(InvalidValue::NoPath);
        }
        match &self.partuuid {
            Some(_) if !self.is_root_device => Err(InvalidValue::PartuuidOfOther),
            // It becomes a part of the kernel's command line.
            Some(uuid) if uuid.is_empty() || !uuid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') => {
                Err(InvalidValue::Partuuid(uuid.clone()))
            }
            _ => Ok(()),
        }
    }

    /// The same with defaults in the place of what was left out, as it is shown.
    #[must_use]
    pub fn with_defaults(mut self) -> Self {
        self.cache_type.get_or_insert(CacheType::Unsafe);
        self.is_read_only.get_or_insert(false);
        self.io_engine.get_or_insert(DriveEngine::Sync);
        self
    }

    /// The disk, which the guest knows by the start of the drive's id as its serial number.
    #[must_use]
    pub fn disk(&self) -> DiskConfig {
        let serial: String = self.drive_id.chars().filter(char::is_ascii).take(SERIAL_BYTES).collect();
        DiskConfig {
            path: self.path_on_host.clone().unwrap_or_default(),
            read_only: self.is_read_only.unwrap_or(false),
            id: (!serial.is_empty()).then_some(serial),
            cache: match self.cache_type {
                Some(CacheType::Writeback) => CacheMode::Writeback,
                Some(CacheType::Unsafe) | None => CacheMode::Unsafe,
            },
            engine: match self.io_engine {
                Some(DriveEngine::Async) => IoEngine::IoUring,
                Some(DriveEngine::Sync) | None => IoEngine::Sync,
            },
            queues: 1,
            root: self.is_root_device,
            // What Firecracker attaches is raw, and never looked at.
            image: Image { format: Some(DiskFormat::Raw), backing: Vec::new() },
            limits: RateLimiter::limits(self.rate_limiter),
        }
    }

    /// What the kernel is told of a root device.
    #[must_use]
    pub fn root_argument(&self) -> String {
        let way = if self.is_read_only.unwrap_or(false) { "ro" } else { "rw" };
        match &self.partuuid {
            Some(uuid) => format!("root=PARTUUID={uuid} {way}"),
            None => format!("root=/dev/vda {way}"),
        }
    }
}

impl DrivePatch {
    pub fn check(&self) -> Result<(), InvalidValue> {
        check_id(&self.drive_id)
    }
}
