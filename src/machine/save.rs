//! A machine at rest, to be saved.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use super::devices::DeviceBusy;
use super::saved::{MachineStateV1, Versioned};
use super::{KvmError, Machine, MachineError, State};
use crate::backend::disk::Layer;
use crate::backend::{Disk, HostFiles};
use crate::config::{DiskConfig, MemorySize, SavedVm};
use crate::cpu::StateShape;
use crate::memory;
use crate::memory::written::Written;
use crate::platform::chips::ChipsStateV1;

/// How long requests in hand may take that have to end before a machine is at rest.
pub(super) const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// Why a machine cannot be brought to rest, or be saved.
#[derive(Debug, Error)]
pub enum SaveError {
    #[error("a VM is saved while it is paused, and it is {0}")]
    NotPaused(&'static str),
    #[error(transparent)]
    Busy(#[from] DeviceBusy),
    #[error(transparent)]
    State(#[from] MachineError),
    #[error("cannot write the guest's memory")]
    Memory(#[source] io::Error),
    #[error("cannot get hold of the files of disk '{name}'")]
    Disk { name: String, source: io::Error },
}

impl From<KvmError> for SaveError {
    fn from(error: KvmError) -> Self {
        Self::State(error.into())
    }
}

/// A machine whose vCPUs and devices do nothing, and whose disks are flushed.
pub struct AtRest<'a>(pub(super) &'a mut Machine);

impl Machine {
    /// Brings a paused machine to rest, has it saved, and lets its devices go on. The vCPUs stay paused.
    ///
    /// # Errors
    /// When it is not paused, a device does not come to an end with its requests, a disk cannot be flushed; or that of
    /// `save`. The machine is as it was then.
    pub fn at_rest<T, E: From<SaveError>>(
        &mut self,
        save: impl FnOnce(&mut AtRest<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        if !matches!(self.state, State::Paused { .. }) {
            return Err(SaveError::NotPaused(self.state.name()).into());
        }
        let was_at_rest = self.devices.is_at_rest();
        self.devices.suspend(Instant::now() + DRAIN_PATIENCE).map_err(SaveError::from)?;
        let saved = save(&mut AtRest(self));
        if !was_at_rest {
            self.devices.resume();
        }
        saved
    }
}

impl Machine {
    /// Pages count as not written if `keep` succeeds with them.
    fn take_written(&self, keep: impl FnOnce(&Written) -> io::Result<()>) -> Result<Written, SaveError> {
        if self.knows_writes {
            for (slot, region) in (0..).zip(self.ram.iter()) {
                let log = self.vm.get_dirty_log(slot, region.size());
                let log = log.map_err(KvmError::call("tell which pages were written"))?;
                memory::written::note(&self.ram, slot as usize, &log);
            }
        }
        let written = Written::take(&self.ram);
        match keep(&written) {
            Ok(()) => Ok(written),
            Err(error) => {
                written.give_back(&self.ram);
                Err(SaveError::Memory(error))
            }
        }
    }

    /// What was written has not been kept after all.
    pub fn give_back_written(&self, written: &Written) {
        written.give_back(&self.ram);
    }

    /// Bytes of the guest's memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        memory::total_bytes(&self.ram)
    }
}

impl AtRest<'_> {
    /// What a person may read and change of it.
    #[must_use]
    pub fn config(&self, host: &dyn HostFiles) -> SavedVm {
        let (mut disks, mut nics, entropy) = self.0.devices.describe();
        // Whoever reads this may be elsewhere.
        for DiskConfig { path, image, .. } in disks.iter_mut().map(|disk| &mut disk.config) {
            for path in std::iter::once(path).chain(image.backing.iter_mut().map(|backing| &mut backing.path)) {
                *path = host.absolute(path);
            }
        }
        self.0.limits.describe(&mut disks, &mut nics);
        // One that was made up is the card's from now on, also in the network that is told of it.
        for device in self.0.devices.save().devices {
            if let Some((name, mac)) = device.mac()
                && let Some(nic) = nics.iter_mut().find(|nic| nic.name == name)
            {
                nic.config.mac = Some(mac);
            }
        }
        SavedVm {
            cpus: self.0.vcpus.count(),
            memory: MemorySize(memory::total_bytes(&self.0.ram)),
            transport: self.0.transport,
            disks,
            nics,
            entropy,
        }
    }

    /// The files of a disk, the one that is written to first. All that the guest has written is in them.
    ///
    /// # Errors
    /// When there is no such disk, or too many files are open.
    pub fn layers(&self, disk: &str) -> Result<Vec<Layer>, SaveError> {
        let layers = self.0.devices.disk(disk).map_or_else(|| Err(io::ErrorKind::NotFound.into()), Disk::layers);
        layers.map_err(|source| SaveError::Disk { name: disk.to_owned(), source })
    }

    /// All of it but memory and disks.
    ///
    /// # Errors
    /// KVM's.
    pub fn state(&self) -> Result<MachineStateV1, SaveError> {
        let machine = &*self.0;
        let shape = StateShape::new(&machine.kvm, &machine.vm).map_err(MachineError::from)?;
        let vcpus = machine.vcpus.save(&machine.vm, &shape).map_err(MachineError::from)?;
        let chips =
            ChipsStateV1::save(&machine.vm).map_err(KvmError::call("read its interrupt controllers and clock"))?;
        Ok(MachineStateV1 {
            stopping: matches!(machine.state, State::Paused { stopping: true }),
            pci_window_64: machine.window_64,
            vcpus: vcpus.into_iter().map(Versioned).collect(),
            chips: Versioned(chips),
            serial: Versioned(machine.serial.save()),
            event_device: Versioned(machine.event_device().save()),
            devices: Versioned(machine.devices.save()),
            generation_id: machine.generation_id,
        })
    }

    /// Writes the guest's memory into an empty file.
    ///
    /// # Errors
    /// The host's.
    pub fn write_memory(&self, file: &File) -> Result<(), SaveError> {
        self.write_all_memory(file).map_err(SaveError::Memory)
    }

    /// As [`Self::write_memory`], and differences count from here on. Returns what did before, for whom this fails later.
    ///
    /// # Errors
    /// As there.
    pub fn write_base(&self, file: &File) -> Result<Written, SaveError> {
        self.0.take_written(|_| self.write_all_memory(file))
    }

    fn write_all_memory(&self, file: &File) -> io::Result<()> {
        match self.0.pager {
            // What nobody has looked at is not empty, but still elsewhere.
            Some(_) => memory::saved::save_all(&self.0.ram, file),
            None => memory::saved::save(&self.0.ram, file),
        }
    }

    /// Writes those pages over a file that may have been written since the last base or differences; or, if no account
    /// was kept, since the guest's memory was made, or mapped from a file. Else as [`Self::write_base`].
    ///
    /// # Errors
    /// As there.
    pub fn write_differences(&self, file: &File) -> Result<Written, SaveError> {
        file.set_len(memory::total_bytes(&self.0.ram)).map_err(SaveError::Memory)?;
        self.0.take_written(|written| match self.0.knows_writes {
            true => written.save(&self.0.ram, file),
            false => memory::written::save_own(&self.0.ram, file),
        })
    }
}
