//! What a machine is made of, opened: whatever can be wrong with the host's files, disks and networks is found out
//! here, before there is a machine.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::drive::Drive;
use super::error::MachineError;
use super::limits::{Budgets, NicLimiters};
use super::pager::OpenPager;
use super::saved::MachineStateV1;
use crate::backend::disk::Disk;
use crate::backend::passt::Passt;
use crate::backend::tap::Tap;
use crate::backend::vhost::VhostNet;
use crate::backend::{HostFile, HostFiles, Limiter};
use crate::boot::{BootError, BootFile};
use crate::config::{
    CpuChanges, DiskConfig, EntropyConfig, MAX_USER_MTU, MacAddress, MemoryPages, MemoryPolicy, MemorySize, NetBackend,
    NetConfig, OpenFile, SavedDisk, SavedNic, SavedVm, SerialConfig, Transport, VmConfig,
};
use crate::devices::block::{BlockDevice, BlockOptions, Rings};
use crate::devices::net::{NetLimiters, NetOptions, NetShapeV1};
use crate::devices::{Front, block, net};
use crate::platform::chips::Clock;
use crate::platform::serial::{SerialOutput, stdout_file};

/// Everything that [`Machine::build`](super::Machine::build) needs.
pub struct Parts {
    pub origin: Origin,
    pub cpus: u8,
    pub threads_per_core: u8,
    pub cpu_changes: CpuChanges,
    pub memory: MemorySize,
    pub memory_pages: MemoryPages,
    pub memory_policy: MemoryPolicy,
    /// Is account kept of the pages that are written?
    pub track_writes: bool,
    /// Guests number disks, then network cards, in this order.
    pub disks: Vec<OpenDisk>,
    pub nics: Vec<OpenNic>,
    /// What all of them together may do.
    pub budgets: Budgets,
    pub entropy: Option<EntropyConfig>,
    pub serial: SerialSetup,
    pub transport: Transport,
    /// What a vCPU's thread is called, in front of its number.
    pub vcpu_thread: &'static str,
}

/// Where a machine's life begins.
pub enum Origin {
    /// At the entry of a kernel.
    Kernel {
        kernel: BootFile,
        initrd: Option<BootFile>,
        /// All of the kernel's command line.
        cmdline: String,
    },
    /// Where it was saved.
    Saved { state: Box<MachineStateV1>, memory: SavedMemory, clock: Clock },
}

/// Where the memory of a saved machine comes from.
pub enum SavedMemory {
    /// What [`saved::save`](crate::memory::saved::save) has written.
    File(File),
    Pager(OpenPager),
}

impl Parts {
    /// Opens what a configuration names. What other programs notice comes last: an output that is emptied, a network
    /// that is joined.
    ///
    /// # Errors
    /// The first thing that is wrong; all is closed again then.
    pub fn open(config: &VmConfig, host: &dyn HostFiles) -> Result<Self, MachineError> {
        config.validate()?;
        let kernel = open_kernel(&config.kernel, host)?;
        let initrd = config.initrd.as_ref().map(|path| open_initrd(path, host)).transpose()?;
        let open_disk = |(index, disk): (usize, &DiskConfig)| {
            let id = disk.id.clone().unwrap_or_else(|| format!("block{index}"));
            OpenDisk::open(&id, disk, host)
        };
        let disks = config.disks.iter().enumerate().map(open_disk).collect::<Result<_, _>>()?;
        let serial = SerialSetup::open(&config.serial, host)?;
        let open_nic = |(index, nic)| OpenNic::open(&format!("net{index}"), nic, host);
        let nics = config.nics.iter().enumerate().map(open_nic).collect::<Result<_, _>>()?;
        Ok(Self {
            origin: Origin::Kernel { kernel, initrd, cmdline: config.kernel_cmdline() },
            cpus: config.cpus,
            threads_per_core: config.threads_per_core,
            cpu_changes: CpuChanges::default(),
            memory: config.memory,
            memory_pages: config.memory_pages,
            memory_policy: config.memory_policy,
            track_writes: false,
            disks,
            nics,
            budgets: Budgets::default(),
            entropy: config.entropy.clone(),
            serial,
            transport: config.transport,
            vcpu_thread: "vcpu",
        })
    }

