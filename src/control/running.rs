//! Changes of a VM that has been started: devices come, go, and get other limits and files.

use std::path::PathBuf;

use super::Fault;
use super::owner::Owner;
use crate::backend::{HostFile, Right};
use crate::config::firecracker as fc;
use crate::config::{DiskFormat, Image};
use crate::machine::{DeviceId, Machine, OpenDisk, OpenNic};

impl Owner {
    fn started(&mut self) -> Result<&mut Machine, Fault> {
        self.machine.as_mut().ok_or(Fault::BeforeStart)
    }

    pub(super) fn plug_drive(&mut self, drive: fc::Drive) -> Result<(), Fault> {
        drive.check()?;
        if drive.is_root_device {
            return Err(Fault::Conflict("A drive that comes after the start cannot be the root device.".into()));
        }
        let host = self.host.clone();
        let machine = self.started()?;
        machine.plug_disk(OpenDisk::open(&drive.drive_id, &drive.disk(), &*host)?)?;
        self.plan.description.drives.push(drive);
        Ok(())
    }

    pub(super) fn plug_network(&mut self, nic: fc::NetworkInterface) -> Result<(), Fault> {
        let config = nic.nic()?;
        self.plan.check_mac(&nic)?;
        let host = self.host.clone();
        let machine = self.started()?;
        machine.plug_nic(OpenNic::open(&nic.iface_id, &config, &*host)?)?;
        self.plan.description.network_interfaces.push(nic);
        Ok(())
    }

    pub(super) fn unplug_drive(&mut self, id: &str) -> Result<(), Fault> {
        if self.plan.description.drives.iter().any(|drive| drive.drive_id == id && drive.is_root_device) {
            return Err(Fault::Conflict(format!("Drive {id:?} is the root device: it stays.")));
        }
        Ok(self.started()?.unplug(&DeviceId::Disk(id.into()))?)
    }

    pub(super) fn unplug_network(&mut self, id: &str) -> Result<(), Fault> {
        Ok(self.started()?.unplug(&DeviceId::Nic(id.into()))?)
    }

    /// The guest has let go of a device.
    pub(super) fn forget(&mut self, device: &DeviceId) {
        let description = &mut self.plan.description;
        match device {
            DeviceId::Disk(id) => {
                let drives = &mut description.drives;
                let gone: Vec<_> = drives.extract_if(.., |drive| drive.drive_id == *id).collect();
                gone.into_iter().filter_map(|drive| drive.path_on_host).for_each(|path| self.let_go_of_disk(path));
            }
            DeviceId::Nic(id) => {
                let nics = &mut description.network_interfaces;
                for nic in nics.extract_if(.., |nic| nic.iface_id == *id) {
                    self.host.let_go(&Right::JoinTap(nic.host_dev_name));
                }
            }
            DeviceId::Entropy => {}
        }
    }

    /// No drive has the file any more, or does one?
    fn let_go_of_disk(&self, path: PathBuf) {
        if !self.plan.description.drives.iter().any(|drive| drive.path_on_host.as_ref() == Some(&path)) {
            self.host.let_go(&Right::Open(HostFile::Disk { path, read_only: false }));
        }
    }

    pub(super) fn patch_drive(&mut self, patch: fc::DrivePatch) -> Result<(), Fault> {
        let host = self.host.clone();
        let drives = &mut self.plan.description.drives;
        let Some(drive) = drives.iter_mut().find(|drive| drive.drive_id == patch.drive_id) else {
            return Err(Fault::NoSuch { what: "drive", id: patch.drive_id });
        };
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        if patch.rate_limiter.is_some() {
            machine.limit_disk(&drive.drive_id, &fc::RateLimiter::limits(patch.rate_limiter))?;
            fc::RateLimiter::update(&mut drive.rate_limiter, patch.rate_limiter);
        }
        // Without either, the same file is looked at again: it may have grown.
        let same = drive.path_on_host.clone().filter(|_| patch.rate_limiter.is_none());
        if let Some(path) = patch.path_on_host.or(same) {
            let image = Image { format: Some(DiskFormat::Raw), backing: Vec::new() };
            machine.replace_disk(&drive.drive_id, &path, &image, &*host)?;
            if let Some(before) = drive.path_on_host.replace(path) {
                self.let_go_of_disk(before);
            }
        }
        Ok(())
    }

    pub(super) fn patch_network(&mut self, patch: fc::NetworkPatch) -> Result<(), Fault> {
        let nics = &mut self.plan.description.network_interfaces;
        let Some(nic) = nics.iter_mut().find(|nic| nic.iface_id == patch.iface_id) else {
            return Err(Fault::NoSuch { what: "network interface", id: patch.iface_id });
        };
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        let [rx, tx] = [patch.rx_rate_limiter, patch.tx_rate_limiter].map(fc::RateLimiter::limits);
        machine.limit_nic(&patch.iface_id, &rx, &tx)?;
        fc::RateLimiter::update(&mut nic.rx_rate_limiter, patch.rx_rate_limiter);
        fc::RateLimiter::update(&mut nic.tx_rate_limiter, patch.tx_rate_limiter);
        Ok(())
    }
}
