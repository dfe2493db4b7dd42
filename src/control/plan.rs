//! A VM before its start: described as its client describes it, and open already.

use std::fs::File;
use std::path::Path;

use super::Fault;
use super::owner::Identity;
use crate::backend::{HostFile, HostFiles};
use crate::boot::BootFile;
use crate::config::firecracker as fc;
use crate::config::{
    CacheMode, CpuChanges, DiskConfig, EntropyConfig, IoEngine, MemoryPages, MemoryPolicy, MemorySize, NetBackend,
    NetConfig, RateLimits, SavedVm, SerialConfig, Transport, VmConfig,
};
use crate::machine::{Budgets, MachineError, OpenDisk, OpenNic, Origin, Parts, SerialSetup, open_initrd, open_kernel};
use crate::platform::serial::SerialOutput;

/// Most bytes of a command line, for Firecracker's clients.
const MAX_BOOT_ARGS: usize = 2048;

/// What was asked for, and what of it is open. What is not (after a start that failed, or for a reset) is opened
/// again when it is needed.
#[derive(Default)]
pub struct Plan {
    pub description: fc::VmDescription,
    kernel: Option<(BootFile, Option<BootFile>)>,
    disks: Vec<OpenDisk>,
    nics: Vec<OpenNic>,
    serial: Option<File>,
    serial_path: Option<std::path::PathBuf>,
    /// Of the serial port's output.
    pub serial_limits: RateLimits,
}

/// Puts `new` where an entry of this id is, or at the end.
fn put<T>(entries: &mut Vec<T>, new: T, is_same: impl Fn(&T) -> bool) {
    match entries.iter_mut().find(|entry| is_same(entry)) {
        Some(entry) => *entry = new,
        None => entries.push(new),
    }
}

impl Plan {
    /// Has nothing been said yet about the VM itself?
    pub fn is_untouched(&self) -> bool {
        let observed = fc::VmDescription {
            logger: self.description.logger.clone(),
            metrics: self.description.metrics.clone(),
            ..Default::default()
        };
        self.description == observed
    }

    pub fn machine_config(&self) -> fc::MachineConfig {
        self.description.machine_config.unwrap_or_default()
    }

    /// `has_template`: it says itself what model the CPUs are.
    pub fn set_machine_config(&mut self, config: fc::MachineConfig, has_template: bool) -> Result<(), Fault> {
        config.check()?;
        if has_template {
            self.description.cpu_config = None;
        }
        self.description.machine_config = Some(config);
        Ok(())
    }

    /// Of a model and changes of CPUs, what is said last counts.
    pub fn put_cpu_config(&mut self, config: fc::CpuConfig) -> Result<(), Fault> {
        config.check()?;
        if let Some(machine) = &mut self.description.machine_config {
            machine.cpu_template = None;
        }
        self.description.cpu_config = (!config.is_empty()).then_some(fc::CpuConfigSource::Inline(config));
        Ok(())
    }

    pub fn put_boot_source(
        &mut self,
        source: fc::BootSource,
        host: &dyn HostFiles,
        identity: &Identity,
    ) -> Result<(), Fault> {
        let before = self.description.boot_source.take();
        self.description.boot_source = Some(source);
        let checked = self.open_kernel(host).and_then(|kernel| {
            self.command_line(identity)?;
            Ok(kernel)
        });
        match checked {
            Ok(kernel) => self.kernel = Some(kernel),
            Err(fault) => {
                self.description.boot_source = before;
                return Err(fault);
            }
        }
        Ok(())
    }

    fn open_kernel(&self, host: &dyn HostFiles) -> Result<(BootFile, Option<BootFile>), Fault> {
        let source = self.description.boot_source.as_ref().ok_or(Fault::NoKernel)?;
        let kernel = open_kernel(&source.kernel_image_path, host)?;
        let initrd = source.initrd_path.as_deref().map(|path| open_initrd(path, host));
        Ok((kernel, initrd.transpose()?))
    }

