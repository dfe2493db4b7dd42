//! What a VM is: plain data with defaults, units and validation.

mod cpu;
pub mod firecracker;
mod jail;
mod limits;
mod options;
mod saved;
mod shape;
mod share;
mod units;

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use cpu::{BitChange, CpuChanges, CpuidChange, CpuidRegister, MsrChange};
pub use jail::JailLevel;
pub use limits::{RateLimits, TokenBucket};
pub use saved::{Override, OverrideError, SavedDisk, SavedNic, SavedVm};
pub use shape::{CpuShape, MemoryPages, MemoryPolicy, MemoryPolicyArg, MemoryShape, check_threads};
pub use share::{Flow, Share};
pub use units::{MacAddress, MemorySize};

/// Most vCPUs a VM can have.
pub const MAX_CPUS: u8 = 64;
/// Least guest memory, in bytes. A kernel may need more, which its loader says.
pub const MIN_MEMORY: u64 = 32 << 20;
/// Guest memory of a VM that does not say how much it wants.
pub const DEFAULT_MEMORY: MemorySize = MemorySize(256 << 20);
/// Most virtio devices: the slots of one PCI bus of 32, less the host bridge; as many over MMIO.
pub const MAX_DEVICES: usize = 31;
/// Most queues of one disk: each has a thread of its own.
pub const MAX_DISK_QUEUES: u16 = 16;
/// Most queue pairs of one network card.
pub const MAX_NET_QUEUES: u16 = 16;
/// Largest MTU in a user network, in bytes.
pub const MAX_USER_MTU: u16 = 65_520;
/// Kernel arguments that come before the user's own.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=1";

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("'{0}' is not a size: give bytes or a number with K, M, G or T, such as 512M")]
    Size(String),
    #[error("'{0}' is not a MAC address: give six pairs of hex digits, such as 52:54:00:12:34:56")]
    Mac(String),
    #[error("MAC address {0} is a multicast address: the first byte must be even")]
    MulticastMac(String),
    #[error("MTU {0} is out of range: 68 to 65535 bytes")]
    Mtu(String),
    #[error("unknown option '{key}': {known} are known here")]
    UnknownOption { key: String, known: &'static str },
    #[error("option '{0}' is given twice")]
    RepeatedOption(String),
    #[error("option '{key}' cannot be '{value}': it takes {takes}")]
    OptionValue { key: &'static str, value: String, takes: &'static str },
    #[error("a path is missing")]
    NoPath,
    #[error("a back end is missing: give tap=NAME, or user")]
    NoNetBackend,
    #[error("a card is on a tap or in a user network, not both")]
    TwoNetBackends,
    #[error("option '{key}' belongs to {backend}")]
    OptionOfOther { key: &'static str, backend: &'static str },
    #[error("'{0}' is no forward: give tcp:HOSTPORT:GUESTPORT or udp:HOSTPORT:GUESTPORT, such as tcp:8080:80")]
    Forward(String),
    #[error("{protocol} port {port} is forwarded twice")]
    RepeatedForward { protocol: ForwardedProtocol, port: u16 },
    #[error("disk id '{0}' is not 1 to 20 characters of a-z, A-Z, 0-9, '_', '-' and '.'")]
    DiskId(String),
    #[error("backing-format belongs behind the backing=PATH it is about")]
    BackingFormat,
    #[error("only a qcow2 disk has a backing file: say format=qcow2")]
    BackingOfRaw,
    #[error("two disks have the id '{0}'")]
    RepeatedDiskId(String),
    #[error("two network cards have the MAC address {0}")]
    RepeatedMac(MacAddress),
    #[error("the tap '{0}' is given to two network cards")]
    RepeatedTap(String),
    #[error(
        "the card on the tap '{0}' has limits, which only hold without vhost: the host's kernel would move its frames"
    )]
    LimitsOfVhost(String),
    #[error("{0} vCPUs are out of range: 1 to {MAX_CPUS}")]
    Cpus(u8),
    #[error("{threads} threads a core do not go with {cpus} vCPUs: give 1, or 2 with an even number of vCPUs")]
    Threads { cpus: u8, threads: u8 },
    #[error("{0} of memory is too little: {min} at least", min = MemorySize(MIN_MEMORY))]
    Memory(MemorySize),
    #[error("memory has to be a multiple of 4 KiB: {0} bytes is not")]
    MemoryUnit(u64),
    #[error("memory in huge pages has to be a multiple of 2 MiB: {0} is not")]
    HugeMemoryUnit(MemorySize),
    #[error("huge pages cannot be mergeable: the host shares small ones only (KSM)")]
    MergeableHugePages,
    #[error("{0} devices are too many: {MAX_DEVICES} at most")]
    TooManyDevices(usize),
}

