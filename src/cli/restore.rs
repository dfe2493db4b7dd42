//! `tranche restore`: a VM goes on where it was saved.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::api_socket::ApiSocket;
use super::console::Console;
use super::exit::{self, Exit};
use super::run::{LogLevel, tell};
use super::serve::{OnSignal, Served, serve};
use super::signals::Signals;
use super::start_error::StartError;
use crate::backend::netns::NetNamespace;
use crate::backend::{HostFiles, OpenDirectly, tap};
use crate::config::{NetBackend, Override, SavedVm, SerialConfig, Transport};
use crate::control::{Identity, Owner, Revival};
use crate::machine::{End, MachineError};
use crate::observe::{Timeline, init_log};
use crate::platform::chips::Clock;
use crate::snapshot::Folder;

/// Let a VM go on where it was saved (see docs/snapshots.md)
///
/// The snapshot stays as it is, and can be restored again, also at the same time. Memory is read as the guest
/// looks at it.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct RestoreArgs {
    /// The snapshot's directory
    dir: PathBuf,

    /// Another file or network than the saved one; may be repeated
    #[arg(long = "override", value_name = "disk.NAME=PATH|net.NAME=TAP", value_parser = Override::from_str)]
    overrides: Vec<Override>,

    /// A directory for what the VM writes to the snapshot's disks, in a file NAME.qcow2 for each; without it, that is gone
    /// when the VM ends
    #[arg(long, value_name = "DIR")]
    disks: Option<PathBuf>,

    /// The network namespace in which its taps are, by name or path, or 'new': one of its own, with taps of those names
    #[arg(long, value_name = "new|NAME|PATH", value_parser = NetNamespace::from_str)]
    netns: Option<NetNamespace>,

    /// End it without more ado when the process ends that has started it
    #[arg(long, value_name = "PID", hide = true)]
    with_parent: Option<u32>,

    /// Where the API listens; a socket that nobody listens on any more is replaced
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,

    /// Leave it paused, to go on when it is resumed
    #[arg(long, requires = "api_sock")]
    paused: bool,

    /// What the guest's clock does about the time since it was saved: it goes on from then, or is the host's
    #[arg(long, value_name = "WHAT", default_value = "continue")]
    clock: ClockArg,

    /// Where the serial console goes
    #[arg(long, value_name = "stdio|null|file=PATH|socket=PATH", default_value = "stdio")]
    serial: SerialConfig,

    /// The VM's id for Firecracker's clients: 1 to 64 letters, digits and '-'
    #[arg(long, value_name = "ID", default_value = "anonymous-instance", value_parser = super::vmm::instance_id)]
    id: String,

    /// What to log on standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,

    /// Print when each step of the start was reached, at the end
    #[arg(long)]
    boot_timeline: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ClockArg {
    Continue,
    Advance,
}

pub fn run(args: &RestoreArgs, start: Instant) -> ExitCode {
    init_log(args.log_level.into());
    let timeline = Arc::new(Timeline::from(start));
    let exit = match run_to_end(args, &timeline) {
        Ok(end) => {
            tell(&end);
            Exit::from(&end)
        }
        Err(error) => error.report(),
    };
    if args.boot_timeline {
        exit::say(&timeline.to_string());
    }
    // Without unwinding the machine: the host takes everything back at once, and faster than we could.
    std::process::exit(exit as i32);
}

/// Makes the taps that a VM is to be on, in a network namespace that has none yet.
fn make_taps(config: &SavedVm) -> Result<(), MachineError> {
    for nic in &config.nics {
        if let NetBackend::Tap(network) = &nic.config.backend {
            tap::create(&network.name, network.queues)?;
        }
    }
    Ok(())
}

fn run_to_end(args: &RestoreArgs, timeline: &Arc<Timeline>) -> Result<End, StartError> {
    let resources = |what| move |source: std::io::Error| MachineError::Host { what, source };
    let host: Arc<dyn HostFiles> = Arc::new(OpenDirectly);
    if let Some(parent) = args.with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(|error| resources("watch its parent")(error.into()))?;
        if std::os::unix::process::parent_id() != parent {
            return Ok(End::Killed);
        }
    }
    let mut folder = Folder::open(&args.dir, &*host)?;
    for change in &args.overrides {
        change.apply(&mut folder.snapshot.config).map_err(StartError::Override)?;
    }
    if let Some(namespace) = &args.netns {
        namespace.enter()?;
        if *namespace == NetNamespace::New {
            make_taps(&folder.snapshot.config)?;
        }
    }
    let snapshot = folder.with_overlays(args.disks.as_deref(), &host)?;
    let mut signals = Signals::block().map_err(resources("listen to signals"))?;
    let socket = args.api_sock.as_ref().map(|path| ApiSocket::listen(path, &*host)).transpose()?;
    let identity = Identity { id: args.id.clone(), ..Identity::tranche(Transport::default()) };
    let mut owner = Owner::new(identity, host.clone(), args.serial.clone(), timeline.clone());
    let clock = match args.clock {
        ClockArg::Continue => Clock::Continue,
        ClockArg::Advance => Clock::Advance,
    };
    owner.restore(snapshot, Revival { clock, track_writes: false })?;
    let mut console = Console::open(&args.serial, &*host).map_err(|source| match &args.serial {
        SerialConfig::Socket(path) => MachineError::Serial { path: path.clone(), source },
        _ => MachineError::Host { what: "use the terminal", source },
    })?;
    if !args.paused {
        owner.resume()?;
    }
    let api = socket.map(|socket| socket.serve(owner.view())).transpose().map_err(resources("serve the API"))?;
    let served = serve(owner, &mut console, &mut signals, OnSignal::PowerButton, api);
    match served.map_err(resources("wait for events"))? {
        Served::Ended(end) => Ok(end),
        Served::Signal(_) | Served::LoadFailed => Ok(End::Killed),
    }
}
