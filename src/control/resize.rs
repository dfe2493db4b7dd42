//! Another size: of CPUs and memory when the VM starts anew, of disks at once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Fault;
use super::owner::Owner;
use crate::config::{MemorySize, check_size, check_threads};
use crate::machine::MachineError;

/// What a VM is to be. What is not said stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// From the next start or reset on.
    pub vcpus: Option<u8>,
    /// From the next start or reset on; whole MiB.
    pub memory_bytes: Option<u64>,
    /// Sizes in bytes of disks that become larger, by their ids: at once.
    #[serde(default)]
    pub disks: BTreeMap<String, u64>,
}

/// CPUs and memory of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub cpus: u8,
    pub memory: MemorySize,
}

/// What of a VM's size is to be something else from its next start on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextSize {
    pub cpus: Option<u8>,
    pub memory: Option<MemorySize>,
}

impl NextSize {
    /// What a client asks for; none if that can be had at once.
    #[must_use]
    pub fn of(request: &ResizeRequest) -> Option<Self> {
        let next = Self { cpus: request.vcpus, memory: request.memory_bytes.map(MemorySize) };
        (next.cpus.is_some() || next.memory.is_some()).then_some(next)
    }
}

/// Has whoever keeps a VM's definition remember its size.
pub type Keeper = Box<dyn FnMut(NextSize) -> Result<(), String> + Send>;

impl Owner {
    /// From now on, a size that the VM is to have later is given to `keeper` too.
    pub fn keep_size_with(&mut self, keeper: Keeper) {
        self.keeper = Some(keeper);
    }

    /// What it is to be from its next start on, if that is something else than now.
    pub(super) fn next_size(&self) -> Option<Size> {
        self.next_size
    }

    pub(super) fn resize(&mut self, request: &ResizeRequest) -> Result<(), Fault> {
        let config = self.plan.machine_config();
        let now = Size { cpus: config.vcpu_count, memory: MemorySize(config.mem_size_mib << 20) };
        let before = self.next_size.unwrap_or(now);
        let next = Size {
            cpus: request.vcpus.unwrap_or(before.cpus),
            memory: request.memory_bytes.map_or(before.memory, MemorySize),
        };
        if next.memory.0 & ((1 << 20) - 1) != 0 {
            return Err(Fault::Size("memory_bytes has to be whole MiB.".into()));
        }
        let check = || {
            check_size(next.cpus, next.memory, 0)?;
            check_threads(next.cpus, config.threads_per_core())?;
            config.memory_pages().check(next.memory)
        };
        check().map_err(MachineError::from)?;
        if let Some(id) =
            request.disks.keys().find(|id| !self.plan.description.drives.iter().any(|d| d.drive_id == **id))
        {
            return Err(Fault::NoSuch { what: "drive", id: id.clone() });
        }
        if self.machine.is_none() && !request.disks.is_empty() {
            return Err(Fault::BeforeStart);
        }
        if next != before {
            if let (Some(keeper), Some(next)) = (&mut self.keeper, NextSize::of(request)) {
                keeper(next).map_err(Fault::Conflict)?;
            }
            self.next_size = Some(next).filter(|next| *next != now);
            if self.machine.is_none() {
                self.take_next_size();
            }
        }
        let host = self.host.clone();
        for (id, &bytes) in &request.disks {
            let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
            machine.grow_disk(id, bytes, &*host)?;
        }
        Ok(())
    }

    /// Makes what was to come what is.
    pub(super) fn take_next_size(&mut self) {
        if let Some(Size { cpus, memory }) = self.next_size.take() {
            let mut config = self.plan.machine_config();
            (config.vcpu_count, config.mem_size_mib) = (cpus, memory.0 >> 20);
            self.plan.description.machine_config = Some(config);
        }
    }
}
