//! `tranche run`: boots a VM and stays with it until it ends.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use tracing::Level;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::console::{Console, Input};
use super::escape::Action;
use super::exit::{self, Exit};
use super::signals::Signals;
use crate::backend::{HostFiles, OpenDirectly};
use crate::config::{DiskConfig, EntropyConfig, MemorySize, NetConfig, SerialConfig, Transport, VmConfig};
use crate::kernels::{Bundle, KernelsError, Library};
use crate::machine::{End, Machine, MachineError, Parts, State};
use crate::memory::release_startup_code;
use crate::observe::{Timeline, init_log};

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

    /// Number of vCPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,

    /// Guest memory, at least 32M
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: MemorySize,

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

    /// What to log on standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,

    /// Print when each step of the start was reached, at the end
    #[arg(long)]
    boot_timeline: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogLevel {
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
            cpus: self.cpus,
            memory: self.memory,
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
    let Some(name) = kernel.to_str().filter(|name| !name.contains('/')) else { return Ok(None) };
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
    let config = match args.into_config() {
        Ok(config) => config,
        Err(error) => return ExitCode::from(exit::report_kernels(&error) as u8),
    };
    let exit = match run_to_end(&config, &OpenDirectly, &timeline) {
        Ok(end) => {
            tell(&end);
            Exit::from(&end)
        }
        Err(error) => exit::report(&error),
    };
    if print_timeline {
        exit::say(&timeline.to_string());
    }
    // Without unwinding the machine: the host takes everything back at once, and faster than we could.
    std::process::exit(exit as i32);
}

/// One line on standard error for an end that is not simply a power-off.
fn tell(end: &End) {
    match end {
        End::PowerOff => tracing::info!("the guest powered off"),
        End::Reset => exit::say("tranche: the guest reset itself\n"),
        End::Panicked => exit::say("tranche: the guest's kernel panicked\n"),
        End::Killed => exit::say("tranche: the VM was ended from outside\n"),
        End::Fault(fault) => exit::say(&format!("tranche: error: {fault}\n")),
    }
}

/// Builds, starts and serves the machine. The terminal is as it was when this returns.
fn run_to_end(config: &VmConfig, host: &dyn HostFiles, timeline: &Arc<Timeline>) -> Result<End, MachineError> {
    let resources = |what| move |source: io::Error| MachineError::Host { what, source };
    let mut signals = Signals::block().map_err(resources("listen to signals"))?;
    let machine = Machine::build(Parts::open(config, host)?, host, timeline)?;
    // Only now, as an error has to find the terminal as it was.
    let mut console = Console::open(&config.serial, host).map_err(|source| match &config.serial {
        SerialConfig::Socket(path) => MachineError::Serial { path: path.clone(), source },
        _ => MachineError::Host { what: "use the terminal", source },
    })?;
    // Never dropped: a vCPU may hang on a console that nobody reads, and the process ends anyway.
    let mut machine = std::mem::ManuallyDrop::new(machine);
    machine.start()?;
    release_startup_code();
    let end = serve(&mut machine, &mut console, &mut signals).map_err(resources("wait for events"));
    machine.close_disks();
    end
}

const MACHINE: u64 = 0;
const SIGNALS: u64 = 1;
const ROOM: u64 = 2;
const LISTENER: u64 = 3;
const INPUT: u64 = 4;

/// How long to wait until a guest that was just writing may take input.
const BUSY_MS: i32 = 10;

fn serve(machine: &mut Machine, console: &mut Console, signals: &mut Signals) -> io::Result<End> {
    let epoll = Epoll::new()?;
    let watch = |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
    watch(machine.events_fd(), MACHINE)?;
    watch(signals.fd(), SIGNALS)?;
    watch(std::os::fd::AsRawFd::as_raw_fd(machine.serial().room()), ROOM)?;
    if let Some(fd) = console.listener_fd() {
        // By edges: a client that cannot be accepted, for want of descriptors, must not wake us for ever.
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER))?;
    }
    let mut input = InputWatch::default();
    let mut presses = 0;
    loop {
        let ready = input.follow(console.input(), &epoll)?;
        let timeout = if ready {
            0
        } else if console.is_busy() {
            BUSY_MS
        } else {
            -1
        };
        let mut events = [EpollEvent::default(); 8];
        let count = match epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        if count == 0 && console.is_busy() {
            console.push(machine.serial());
        }
        let from_poll = events[..count].iter().map(EpollEvent::data);
        for token in from_poll.chain(ready.then_some(INPUT)) {
            match token {
                MACHINE => drop(machine.handle_events()),
                SIGNALS => {
                    for _ in 0..signals.take() {
                        presses += 1;
                        if presses == 1 { machine.press_power_button() } else { machine.kill() }
                    }
                }
                ROOM => {
                    let _ = machine.serial().room().read();
                    console.push(machine.serial());
                }
                LISTENER => console.accept(machine.serial()),
                _ => {
                    if console.read_input(machine.serial()) == Some(Action::Quit) {
                        machine.kill();
                    }
                }
            }
        }
        if let State::Ended(end) = machine.state() {
            return Ok(end.clone());
        }
    }
}

/// Keeps epoll's view of the input in step with the console's. Files and /dev/null cannot be polled: they are
/// always ready.
#[derive(Default)]
struct InputWatch {
    watched: Option<Input>,
}

impl InputWatch {
    /// Returns whether the input is to be read without waiting.
    fn follow(&mut self, wanted: Option<Input>, epoll: &Epoll) -> io::Result<bool> {
        if wanted == self.watched {
            return Ok(false);
        }
        if let Some(old) = self.watched.take() {
            // It fails for a client that another one has replaced: closed everywhere, it has left by itself.
            let _ = epoll.ctl(ControlOperation::Delete, old.fd, EpollEvent::default());
        }
        let Some(new) = wanted else { return Ok(false) };
        match epoll.ctl(ControlOperation::Add, new.fd, EpollEvent::new(EventSet::IN, INPUT)) {
            Ok(()) => self.watched = wanted,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
            Err(error) => return Err(error),
        }
        Ok(false)
    }
}