    /// The kernel's arguments: the client's, or the default ones, and what follows from the VM's shape.
    fn command_line(&self, identity: &Identity) -> Result<String, Fault> {
        let args = self.description.boot_source.as_ref().and_then(|source| source.boot_args.as_deref());
        let mut line = args.unwrap_or(identity.default_boot_args).trim().to_owned();
        // Not a second time, as in the description of a VM from a command line.
        let mut append = |text: &str| {
            if format!(" {line} ").contains(&format!(" {text} ")) {
                return;
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(text);
        };
        if identity.transport == (Transport::Mmio { pci: false }) {
            append("pci=off");
        }
        if let Some(root) = self.description.drives.iter().find(|drive| drive.is_root_device) {
            append(&root.root_argument());
        }
        if line.len() > MAX_BOOT_ARGS {
            return Err(Fault::BootArguments(line.len()));
        }
        Ok(line)
    }

    pub fn put_drive(&mut self, drive: fc::Drive, host: &dyn HostFiles) -> Result<(), Fault> {
        drive.check()?;
        if let Some(other) = self.other_root(&drive) {
            return Err(Fault::SecondRoot(other.to_owned()));
        }
        // The one before has to go first: a disk can be open only once. If the new one cannot be opened, the plan
        // still has the old one's description, and opens it again at the start.
        self.disks.retain(|disk| disk.id() != drive.drive_id);
        self.disks.push(OpenDisk::open(&drive.drive_id, &drive.disk(), host)?);
        put(&mut self.description.drives, drive.clone(), |known| known.drive_id == drive.drive_id);
        Ok(())
    }

    pub fn other_root(&self, drive: &fc::Drive) -> Option<&str> {
        let others = self.description.drives.iter().filter(|other| other.drive_id != drive.drive_id);
        let root = others.filter(|_| drive.is_root_device).find(|other| other.is_root_device)?;
        Some(&root.drive_id)
    }

    pub fn put_network(&mut self, nic: fc::NetworkInterface, host: &dyn HostFiles) -> Result<(), Fault> {
        let config = nic.nic()?;
        self.check_mac(&nic)?;
        // As with disks: a tap serves one card.
        self.nics.retain(|card| card.id() != nic.iface_id);
        self.nics.push(OpenNic::open(&nic.iface_id, &config, host)?);
        put(&mut self.description.network_interfaces, nic.clone(), |known| known.iface_id == nic.iface_id);
        Ok(())
    }

    /// Two cards with one address would take each other's frames.
    pub fn check_mac(&self, nic: &fc::NetworkInterface) -> Result<(), Fault> {
        let Some(mac) = nic.nic()?.mac else { return Ok(()) };
        for other in self.description.network_interfaces.iter().filter(|other| other.iface_id != nic.iface_id) {
            if other.nic()?.mac == Some(mac) {
                return Err(Fault::RepeatedMac { mac: mac.to_string(), id: other.iface_id.clone() });
            }
        }
        Ok(())
    }

    pub fn put_serial(&mut self, serial: &fc::Serial, host: &dyn HostFiles) -> Result<(), Fault> {
        self.serial = match &serial.serial_out_path {
            Some(path) => Some(open_serial(path, host)?),
            None => None,
        };
        self.serial_path.clone_from(&serial.serial_out_path);
        let limiter = fc::RateLimiter { bandwidth: serial.rate_limiter, ops: None };
        self.serial_limits = fc::RateLimiter::limits(Some(limiter));
        Ok(())
    }

    /// Describes what was built without a plan, as far as it can be said in these terms.
    pub fn describe(&mut self, config: &VmConfig) {
        let drive = |(index, disk): (usize, &DiskConfig)| fc::Drive {
            drive_id: disk.id.clone().unwrap_or_else(|| format!("block{index}")),
            partuuid: None,
            is_root_device: disk.root,
            cache_type: Some(match disk.cache {
                CacheMode::Writeback => fc::CacheType::Writeback,
                CacheMode::Unsafe => fc::CacheType::Unsafe,
            }),
            is_read_only: Some(disk.read_only),
            path_on_host: Some(disk.path.clone()),
            rate_limiter: fc::RateLimiter::of(disk.limits),
            io_engine: Some(match disk.engine {
                IoEngine::Sync => fc::DriveEngine::Sync,
                IoEngine::IoUring | IoEngine::Auto => fc::DriveEngine::Async,
            }),
            socket: None,
        };
        let nic = |(index, nic): (usize, &NetConfig)| fc::NetworkInterface {
            iface_id: format!("net{index}"),
            host_dev_name: match &nic.backend {
                NetBackend::Tap(tap) => tap.name.clone(),
                NetBackend::User(_) => String::new(),
            },
            guest_mac: nic.mac.map(|mac| mac.to_string()),
            mtu: nic.mtu.map(u32::from),
            rx_rate_limiter: fc::RateLimiter::of(nic.rx_limits),
            tx_rate_limiter: fc::RateLimiter::of(nic.tx_limits),
        };
        self.description = fc::VmDescription {
            drives: config.disks.iter().enumerate().map(drive).collect(),
            boot_source: Some(fc::BootSource {
                kernel_image_path: config.kernel.clone(),
                initrd_path: config.initrd.clone(),
                boot_args: Some(config.kernel_cmdline()),
            }),
            machine_config: Some(fc::MachineConfig {
                vcpu_count: config.cpus,
                mem_size_mib: config.memory.0 >> 20,
                smt: config.threads_per_core > 1,
                huge_pages: match config.memory_pages {
                    MemoryPages::Transparent => fc::HugePages::Transparent,
                    MemoryPages::Huge => fc::HugePages::TwoMiB,
                },
                ..Default::default()
            }),
            network_interfaces: config.nics.iter().enumerate().map(nic).collect(),
            entropy: Some(fc::Entropy::default()),
            ..Default::default()
        };
    }

    /// Describes a VM that was saved: as its clients did, on the files and networks it has now.
    pub fn describe_saved(&mut self, description: &fc::VmDescription, config: &SavedVm, tracks_writes: bool) {
        self.description = description.clone();
        if let Some(machine) = &mut self.description.machine_config {
            machine.track_dirty_pages = tracks_writes;
        }
        for drive in &mut self.description.drives {
            if let Some(disk) = config.disks.iter().find(|disk| disk.name == drive.drive_id) {
                drive.path_on_host = Some(disk.config.path.clone());
            }
        }
        for nic in &mut self.description.network_interfaces {
            let card = config.nics.iter().find(|card| card.name == nic.iface_id);
            if let Some(NetBackend::Tap(tap)) = card.map(|card| &card.config.backend) {
                nic.host_dev_name.clone_from(&tap.name);
            }
        }
    }

    /// Where a life of the VM begins.
    pub fn origin(&mut self, host: &dyn HostFiles, identity: &Identity) -> Result<Origin, Fault> {
        let (kernel, initrd) = match self.kernel.take() {
            Some(open) => open,
            None => self.open_kernel(host)?,
        };
        Ok(Origin::Kernel { kernel, initrd, cmdline: self.command_line(identity)? })
    }

    pub fn cpu_changes(&self) -> Result<CpuChanges, Fault> {
        Ok(match &self.description.cpu_config {
            Some(fc::CpuConfigSource::Inline(config)) => config.changes()?,
            // One in a file has been read, and stands here itself.
            Some(fc::CpuConfigSource::Path(_)) | None => CpuChanges::default(),
        })
    }

    /// Everything that the machine is built of: what is open, and the rest opened anew. `console` is where the serial
    /// port goes unless a file has been named.
    pub fn parts(&mut self, host: &dyn HostFiles, identity: &Identity, console: &SerialConfig) -> Result<Parts, Fault> {
        let origin = self.origin(host, identity)?;
        let mut drives: Vec<_> = self.description.drives.iter().collect();
        // The root device is the guest's first.
        drives.sort_by_key(|drive| !drive.is_root_device);
        let mut disks = Vec::with_capacity(drives.len());
        for drive in drives {
            let open = self.disks.iter().position(|disk| disk.id() == drive.drive_id);
            disks.push(match open {
                Some(at) => self.disks.swap_remove(at),
                None => OpenDisk::open(&drive.drive_id, &drive.disk(), host)?,
            });
        }
        let mut nics = Vec::with_capacity(self.description.network_interfaces.len());
        for nic in &self.description.network_interfaces {
            let open = self.nics.iter().position(|card| card.id() == nic.iface_id);
            nics.push(match open {
                Some(at) => self.nics.swap_remove(at),
                None => OpenNic::open(&nic.iface_id, &nic.nic()?, host)?,
            });
        }
        let serial = match (self.serial.take(), &self.serial_path) {
            (Some(file), _) => SerialSetup(SerialOutput::File(file)),
            (None, Some(path)) => SerialSetup(SerialOutput::File(open_serial(path, host)?)),
            (None, None) => SerialSetup::open(console, host)?,
        };
        let machine = self.machine_config();
        Ok(Parts {
            origin,
            cpus: machine.vcpu_count,
            threads_per_core: machine.threads_per_core(),
            cpu_changes: self.cpu_changes()?,
            memory: MemorySize(machine.mem_size_mib << 20),
            memory_pages: machine.memory_pages(),
            memory_policy: MemoryPolicy::default(),
            track_writes: machine.track_dirty_pages,
            disks,
            nics,
            budgets: Budgets::default(),
            entropy: self
                .description
                .entropy
                .map(|entropy| EntropyConfig { limits: fc::RateLimiter::limits(entropy.rate_limiter) }),
            serial,
            transport: identity.transport,
            vcpu_thread: identity.vcpu_thread,
        })
    }
}

fn open_serial(path: &Path, host: &dyn HostFiles) -> Result<File, MachineError> {
    let file = host.open(&HostFile::SerialOutput(path.to_owned()));
    file.map_err(|source| MachineError::Serial { path: path.to_owned(), source })
}
