//! What a VM is, on the command line: options, or the file of a definition.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::start_error::StartError;
use crate::config::{
    CpuShape, DEFAULT_MEMORY, DiskConfig, EntropyConfig, MemoryPages, MemoryPolicyArg, MemoryShape, NetConfig,
    SerialConfig, Transport, VmConfig,
};
use crate::kernels::{KernelsError, Library};
use crate::store::{Definition, DefinitionError, is_kernel_name};

#[derive(Debug, Args)]
pub struct VmArgs {
    /// Kernel: a bzImage (vmlinuz) as distributions ship it, an ELF vmlinux, or the name of an imported one
    #[arg(long, value_name = "PATH|NAME", required_unless_present = "config")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk; an imported kernel has its own
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Kernel arguments, added to 'console=ttyS0 panic=1' and, with --rootfs, 'root=/dev/vda rw'
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// Root disk, the guest's /dev/vda: a raw image, a block device or, with format=qcow2, a qcow2 image. A comma in a path is written twice
    #[arg(long, value_name = "PATH[,OPTION]...", value_parser = DiskConfig::from_arg)]
    rootfs: Option<DiskConfig>,

    /// Another disk; may be repeated. Options: ro, id=NAME, cache=writeback|unsafe, queues=N, engine=sync|io_uring|auto,
    /// format=raw|qcow2[,backing=PATH[,backing-format=raw|qcow2]]..., and limits: bandwidth=BYTES[/MS][+BURST], ops=N[/MS][+BURST]
    #[arg(long, value_name = "PATH[,OPTION]...", value_parser = DiskConfig::from_arg)]
    disk: Vec<DiskConfig>,

    /// Number of vCPUs, 1 to 64; with threads=2, two of them share a core
    #[arg(long, value_name = "N[,threads=1|2]", default_value = "1")]
    cpus: CpuShape,

    /// Guest memory, at least 32M; with hugepages, in pages of 2 MiB that an administrator has reserved
    #[arg(long, value_name = "SIZE[,hugepages=on|off]", default_value_t = MemoryShape { size: DEFAULT_MEMORY, pages: MemoryPages::Transparent })]
    memory: MemoryShape,

    /// What the host does with it, besides: huge pages as above, pages that VMs may share (KSM), all of it there before the start,
    /// or that and never swapped
    #[arg(long, value_name = "hugepages|mergeable|prefault|locked[,...]")]
    memory_policy: Option<MemoryPolicyArg>,

    /// Network card; may be repeated. In a network of its own, without rights (through passt): user[,forward=tcp|udp:HOSTPORT:GUESTPORT]...
    /// [,host=on|off]. On an existing tap: tap=NAME[,queues=N][,vhost=on|off]. Either takes mac=ADDRESS, mtu=BYTES, and limits as of a
    /// disk each way: rx-bandwidth, rx-ops, tx-bandwidth, tx-ops
    #[arg(long, value_name = "user|tap=NAME[,OPTION]...")]
    net: Vec<NetConfig>,

    /// How the guest reaches its virtio devices. With mmio there is no PCI at all, unless mmio,pci asks for an empty root
    #[arg(long, value_name = "pci|mmio[,pci]", default_value = "pci", value_parser = Transport::from_str)]
    transport: Transport,

    /// Take it all from the file of a definition instead, such as 'tranche inspect --definition NAME' prints; paths in it begin at its directory
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kernel", "initrd", "cmdline", "rootfs", "disk", "cpus", "memory", "memory_policy", "net", "transport",
    ])]
    config: Option<PathBuf>,
}

impl VmArgs {
    /// The definition of a VM that has no name yet. Its paths are as they were given, or begin at its file's directory.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn into_definition(self) -> Result<Definition, StartError> {
        if let Some(path) = self.config {
            let read = || {
                let mut definition = Definition::parse(&std::fs::read(&path)?)?;
                definition.settle(path.parent().unwrap_or(Path::new("")))?;
                definition.validate()?;
                Ok::<_, DefinitionError>(definition)
            };
            return read().map_err(|source| StartError::Description { path, source: Box::new(source) });
        }
        let policy = self.memory_policy.unwrap_or_default();
        let root = self.rootfs.map(|disk| DiskConfig { root: true, ..disk });
        Ok(Definition::new(VmConfig {
            // clap has seen to it that there is one.
            kernel: self.kernel.unwrap_or_default(),
            initrd: self.initrd,
            cmdline: self.cmdline,
            cpus: self.cpus.count,
            threads_per_core: self.cpus.threads_per_core,
            memory: self.memory.size,
            memory_pages: if policy.huge_pages { MemoryPages::Huge } else { self.memory.pages },
            memory_policy: policy.policy,
            disks: root.into_iter().chain(self.disk).collect(),
            nics: self.net,
            entropy: Some(EntropyConfig::default()),
            serial: SerialConfig::default(),
            transport: self.transport,
        }))
    }
}

/// Puts the files of an imported kernel where a VM names it: by a word without a slash. A file of that name is `./NAME`.
///
/// # Errors
/// When it is damaged.
pub fn resolve_kernel(vm: &mut VmConfig) -> Result<(), KernelsError> {
    let Some(name) = vm.kernel.to_str().filter(|_| is_kernel_name(&vm.kernel)) else { return Ok(()) };
    match Library::of_user().and_then(|library| library.find(name)) {
        Ok(bundle) => {
            vm.kernel = bundle.kernel();
            vm.initrd.get_or_insert_with(|| bundle.initrd());
            Ok(())
        }
        // Then it is a path, and that there is no such file is said in the end.
        Err(KernelsError::Unknown(_) | KernelsError::NoPlace) => Ok(()),
        Err(error) => Err(error),
    }
}
