//! `tranche restore`: a VM goes on where it was saved.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::exit;
use super::jailed::{self, Outcome, Outside};
use super::run::{JailArgs, LogLevel, open_console, serve_to_end};
use super::start_error::StartError;
use crate::backend::netns::NetNamespace;
use crate::backend::{OpenDirectly, tap};
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

    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ClockArg {
    Continue,
    Advance,
}

pub fn run(args: &RestoreArgs, start: Instant) -> ExitCode {
    init_log(args.log_level.into());
    super::scope::enter(&args.jail.share);
    jailed::end(run_to_end(args, &Arc::new(Timeline::from(start))))
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

fn run_to_end(args: &RestoreArgs, timeline: &Arc<Timeline>) -> Result<Outcome, StartError> {
    let resources = |what| move |source: std::io::Error| MachineError::Host { what, source };
    if let Some(parent) = args.with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(|error| resources("watch its parent")(error.into()))?;
        if std::os::unix::process::parent_id() != parent {
            return Ok(jailed::conclude(Ok(End::Killed)));
        }
    }
    let mut folder = Folder::open(&args.dir, &OpenDirectly)?;
    let manifest = Folder::manifest_right(&args.dir, &OpenDirectly).ok();
    for change in &args.overrides {
        change.apply(&mut folder.snapshot.config).map_err(StartError::Override)?;
    }
    if let Some(namespace) = &args.netns {
        namespace.enter()?;
        if *namespace == NetNamespace::New {
            make_taps(&folder.snapshot.config)?;
        }
    }
    let mut outside = Outside::new(&args.jail, args.api_sock.as_deref(), &args.serial)?;
    // The next snapshot takes from it what it knows of the disks' files.
    outside.rights.extend(manifest);
    let identity = Identity { id: args.id.clone(), ..Identity::tranche(Transport::default()) };
    let clock = match args.clock {
        ClockArg::Continue => Clock::Continue,
        ClockArg::Advance => Clock::Advance,
    };
    Ok(jailed::run(outside, |mut inside| {
        let mut owner = Owner::new(identity, inside.host.clone(), args.serial.clone(), timeline.clone());
        inside.instruct(&mut owner);
        let snapshot = folder.with_overlays(args.disks.as_deref(), &inside.host)?;
        owner.restore(snapshot, Revival { clock, track_writes: false })?;
        let mut console = open_console(&args.serial, &inside.host)?;
        if !args.paused {
            owner.resume()?;
        }
        let ended = serve_to_end(owner, &mut console, inside, || {});
        if args.boot_timeline {
            exit::say(&timeline.to_string());
        }
        ended
    }))
}
