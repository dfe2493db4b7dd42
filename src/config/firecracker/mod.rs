//! A VM as Firecracker's clients describe it: the bodies of its API and its configuration file, which hold the same
//! objects.
//!
//! Unknown fields are refused where Firecracker refuses them. Values that make no sense by themselves are refused
//! here; what depends on other objects or on the host is the owner's to judge.

mod cpu;
mod drives;
mod machine;
mod network;
mod observation;
mod snapshot;
mod to_come;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{self, RateLimits};

pub use self::cpu::{CpuConfig, CpuTemplate, CpuidModifier, MsrModifier, RegisterModifier};
pub use self::drives::{CacheType, Drive, DriveEngine, DrivePatch};
pub use self::machine::{BootSource, HugePages, MachineConfig, MachineConfigPatch};
pub use self::network::{NetworkInterface, NetworkPatch};
pub use self::observation::{Level, Logger, Metrics, Serial};
pub use self::snapshot::{
    MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotCreate, SnapshotLoad, SnapshotType, VsockOverride,
};
pub use self::to_come::{
    Balloon, BalloonPatch, BalloonStatisticsPatch, HintingStart, HotplugMemory, HotplugMemoryPatch, MmdsConfig, Pmem,
    PmemPatch, Vsock,
};

/// A value that cannot be right.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum InvalidValue {
    #[error("API Resource IDs can only contain alphanumeric characters and underscores. {0:?} is something else.")]
    Id(String),
    #[error("An id cannot be empty.")]
    EmptyId,
    #[error("A drive needs path_on_host.")]
    NoPath,
    #[error("Drives with a vhost-user socket are not supported: give path_on_host.")]
    VhostUser,
    #[error("A partuuid only makes sense for the root device.")]
    PartuuidOfOther,
    #[error("{0:?} is not a PARTUUID: letters, digits and '-'.")]
    Partuuid(String),
    #[error("The vCPU number {0} is invalid: it has to be between 1 and 32, and 1 or even with SMT.")]
    VcpuCount(u64),
    #[error("The memory size (MiB) is invalid: it has to be more than 0{}.", if *even { " and even with huge pages of 2M" } else { "" })]
    Memory { even: bool },
    #[error("The CPU template {0:?} is not supported: only None is.")]
    CpuTemplate(String),
    #[error("{0:?} is not the number of a KVM capability: give a decimal number, or one behind a '!'.")]
    Capability(String),
    #[error("{0:?} is not a number of 32 bits: give 0x and hexadecimal digits, 0b and binary ones, or decimal ones.")]
    Number(String),
    #[error("{text:?} is not a bitmap: give 0b and up to {width} of 0, 1, x and _.")]
    Bitmap { text: String, width: usize },
    #[error("{0:?} is not a MAC address: give six pairs of hex digits, such as 06:00:ac:10:00:02.")]
    Mac(String),
    #[error("The MAC address {0} is a multicast address: its first byte has to be even.")]
    MulticastMac(String),
    #[error("The MTU {0} is out of range: 68 to 65535 bytes.")]
    Mtu(u32),
    #[error("{0}")]
    Other(String),
}

/// Ids of drives, interfaces and the like: letters, digits and `_`.
pub fn check_id(id: &str) -> Result<(), InvalidValue> {
    if id.is_empty() {
        return Err(InvalidValue::EmptyId);
    }
    match id.chars().all(|c| c.is_alphanumeric() || c == '_') {
        true => Ok(()),
        false => Err(InvalidValue::Id(id.into())),
    }
}

/// A token bucket: `size` bytes or operations, refilled in `refill_time` milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct TokenBucket {
    pub size: u64,
    pub one_time_burst: Option<u64>,
    pub refill_time: u64,
}

/// Limits of a device's bytes and operations. In an update, what is absent stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    pub bandwidth: Option<TokenBucket>,
    pub ops: Option<TokenBucket>,
}

impl TokenBucket {
    fn limit(self) -> config::TokenBucket {
        let Self { size, one_time_burst, refill_time } = self;
        config::TokenBucket { size, refill_ms: refill_time, burst: one_time_burst.unwrap_or(0) }
    }
}

impl RateLimiter {
    /// The limits, or a change of them.
    #[must_use]
    pub fn limits(this: Option<Self>) -> RateLimits {
        let Self { bandwidth, ops } = this.unwrap_or_default();
        RateLimits { bandwidth: bandwidth.map(TokenBucket::limit), operations: ops.map(TokenBucket::limit) }
    }

    /// Limits as a client would have asked for them.
    #[must_use]
    pub fn of(limits: RateLimits) -> Option<Self> {
        let bucket = |limit: config::TokenBucket| TokenBucket {
            size: limit.size,
            one_time_burst: Some(limit.burst).filter(|&burst| burst > 0),
            refill_time: limit.refill_ms,
        };
        let this = Self { bandwidth: limits.bandwidth.map(bucket), ops: limits.operations.map(bucket) };
        (this != Self::default()).then_some(this)
    }

    /// Takes over what `patch` says.
    pub fn update(this: &mut Option<Self>, patch: Option<Self>) {
        let Some(patch) = patch else { return };
        let mut limiter = this.unwrap_or_default();
        let merged = |old: Option<TokenBucket>, new: Option<TokenBucket>| match new {
            Some(bucket) if bucket.size == 0 || bucket.refill_time == 0 => None,
            Some(bucket) => Some(bucket),
            None => old,
        };
        limiter.bandwidth = merged(limiter.bandwidth, patch.bandwidth);
        limiter.ops = merged(limiter.ops, patch.ops);
        *this = (limiter != Self::default()).then_some(limiter);
    }
}

/// An entropy device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    pub rate_limiter: Option<RateLimiter>,
}

/// What can be asked of a VM's vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum WantedState {
    Paused,
    Resumed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    pub state: WantedState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Action {
    pub action_type: ActionType,
}

/// A whole VM: the configuration file, and the answer to `GET /vm/config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct VmDescription {
    pub balloon: Option<Balloon>,
    #[serde(default)]
    pub drives: Vec<Drive>,
    #[serde(rename = "boot-source")]
    pub boot_source: Option<BootSource>,
    #[serde(rename = "cpu-config")]
    pub cpu_config: Option<CpuConfigSource>,
    pub logger: Option<Logger>,
    #[serde(rename = "machine-config")]
    pub machine_config: Option<MachineConfig>,
    pub metrics: Option<Metrics>,
    #[serde(rename = "mmds-config")]
    pub mmds_config: Option<MmdsConfig>,
    #[serde(rename = "network-interfaces", default)]
    pub network_interfaces: Vec<NetworkInterface>,
    pub vsock: Option<Vsock>,
    pub entropy: Option<Entropy>,
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    #[serde(rename = "memory-hotplug")]
    pub memory_hotplug: Option<HotplugMemory>,
}

/// In a file, a CPU configuration is there itself, or the path of a file that has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum CpuConfigSource {
    #[cfg_attr(test, schema(value_type = String))]
    Path(std::path::PathBuf),
    Inline(CpuConfig),
}

#[cfg(test)]
mod tests;
