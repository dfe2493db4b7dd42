//! Bodies of devices and features that are not there yet: they are read with the same care as the others, so that a
//! client learns of its own mistakes first.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{InvalidValue, RateLimiter, check_id};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    pub id: String,
    #[cfg_attr(test, schema(value_type = String))]
    pub path_on_host: PathBuf,
    #[serde(default)]
    pub root_device: bool,
    #[serde(default)]
    pub read_only: bool,
    pub rate_limiter: Option<RateLimiter>,
}

impl Pmem {
    pub fn check(&self) -> Result<(), InvalidValue> {
        check_id(&self.id)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    pub id: String,
    pub rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    pub guest_cid: u32,
    #[cfg_attr(test, schema(value_type = String))]
    pub uds_path: PathBuf,
    /// Deprecated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

impl Vsock {
    pub fn check(&self) -> Result<(), InvalidValue> {
        if self.guest_cid < 3 {
            return Err(InvalidValue::Other(format!("The guest CID {} is invalid: 0 to 2 are taken.", self.guest_cid)));
        }
        self.vsock_id.as_deref().map_or(Ok(()), check_id)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    pub amount_mib: u32,
    pub deflate_on_oom: bool,
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    #[serde(default)]
    pub free_page_hinting: bool,
    #[serde(default)]
    pub free_page_reporting: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    pub amount_mib: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsPatch {
    pub stats_polling_interval_s: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

const fn yes() -> bool {
    true
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct HotplugMemory {
    pub total_size_mib: u64,
    #[serde(default = "slot_size")]
    pub slot_size_mib: u64,
    #[serde(default = "block_size")]
    pub block_size_mib: u64,
}

const fn slot_size() -> u64 {
    128
}

const fn block_size() -> u64 {
    2
}

impl HotplugMemory {
    pub fn check(&self) -> Result<(), InvalidValue> {
        let wrong = |text: &str| Err(InvalidValue::Other(text.into()));
        if self.slot_size_mib < slot_size() || !self.slot_size_mib.is_power_of_two() {
            return wrong("slot_size_mib has to be a power of two of at least 128.");
        }
        if self.block_size_mib < block_size() || !self.block_size_mib.is_power_of_two() {
            return wrong("block_size_mib has to be a power of two of at least 2.");
        }
        if self.total_size_mib == 0 || !self.total_size_mib.is_multiple_of(self.slot_size_mib) {
            return wrong("total_size_mib has to be a multiple of slot_size_mib.");
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct HotplugMemoryPatch {
    pub requested_size_mib: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum MmdsVersion {
    #[default]
    V1,
    V2,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    #[serde(default)]
    pub version: MmdsVersion,
    pub network_interfaces: Vec<String>,
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub ipv4_address: Option<Ipv4Addr>,
    #[serde(default)]
    pub imds_compat: bool,
}

impl MmdsConfig {
    /// Version 1 is.
    #[must_use]
    pub fn is_deprecated(&self) -> bool {
        self.version == MmdsVersion::V1
    }
}
