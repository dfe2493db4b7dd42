//! CPUs, memory, and what is booted.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::InvalidValue;
use super::cpu::CpuTemplate;
use crate::config::MemoryPages;

/// Most vCPUs that Firecracker's clients may ask for.
const MAX_VCPUS: u8 = 32;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    #[cfg_attr(test, schema(value_type = String))]
    pub kernel_image_path: PathBuf,
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub initrd_path: Option<PathBuf>,
    pub boot_args: Option<String>,
}

/// The memory's pages on the host. With `None`, too, transparent huge pages are asked for, which the host may give.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub enum HugePages {
    #[default]
    None,
    Transparent,
    #[serde(rename = "2M")]
    TwoMiB,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    pub vcpu_count: u8,
    pub mem_size_mib: u64,
    #[serde(default)]
    pub smt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    #[serde(default)]
    pub track_dirty_pages: bool,
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<u64>,
    pub smt: Option<bool>,
    pub cpu_template: Option<CpuTemplate>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigPatch {
    /// Nothing that could be changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl MachineConfig {
    pub fn check(&self) -> Result<(), InvalidValue> {
        let vcpus = self.vcpu_count;
        if !(1..=MAX_VCPUS).contains(&vcpus) || self.smt && vcpus != 1 && !vcpus.is_multiple_of(2) {
            return Err(InvalidValue::VcpuCount(vcpus.into()));
        }
        let even = self.huge_pages == HugePages::TwoMiB;
        // The largest number of MiB whose bytes can be counted.
        if self.mem_size_mib == 0 || self.mem_size_mib > u64::MAX >> 20 || even && !self.mem_size_mib.is_multiple_of(2)
        {
            return Err(InvalidValue::Memory { even });
        }
        match self.cpu_template {
            Some(template) if template != CpuTemplate::None => Err(InvalidValue::CpuTemplate(format!("{template:?}"))),
            _ => Ok(()),
        }
    }

    #[must_use]
    pub fn threads_per_core(&self) -> u8 {
        if self.smt && self.vcpu_count > 1 { 2 } else { 1 }
    }

    #[must_use]
    pub fn memory_pages(&self) -> MemoryPages {
        match self.huge_pages {
            HugePages::None | HugePages::Transparent => MemoryPages::Transparent,
            HugePages::TwoMiB => MemoryPages::Huge,
        }
    }

    /// What replaces `self`: a PUT keeps the template that it does not name.
    #[must_use]
    pub fn replaced_by(&self, new: Self) -> Self {
        Self { cpu_template: new.cpu_template.or(self.cpu_template), ..new }
    }

    #[must_use]
    pub fn patched(&self, patch: &MachineConfigPatch) -> Self {
        Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            cpu_template: patch.cpu_template.or(self.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
        }
    }
}