    /// Opens what a saved VM was made of. `console` is where its serial port goes.
    ///
    /// # Errors
    /// The first thing that is wrong; all is closed again then.
    pub fn of_saved(
        config: &SavedVm,
        origin: Origin,
        console: SerialSetup,
        vcpu_thread: &'static str,
        host: &dyn HostFiles,
    ) -> Result<Self, MachineError> {
        let gone = |place: &str, name: &str| {
            let place = format!("{place}.{name}");
            move |source| MachineError::NotThere { place, source: Box::new(source) }
        };
        let open_disk =
            |disk: &SavedDisk| OpenDisk::open(&disk.name, &disk.config, host).map_err(gone("disk", &disk.name));
        let disks = config.disks.iter().map(open_disk).collect::<Result<_, _>>()?;
        let open_nic = |nic: &SavedNic| OpenNic::open(&nic.name, &nic.config, host).map_err(gone("net", &nic.name));
        let nics = config.nics.iter().map(open_nic).collect::<Result<_, _>>()?;
        Ok(Self {
            origin,
            cpus: config.cpus,
            // What a CPU is, its saved state says.
            threads_per_core: 1,
            cpu_changes: CpuChanges::default(),
            memory: config.memory,
            memory_pages: MemoryPages::Transparent,
            memory_policy: MemoryPolicy::default(),
            track_writes: false,
            disks,
            nics,
            budgets: Budgets::default(),
            entropy: config.entropy.clone(),
            serial: console,
            transport: config.transport,
            vcpu_thread,
        })
    }

    /// How many virtio devices there will be.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.disks.len() + self.nics.len() + usize::from(self.entropy.is_some())
    }
}

/// Opens a kernel, whose contents [`Machine::build`](super::Machine::build) will judge.
///
/// # Errors
/// When the host has no such file for us.
pub fn open_kernel(path: &Path, host: &dyn HostFiles) -> Result<BootFile, MachineError> {
    open_boot_file(path, host, |path, source| BootError::ReadKernel { path, source })
}

/// Opens an initrd; else as [`open_kernel`].
///
/// # Errors
/// As there.
pub fn open_initrd(path: &Path, host: &dyn HostFiles) -> Result<BootFile, MachineError> {
    open_boot_file(path, host, |path, source| BootError::ReadInitrd { path, source })
}

fn open_boot_file(
    path: &Path,
    host: &dyn HostFiles,
    error: fn(std::path::PathBuf, std::io::Error) -> BootError,
) -> Result<BootFile, MachineError> {
    let path = path.to_owned();
    match host.open(&HostFile::BootFile(path.clone())) {
        Ok(file) => Ok(BootFile { file, path }),
        Err(source) => Err(error(path, source).into()),
    }
}

/// A disk that is open and locked: nobody else gets it while this is there, not even we once more.
pub struct OpenDisk {
    id: String,
    config: DiskConfig,
    disk: Arc<Disk>,
    rings: Rings,
    limiter: Arc<Limiter>,
}

impl OpenDisk {
    /// Opens a disk, which the machine's owner will find by `id`.
    ///
    /// # Errors
    /// Whatever is wrong with the file, or with io_uring if that is wanted by name.
    pub fn open(id: &str, config: &DiskConfig, host: &dyn HostFiles) -> Result<Self, MachineError> {
        let disk = Arc::new(Disk::open_image(host, &config.path, config.read_only, &config.image)?);
        Self::of_open(id, config, disk, host)
    }

    /// The same of a disk that is open already, and that nobody else uses any more.
    ///
    /// # Errors
    /// When io_uring is wanted by name and cannot be had.
    pub(super) fn of_open(
        id: &str,
        config: &DiskConfig,
        disk: Arc<Disk>,
        host: &dyn HostFiles,
    ) -> Result<Self, MachineError> {
        let rings = Rings::new(&disk, host, config.engine, config.queues)?;
        let limiter = Arc::new(Limiter::new(config.limits));
        Ok(Self { id: id.to_owned(), config: config.clone(), disk, rings, limiter })
    }

    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn limiter(&self) -> Arc<Limiter> {
        self.limiter.clone()
    }

