//! `tranche run`: boots a VM and stays with it until it ends.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use tracing::Level;

use super::api_socket::ApiSocket;
use super::console::Console;
use super::exit::{self, Exit};
use super::serve::{OnSignal, Served, serve};
use super::signals::Signals;
use super::start_error::StartError;
use crate::backend::{HostFiles, OpenDirectly};
use crate::config::{CpuShape, DiskConfig, EntropyConfig, MemoryShape, NetConfig, SerialConfig, Transport, VmConfig};
use crate::control::{Identity, Owner};
use crate::kernels::{Bundle, KernelsError, Library};
use crate::machine::{End, Machine, MachineError, Parts};
use crate::observe::{Timeline, init_log};
use crate::store::is_kernel_name;

/// Boot a VM, with its serial console on this terminal
///
/// SIGTERM (or SIGINT, SIGHUP, SIGQUIT) presses the guest's power button; a second one ends the VM at once.
/// On a terminal, Ctrl-A x ends the VM and Ctrl-A h shows help.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct RunArgs {
    /// Kernel: a bzImage (vmlinuz) as distributions ship it, an ELF vmlinux, or the name of an imported one
    #[arg(long, value_name = "PATH|NAME")]
    kernel: PathBuf,

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
    #[arg(long, value_name = "SIZE[,hugepages=on|off]", default_value = "256M")]
    memory: MemoryShape,

    /// Network card; may be repeated. In a network of its own, without rights (through passt): user[,forward=tcp|udp:HOSTPORT:GUESTPORT]...
    /// [,host=on|off]. On an existing tap: tap=NAME[,queues=N][,vhost=on|off]. Either takes mac=ADDRESS, mtu=BYTES, and limits as of a
    /// disk each way: rx-bandwidth, rx-ops, tx-bandwidth, tx-ops
    #[arg(long, value_name = "user|tap=NAME[,OPTION]...")]
    net: Vec<NetConfig>,

    /// How the guest reaches its virtio devices. With mmio there is no PCI at all, unless mmio,pci asks for an empty root
    #[arg(long, value_name = "pci|mmio[,pci]", default_value = "pci", value_parser = Transport::from_str)]
    transport: Transport,

    /// Where the serial console goes
    #[arg(long, value_name = "stdio|null|file=PATH|socket=PATH", default_value = "stdio")]
    serial: SerialConfig,

    /// Serve the API on a unix socket (see docs/api.md); a socket that nobody listens on any more is replaced
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,

    /// What to log on standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,

    /// Print when each step of the start was reached, at the end
    #[arg(long)]
    boot_timeline: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for Option<Level> {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => None,
            LogLevel::Error => Some(Level::ERROR),
            LogLevel::Warn => Some(Level::WARN),
            LogLevel::Info => Some(Level::INFO),
            LogLevel::Debug => Some(Level::DEBUG),
            LogLevel::Trace => Some(Level::TRACE),
        }
    }
}

impl RunArgs {
    fn into_config(self) -> Result<VmConfig, KernelsError> {
        let (kernel, initrd) = match imported(&self.kernel)? {
            Some(bundle) => (bundle.kernel(), self.initrd.or_else(|| Some(bundle.initrd()))),
            None => (self.kernel, self.initrd),
        };
        let root = self.rootfs.map(|disk| DiskConfig { root: true, ..disk });
        Ok(VmConfig {
            kernel,
            initrd,
            cmdline: self.cmdline,
            cpus: self.cpus.count,
            threads_per_core: self.cpus.threads_per_core,
            memory: self.memory.size,
            memory_pages: self.memory.pages,
            disks: root.into_iter().chain(self.disk).collect(),
            nics: self.net,
            entropy: Some(EntropyConfig::default()),
            serial: self.serial,
            transport: self.transport,
        })
    }
}

/// The imported kernel that `--kernel` names, if it does: a word without a slash. A file of that name is `./NAME`.
fn imported(kernel: &Path) -> Result<Option<Bundle>, KernelsError> {
    let Some(name) = kernel.to_str().filter(|_| is_kernel_name(kernel)) else { return Ok(None) };
    match Library::of_user().and_then(|library| library.find(name)) {
        Ok(bundle) => Ok(Some(bundle)),
        Err(KernelsError::Unknown(_) | KernelsError::NoPlace) => Ok(None),
        Err(error) => Err(error),
    }
}

pub fn run(args: RunArgs, start: Instant) -> ExitCode {
    init_log(args.log_level.into());
    let timeline = Arc::new(Timeline::from(start));
    let print_timeline = args.boot_timeline;
    let api_sock = args.api_sock.clone();
    let config = match args.into_config() {
        Ok(config) => config,
        Err(error) => return ExitCode::from(exit::report_kernels(&error) as u8),
    };
    let host: Arc<dyn HostFiles> = Arc::new(OpenDirectly);
    let exit = match run_to_end(&config, api_sock.as_deref(), &host, &timeline) {
        Ok(end) => {
            tell(&end);
            Exit::from(&end)
        }
        Err(error) => error.report(),
    };
    if print_timeline {
        exit::say(&timeline.to_string());
    }
    // Without unwinding the machine: the host takes everything back at once, and faster than we could.
    std::process::exit(exit as i32);
}

/// One line on standard error for an end that is not simply a power-off.
pub fn tell(end: &End) {
    match end {
        End::PowerOff => tracing::info!("the guest powered off"),
        End::Reset => exit::say("tranche: the guest reset itself\n"),
        End::Panicked => exit::say("tranche: the guest's kernel panicked\n"),
        End::MemoryLost => exit::say("tranche: the process that gave the guest's memory has ended\n"),
        End::Killed => exit::say("tranche: the VM was ended from outside\n"),
        End::Fault(fault) => exit::say(&format!("tranche: error: {fault}\n")),
    }
}

/// Builds, starts and serves the machine. The terminal is as it was when this returns.
fn run_to_end(
    config: &VmConfig,
    api_sock: Option<&Path>,
    host: &Arc<dyn HostFiles>,
    timeline: &Arc<Timeline>,
) -> Result<End, StartError> {
    let resources = |what| move |source: io::Error| MachineError::Host { what, source };
    let mut signals = Signals::block().map_err(resources("listen to signals"))?;
    let listener = api_sock.map(|path| ApiSocket::listen(path, &**host)).transpose()?;
    let machine = Machine::build(Parts::open(config, &**host)?, &**host, timeline)?;
    // Only now, as an error has to find the terminal as it was.
    let mut console = Console::open(&config.serial, &**host).map_err(|source| match &config.serial {
        SerialConfig::Socket(path) => MachineError::Serial { path: path.clone(), source },
        _ => MachineError::Host { what: "use the terminal", source },
    })?;
    let mut owner =
        Owner::new(Identity::tranche(config.transport), host.clone(), config.serial.clone(), timeline.clone());
    owner.adopt(machine, config)?;
    let api = listener.map(|socket| socket.serve(owner.view())).transpose().map_err(resources("serve the API"))?;
    let served = serve(owner, &mut console, &mut signals, OnSignal::PowerButton, api);
    match served.map_err(resources("wait for events"))? {
        Served::Ended(end) => Ok(end),
        Served::Signal(_) | Served::LoadFailed => Ok(End::Killed),
    }
}
