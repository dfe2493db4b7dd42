//! A disk that is part of a machine, and another file instead of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::error::{MachineError, PlugError};
use super::events::EventQueue;
use super::{DeviceId, Machine, Notice};
use crate::backend::disk::{DiskCloser, SECTOR};
use crate::backend::{Disk, HostFiles};
use crate::config::{DiskConfig, DiskFormat, Image};
use crate::devices::block::{Change, Rings, Tray};
use crate::virtio::DeviceEvents;

/// How long [`Machine::replace_disk`] waits for requests in flight.
const PATIENCE: Duration = Duration::from_millis(200);

/// What the owner of a machine has of a disk.
pub struct Drive {
    pub config: DiskConfig,
    pub disk: Arc<Disk>,
    pub tray: Tray,
    /// Under way, or not told of yet.
    pub change: Option<Arc<Change>>,
}

impl Drive {
    /// Opens another file and has the device go on with it.
    fn replace(
        &mut self,
        path: &Path,
        image: &Image,
        host: &dyn HostFiles,
        driver: &Arc<dyn DeviceEvents>,
        owner: Arc<EventQueue>,
    ) -> Result<(), MachineError> {
        let same = if image.format != Some(DiskFormat::Qcow2) { self.disk.with_size_of_now(host, path)? } else { None };
        let disk = match same {
            Some(disk) => disk,
            None => Disk::open_image(host, path, self.config.read_only, image)?,
        };
        let disk = Arc::new(disk);
        let rings = Rings::new(&disk, host, self.config.engine, self.config.queues)?;
        let old = std::mem::replace(&mut self.disk, disk);
        (self.config.path, self.config.image) = (path.to_owned(), image.clone());
        let told = Box::new(move || owner.look());
        self.change = Some(self.tray.change(old, &self.disk, rings, driver.clone(), told));
        Ok(())
    }

    /// Has a replacement come to its end since the last call?
    pub fn has_been_replaced(&mut self) -> bool {
        self.change.take_if(|change| change.is_done_within(Duration::ZERO)).is_some()
    }

    /// What has to be called when the VM has ended, if there is something.
    pub fn closer(&self) -> Option<DiskCloser> {
        self.disk.closer()
    }
}

/// How far a replacement has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replacement {
    Done,
    /// [`Notice::Replaced`] will tell when it is complete.
    UnderWay,
}

impl Machine {
    /// All disks, by their ids.
    pub fn disks(&self) -> impl Iterator<Item = (&str, &Disk)> {
        self.devices.disks()
    }

    /// Puts another file behind a disk, with the disk's own settings, and tells the guest the new capacity. A raw disk may
    /// get its own file again: then the size of the file is looked at anew.
    ///
    /// Requests that are in flight end on the old file, which is flushed then and let go. That is waited for, but not for
    /// a request that hangs with its host.
    ///
    /// # Errors
    /// When the VM does not run, there is no such disk, or the file cannot be used: then all is as it was.
    pub fn replace_disk(
        &mut self,
        id: &str,
        path: &Path,
        image: &Image,
        host: &dyn HostFiles,
    ) -> Result<Replacement, MachineError> {
        self.check_started("to replace a disk")?;
        let (drive, driver) = self.devices.drive(id)?;
        drive.replace(path, image, host, driver, self.events.clone())?;
        let waited = drive.change.take_if(|change| change.is_done_within(PATIENCE));
        Ok(if waited.is_some() { Replacement::Done } else { Replacement::UnderWay })
    }

    /// Makes a raw disk's file larger, and tells the guest the new capacity.
    ///
    /// # Errors
    /// When the VM does not run, there is no such disk, it is no file of raw bytes, it would become smaller, or the host
    /// does not let us.
    pub fn grow_disk(&mut self, id: &str, bytes: u64, host: &dyn HostFiles) -> Result<Replacement, MachineError> {
        self.check_started("to replace a disk")?;
        let (drive, _) = self.devices.drive(id)?;
        let known = || DeviceId::Disk(id.to_owned());
        let disk = drive.disk.clone();
        let Some(file) = disk.raw_file().filter(|_| !disk.read_only()) else {
            return Err(PlugError::FixedSize(known()).into());
        };
        if bytes < disk.bytes() || !bytes.is_multiple_of(SECTOR) {
            return Err(PlugError::Size { id: known(), bytes: disk.bytes() }.into());
        }
        // A block device has the size that it has; a file may be larger by a part of a sector.
        if bytes > disk.bytes() {
            rustix::fs::ftruncate(file, bytes)
                .map_err(|error| MachineError::Host { what: "make the disk's file larger", source: error.into() })?;
        }
        self.replace_disk(id, disk.path(), &Image::default(), host)
    }

    /// Takes in replacements that took longer.
    pub(super) fn follow_replacements(&mut self, notices: &mut Vec<Notice>) {
        let replaced = self.devices.take_replaced().filter_map(|id| match id {
            DeviceId::Disk(id) => Some(Notice::Replaced(id.clone())),
            DeviceId::Nic(_) | DeviceId::Entropy => None,
        });
        notices.extend(replaced);
    }
}