/// A whole VM. In a file, what is not said is as the command line has it by default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// Added to what the VM's own shape asks for.
    pub cmdline: Option<String>,
    #[serde(default = "one")]
    pub cpus: u8,
    /// Of the guest's cores: 1 or 2.
    #[serde(default = "one")]
    pub threads_per_core: u8,
    #[serde(default = "default_memory")]
    pub memory: MemorySize,
    #[serde(default)]
    pub memory_pages: MemoryPages,
    #[serde(default)]
    pub memory_policy: MemoryPolicy,
    /// The first one is the root disk if it says so.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    #[serde(default)]
    pub nics: Vec<NetConfig>,
    #[serde(default = "default_entropy")]
    pub entropy: Option<EntropyConfig>,
    #[serde(skip)]
    pub serial: SerialConfig,
    #[serde(default)]
    pub transport: Transport,
}

fn one<T: From<u8>>() -> T {
    1.into()
}

fn default_memory() -> MemorySize {
    DEFAULT_MEMORY
}

#[expect(clippy::unnecessary_wraps, reason = "a VM may have none")]
fn default_entropy() -> Option<EntropyConfig> {
    Some(EntropyConfig::default())
}

/// How the guest reaches its virtio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    #[default]
    Pci,
    /// Behind registers that ACPI names; with an empty PCI root beside them, or none.
    Mmio { pci: bool },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskConfig {
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
    /// What the guest sees as the disk's serial number.
    pub id: Option<String>,
    #[serde(default)]
    pub cache: CacheMode,
    #[serde(default)]
    pub engine: IoEngine,
    /// Request queues, each served by a thread of its own.
    #[serde(default = "one")]
    pub queues: u16,
    #[serde(default)]
    pub root: bool,
    #[serde(default)]
    pub image: Image,
    #[serde(default)]
    pub limits: RateLimits,
}

/// What is in a disk's file, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Image {
    /// Raw when absent; then it must not look like something else.
    pub format: Option<DiskFormat>,
    /// The files behind a qcow2 image, the next one first.
    #[serde(default)]
    pub backing: Vec<Backing>,
}

/// How a disk's bytes lie in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

/// A file behind a qcow2 image: what is not in the image is read from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Backing {
    pub path: PathBuf,
    /// Raw when absent; then it must not look like something else, nor the image above say so.
    pub format: Option<DiskFormat>,
}

/// What a guest's flush means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// A flush reaches the disk before it is answered.
    #[default]
    Writeback,
    /// No flush is offered: a power loss of the host may lose what the guest has synced.
    Unsafe,
}

/// How a disk's file is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoEngine {
    /// By io_uring where the host has it and it helps, else as `Sync`.
    #[default]
    Auto,
    /// One request of a queue at a time.
    Sync,
    /// Many at a time.
    IoUring,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetConfig {
    pub backend: NetBackend,
    /// Random when absent.
    pub mac: Option<MacAddress>,
    /// The back end's when absent.
    pub mtu: Option<u16>,
    /// Of what the guest receives.
    #[serde(default)]
    pub rx_limits: RateLimits,
    /// Of what the guest sends.
    #[serde(default)]
    pub tx_limits: RateLimits,
}

/// Where a card's frames go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    Tap(TapNetwork),
    User(UserNetwork),
}

/// A tap of the host's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TapNetwork {
    pub name: String,
    /// Pairs of queues, each on a queue of the tap.
    #[serde(default = "one")]
    pub queues: u16,
    /// Do the frames move within the host's kernel?
    #[serde(default)]
    pub vhost: bool,
}

/// A network of the guest's own, whose connections are sockets of the user.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct UserNetwork {
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// Does the guest reach what listens on the host's loopback?
    #[serde(default)]
    pub host: bool,
}

/// A port of the host's loopback that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Forward {
    pub protocol: ForwardedProtocol,
    pub host_port: u16,
    pub guest_port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardedProtocol {
    Tcp,
    Udp,
}