    /// Makes the device, called `name` in logs.
    pub(super) fn into_device(self, name: String) -> Result<(Front, Drive), MachineError> {
        let Self { config, disk, rings, limiter, .. } = self;
        let options = BlockOptions { id: config.id.as_deref(), cache: config.cache, queues: config.queues };
        let device = block::device(name, &disk, rings, options, limiter);
        let BlockDevice { front, tray } = device.map_err(MachineError::host("make a block device"))?;
        Ok((front, Drive { config, disk, tray, change: None }))
    }
}

/// A network card that is attached to its network.
pub struct OpenNic {
    id: String,
    config: NetConfig,
    options: NetOptions,
    limiters: NetLimiters,
    wire: Wire,
}

/// What carries a card's frames.
enum Wire {
    /// The queues of a tap, and as many vhosts, or none.
    Tap(Vec<Tap>, Vec<VhostNet>),
    Passt(Passt),
}

impl OpenNic {
    /// Joins a network, for a card that the machine's owner will find by `id`.
    ///
    /// # Errors
    /// Whatever keeps us out of it.
    pub fn open(id: &str, config: &NetConfig, host: &dyn HostFiles) -> Result<Self, MachineError> {
        config.validate()?;
        let mut options = NetOptions { mac: config.mac, mtu: config.mtu, shape: None };
        let wire = match &config.backend {
            NetBackend::Tap(tap) => {
                let taps = Tap::attach(host, &tap.name, tap.queues)?;
                let vhosts = if tap.vhost { tap.queues } else { 0 };
                Wire::Tap(taps, (0..vhosts).map(|_| VhostNet::open(host)).collect::<Result<_, _>>()?)
            }
            NetBackend::User(network) => {
                let mac = match config.mac {
                    Some(mac) => mac,
                    None => MacAddress(net::random_mac().map_err(MachineError::host("find a MAC address"))?),
                };
                options.mac = Some(mac);
                Wire::Passt(Passt::start(host, network, config.mtu.unwrap_or(MAX_USER_MTU), mac.0)?)
            }
        };
        let limiters = NetLimiters::new(config.rx_limits, config.tx_limits);
        Ok(Self { id: id.to_owned(), config: config.clone(), options, limiters, wire })
    }

    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Has the card be one that a guest knows already, or refuse.
    pub(super) fn keep_shape(&mut self, shape: NetShapeV1) {
        self.options.shape = Some(shape);
    }

    /// Does the host's kernel write into guest memory by itself, which nobody keeps account of?
    pub(super) fn writes_behind_our_back(&self) -> bool {
        matches!(&self.wire, Wire::Tap(_, vhosts) if !vhosts.is_empty())
    }

    pub(super) fn config(&self) -> &NetConfig {
        &self.config
    }

    pub(super) fn limiters(&self) -> NicLimiters {
        match &self.wire {
            Wire::Tap(taps, vhosts) if !vhosts.is_empty() => NicLimiters::Vhost(taps[0].name().to_owned()),
            _ => NicLimiters::Both(self.limiters.clone()),
        }
    }

    /// Makes the device, called `name` in logs.
    pub(super) fn into_device(self, name: String) -> Result<Front, MachineError> {
        match self.wire {
            Wire::Tap(taps, vhosts) => net::device(name, taps, vhosts, self.options, self.limiters),
            Wire::Passt(passt) => net::user_device(name, passt, self.options, self.limiters),
        }
        .map_err(MachineError::host("make a network card"))
    }
}

/// Where the serial port's output goes.
pub struct SerialSetup(pub SerialOutput);

impl SerialSetup {
    /// Opens what the configuration names. A socket has no client yet; the caller listens.
    ///
    /// # Errors
    /// When a file cannot be created.
    pub fn open(config: &SerialConfig, host: &dyn HostFiles) -> Result<Self, MachineError> {
        Ok(Self(match config {
            SerialConfig::Null => SerialOutput::Null,
            SerialConfig::Socket(_) => SerialOutput::Socket(None),
            SerialConfig::Stdio => {
                SerialOutput::File(stdout_file().map_err(MachineError::host("use standard output"))?)
            }
            SerialConfig::File(path) => {
                let file = host.open(&HostFile::SerialOutput(path.clone()));
                SerialOutput::File(file.map_err(|source| MachineError::Serial { path: path.clone(), source })?)
            }
            SerialConfig::Open(OpenFile(file)) => {
                SerialOutput::File(file.try_clone().map_err(MachineError::host("use the console"))?)
            }
        }))
    }
}
