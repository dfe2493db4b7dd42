//! A machine that starts anew: what its next life takes over from it.

use std::time::Instant;

use super::Machine;
use super::devices::{DeviceId, Presence};
use super::error::MachineError;
use super::lifecycle::State;
use super::limits::Budgets;
use super::parts::{OpenDisk, OpenNic, Origin, Parts, SerialSetup};
use super::save::{AtRest, DRAIN_PATIENCE};
use crate::backend::HostFiles;
use crate::config::{CpuChanges, MemoryPages, MemoryPolicy, SavedVm};

/// What stays when a machine goes: its shape, its disks, which are still open and locked, and the output of its serial
/// port.
pub struct Remains {
    config: SavedVm,
    disks: Vec<OpenDisk>,
    serial: SerialSetup,
    vcpu_thread: &'static str,
    memory_policy: MemoryPolicy,
    /// What the guest was to let go of: it has, now.
    pub left: Vec<DeviceId>,
}

impl Machine {
    /// Brings a machine to its end whose vCPUs are paused: requests in hand end, disks are flushed, and nothing of it
    /// runs any more. Drop it then.
    ///
    /// # Errors
    /// When it is not paused, a device does not come to an end with its requests, a disk cannot be flushed, or the host
    /// has nothing left for another life. The machine is as it was then.
    pub fn part(&mut self, host: &dyn HostFiles) -> Result<Remains, MachineError> {
        if !matches!(self.state, State::Paused { .. }) {
            return Err(MachineError::NotNow { request: "reset", state: self.state.name() });
        }
        let was_at_rest = self.devices.is_at_rest();
        self.devices.suspend(Instant::now() + DRAIN_PATIENCE)?;
        let remains = self.remains(host);
        if remains.is_err() && !was_at_rest {
            self.devices.resume();
        }
        remains
    }

    fn remains(&mut self, host: &dyn HostFiles) -> Result<Remains, MachineError> {
        let leaving = self.devices.iter().filter(|(_, presence)| *presence != Presence::Present);
        let left: Vec<_> = leaving.map(|(id, _)| id.clone()).collect();
        let mut config = AtRest(self).config(host);
        config.disks.retain(|disk| !left.contains(&DeviceId::Disk(disk.name.clone())));
        config.nics.retain(|nic| !left.contains(&DeviceId::Nic(nic.name.clone())));
        let mut disks = Vec::with_capacity(config.disks.len());
        for disk in &config.disks {
            let (drive, _) = self.devices.drive(&disk.name)?;
            disks.push(OpenDisk::of_open(&disk.name, &disk.config, drive.disk.clone(), host)?);
        }
        let serial = SerialSetup(self.serial.disconnect());
        Ok(Remains { config, disks, serial, vcpu_thread: self.vcpu_thread, memory_policy: self.memory_policy, left })
    }

    /// Starts all vCPUs, which wait to be resumed.
    ///
    /// # Errors
    /// When the host has no thread for one of them.
    pub fn start_paused(&mut self) -> Result<(), MachineError> {
        self.state = State::Paused { stopping: false };
        Ok(self.vcpus.start_paused(self.vcpu_thread, &self.exit_handler())?)
    }
}

impl Remains {
    /// The parts of the next life, of which networks are joined anew: the machine before has to be gone.
    ///
    /// # Errors
    /// What keeps us out of a network.
    pub fn into_parts(
        self,
        origin: Origin,
        threads_per_core: u8,
        cpu_changes: CpuChanges,
        memory_pages: MemoryPages,
        track_writes: bool,
        host: &dyn HostFiles,
    ) -> Result<Parts, MachineError> {
        let Self { config, disks, serial, vcpu_thread, memory_policy, .. } = self;
        let nics = config.nics.iter().map(|nic| OpenNic::open(&nic.name, &nic.config, host));
        Ok(Parts {
            origin,
            cpus: config.cpus,
            threads_per_core,
            cpu_changes,
            memory: config.memory,
            memory_pages,
            memory_policy,
            track_writes,
            disks,
            nics: nics.collect::<Result<_, _>>()?,
            budgets: Budgets::default(),
            entropy: config.entropy,
            serial,
            transport: config.transport,
            vcpu_thread,
        })
    }
}