impl fmt::Display for ForwardedProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A device that gives the guest of the host's entropy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EntropyConfig {
    #[serde(default)]
    pub limits: RateLimits,
}

/// Where the serial port goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialConfig {
    #[default]
    Stdio,
    Null,
    File(PathBuf),
    Socket(PathBuf),
    /// What is open already; no command line names it.
    Open(OpenFile),
}

/// A file that is open, and the same as itself alone.
#[derive(Debug, Clone)]
pub struct OpenFile(pub Arc<File>);

impl PartialEq for OpenFile {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for OpenFile {}

impl VmConfig {
    /// Checks what no single option can know by itself.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_size(self.cpus, self.memory, self.devices())?;
        check_threads(self.cpus, self.threads_per_core)?;
        self.memory_pages.check(self.memory)?;
        if self.memory_pages == MemoryPages::Huge && self.memory_policy.mergeable {
            return Err(ConfigError::MergeableHugePages);
        }
        if let Some(id) = repeated(self.disks.iter().filter_map(|d| d.id.as_ref())) {
            return Err(ConfigError::RepeatedDiskId(id.clone()));
        }
        if let Some(mac) = repeated(self.nics.iter().filter_map(|n| n.mac.as_ref())) {
            return Err(ConfigError::RepeatedMac(*mac));
        }
        let taps = self.nics.iter().filter_map(|nic| match &nic.backend {
            NetBackend::Tap(tap) => Some(&tap.name),
            NetBackend::User(_) => None,
        });
        if let Some(name) = repeated(taps) {
            return Err(ConfigError::RepeatedTap(name.clone()));
        }
        self.nics.iter().try_for_each(NetConfig::validate)?;
        let forwards = self.nics.iter().filter_map(|nic| match &nic.backend {
            NetBackend::User(network) => Some(&network.forwards),
            NetBackend::Tap(_) => None,
        });
        if let Some((protocol, port)) = repeated(forwards.flatten().map(|f| (f.protocol, f.host_port))) {
            return Err(ConfigError::RepeatedForward { protocol, port });
        }
        Ok(())
    }

    /// How many virtio devices there are: disks, network cards, the entropy device.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.disks.len() + self.nics.len() + usize::from(self.entropy.is_some())
    }

    /// The kernel command line: defaults, the root disk, the user's text, in this order, so that the last word
    /// is the user's.
    #[must_use]
    pub fn kernel_cmdline(&self) -> String {
        let mut line = String::from(DEFAULT_CMDLINE);
        if let Some(root) = self.disks.first().filter(|d| d.root) {
            line.push_str(if root.read_only { " root=/dev/vda ro" } else { " root=/dev/vda rw" });
        }
        if let Some(more) = &self.cmdline {
            line.push(' ');
            line.push_str(more);
        }
        line
    }
}

/// Checks that a VM can have so much of everything.
///
/// # Errors
/// The first limit that is passed.
pub fn check_size(cpus: u8, memory: MemorySize, devices: usize) -> Result<(), ConfigError> {
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(ConfigError::Cpus(cpus));
    }
    if memory.0 < MIN_MEMORY {
        return Err(ConfigError::Memory(memory));
    }
    if !memory.0.is_multiple_of(4096) {
        return Err(ConfigError::MemoryUnit(memory.0));
    }
    if devices > MAX_DEVICES {
        return Err(ConfigError::TooManyDevices(devices));
    }
    Ok(())
}

impl NetConfig {
    /// Checks what no single option can know by itself.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let limited = !(self.rx_limits.is_unlimited() && self.tx_limits.is_unlimited());
        match &self.backend {
            NetBackend::Tap(tap) if tap.vhost && limited => Err(ConfigError::LimitsOfVhost(tap.name.clone())),
            _ => Ok(()),
        }
    }
}

fn repeated<T: PartialEq>(items: impl Iterator<Item = T>) -> Option<T> {
    let items: Vec<T> = items.collect();
    let at = (1..items.len()).find(|&i| items[..i].contains(&items[i]))?;
    items.into_iter().nth(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            kernel: "vmlinuz".into(),
            initrd: None,
            cmdline: None,
            cpus: 1,
            threads_per_core: 1,
            memory: MemorySize(128 << 20),
            memory_pages: MemoryPages::default(),
            memory_policy: MemoryPolicy::default(),
            disks: Vec::new(),
            nics: Vec::new(),
            entropy: Some(EntropyConfig::default()),
            serial: SerialConfig::Null,
            transport: Transport::default(),
        }
    }

    #[test]
    fn limits_hold() {
        assert_eq!(config().validate(), Ok(()));
        for (cpus, ok) in [(0, false), (1, true), (64, true), (65, false)] {
            assert_eq!(VmConfig { cpus, ..config() }.validate().is_ok(), ok, "{cpus} vCPUs");
        }
        for (cpus, threads_per_core, ok) in
            [(4, 2, true), (1, 1, true), (1, 2, false), (3, 2, false), (4, 4, false), (4, 0, false)]
        {
            let vm = VmConfig { cpus, threads_per_core, ..config() };
            let wrong = ConfigError::Threads { cpus, threads: threads_per_core };
            assert_eq!(vm.validate(), if ok { Ok(()) } else { Err(wrong) });
        }
        let odd = VmConfig { memory: MemorySize(65 << 20), memory_pages: MemoryPages::Huge, ..config() };
        assert_eq!(odd.validate(), Err(ConfigError::HugeMemoryUnit(odd.memory)));
        for (memory, ok) in [(32 << 20, true), ((32 << 20) - 4096, false), ((64 << 20) + 1, false), (1 << 40, true)] {
            assert_eq!(VmConfig { memory: MemorySize(memory), ..config() }.validate().is_ok(), ok, "{memory} bytes");
        }
        let disks = |n: usize| vec!["d.img".parse::<DiskConfig>().unwrap(); n];
        assert_eq!(VmConfig { disks: disks(30), ..config() }.validate(), Ok(()));
        assert_eq!(VmConfig { disks: disks(31), ..config() }.validate(), Err(ConfigError::TooManyDevices(32)));
    }

    #[test]
    fn what_must_be_unique_is() {
        let disks = vec!["a,id=x".parse().unwrap(), "b,id=x".parse().unwrap()];
        assert_eq!(VmConfig { disks, ..config() }.validate(), Err(ConfigError::RepeatedDiskId("x".into())));
        let nics = vec!["tap=t0".parse().unwrap(), "tap=t0".parse().unwrap()];
        assert_eq!(VmConfig { nics, ..config() }.validate(), Err(ConfigError::RepeatedTap("t0".into())));
        let nics = vec!["user,forward=tcp:80:1".parse().unwrap(), "user,forward=tcp:80:2".parse().unwrap()];
        let twice = ConfigError::RepeatedForward { protocol: ForwardedProtocol::Tcp, port: 80 };
        assert_eq!(VmConfig { nics, ..config() }.validate(), Err(twice));
        let nics = vec!["user,forward=tcp:80:1".parse().unwrap(), "user,forward=udp:80:1".parse().unwrap()];
        assert_eq!(VmConfig { nics, ..config() }.validate(), Ok(()));
        let nics: Vec<NetConfig> =
            vec!["tap=t0,mac=02:0:0:0:0:1".parse().unwrap(), "tap=t1,mac=02:00:00:00:00:01".parse().unwrap()];
        assert!(matches!(VmConfig { nics, ..config() }.validate(), Err(ConfigError::RepeatedMac(_))));
    }

    #[test]
    fn the_hosts_kernel_knows_no_limits() {
        for (text, ok) in [
            ("tap=t,vhost=on", true),
            ("tap=t,rx-ops=1", true),
            ("tap=t,vhost=on,rx-ops=1", false),
            ("tap=t,vhost=on,tx-bandwidth=1M", false),
            ("user,rx-ops=1", true),
        ] {
            let vm = VmConfig { nics: vec![text.parse().unwrap()], ..config() };
            assert_eq!(vm.validate(), if ok { Ok(()) } else { Err(ConfigError::LimitsOfVhost("t".into())) }, "{text}");
        }
    }

    #[test]
    fn the_users_arguments_come_last() {
        let mut vm = config();
        assert_eq!(vm.kernel_cmdline(), "console=ttyS0 panic=1");
        vm.disks = vec![DiskConfig { root: true, ..DiskConfig::from_arg("r.img,ro").unwrap() }];
        vm.cmdline = Some("quiet root=/dev/vdb".into());
        assert_eq!(vm.kernel_cmdline(), "console=ttyS0 panic=1 root=/dev/vda ro quiet root=/dev/vdb");
    }
}
