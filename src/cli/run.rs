//! `tranche run`: boots a VM and stays with it until it ends.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use tracing::Level;

use super::console::Console;
use super::exit;
use super::jailed::{self, Inside, Outcome, Outside};
use super::scope;
use super::serve::{OnSignal, Served, serve};
use super::start_error::StartError;
use super::vm;
use super::vm::create::{NamedArgs, NewVm};
use super::vm_args::{VmArgs, resolve_kernel};
use crate::backend::HostFiles;
use crate::config::{JailLevel, SerialConfig, Share, VmConfig};
use crate::control::{Identity, Owner};
use crate::machine::{End, Machine, MachineError, Parts};
use crate::observe::{Timeline, init_log};
use crate::store::Definition;

/// Boot a VM, with its serial console on this terminal
///
/// SIGTERM (or SIGINT, SIGHUP, SIGQUIT) presses the guest's power button; a second one ends the VM at once.
/// On a terminal, Ctrl-A x ends the VM and Ctrl-A h shows help.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct RunArgs {
    #[command(flatten)]
    vm: VmArgs,

    /// Keep the VM under this name, as 'tranche create' does, and start it; this terminal is attached to its console
    #[arg(long, conflicts_with_all = ["serial", "api_sock", "boot_timeline"])]
    name: Option<String>,

    /// Return when the VM runs
    #[arg(long, short, requires = "name")]
    detach: bool,

    #[command(flatten)]
    named: NamedArgs,

    #[command(flatten)]
    jail: JailArgs,

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

impl LogLevel {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
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

pub fn run(mut args: RunArgs, start: Instant) -> ExitCode {
    if let Some(name) = args.name.take() {
        let new = NewVm { vm: args.vm, named: args.named, jail: args.jail };
        return vm::run_named(&name, new, args.log_level, args.detach);
    }
    init_log(args.log_level.into());
    jailed::end(run_to_end(args, &Arc::new(Timeline::from(start))))
}

/// How the VM is jailed.
#[derive(Debug, Clone, Args)]
pub struct JailArgs {
    /// How much is taken away from the VM's process (see docs/jail.md) [default: strict]
    #[arg(long = "jail", value_name = "LEVEL")]
    pub level: Option<JailLevel>,

    #[command(flatten)]
    pub share: Share,
}

impl JailArgs {
    #[must_use]
    pub fn level(&self) -> JailLevel {
        self.level.unwrap_or_default()
    }

    /// With what a definition says where the command line says nothing.
    #[must_use]
    pub fn or(self, definition: &Definition) -> Self {
        Self { level: self.level.or(Some(definition.jail)), share: self.share.or(&definition.share) }
    }
}

/// One line on standard error for an end that is not simply a power-off.
pub fn tell(end: &End) {
    match end {
        End::PowerOff => tracing::info!("{}", what_ended(end)),
        End::Fault(_) => exit::say(&format!("tranche: error: {}\n", what_ended(end))),
        _ => exit::say(&format!("tranche: {}\n", what_ended(end))),
    }
}

/// How it came to its end.
pub fn what_ended(end: &End) -> String {
    match end {
        End::PowerOff => "the guest powered off".into(),
        End::Reset => "the guest reset itself".into(),
        End::Panicked => "the guest's kernel panicked".into(),
        End::MemoryLost => "the process that gave the guest's memory has ended".into(),
        End::Killed => "the VM was ended from outside".into(),
        End::Fault(fault) => fault.to_string(),
    }
}

/// Builds, starts and serves the machine. The terminal is as it was when this returns.
fn run_to_end(args: RunArgs, timeline: &Arc<Timeline>) -> Result<Outcome, StartError> {
    let definition = args.vm.into_definition()?;
    let jail = args.jail.or(&definition);
    scope::enter(&jail.share);
    let mut config = definition.vm;
    resolve_kernel(&mut config)?;
    config.serial = args.serial;
    let outside = Outside::new(&jail, args.api_sock.as_deref(), &config.serial)?;
    let identity = Identity::tranche(config.transport);
    Ok(jailed::run(outside, |inside| {
        let host = inside.host.clone();
        let ended =
            Boot { config: &config, identity, inside, timeline }.serve(|| open_console(&config.serial, &host), || {});
        if args.boot_timeline {
            exit::say(&timeline.to_string());
        }
        ended
    }))
}

/// The console that goes with where the serial port's output goes.
pub fn open_console(serial: &SerialConfig, host: &Arc<dyn HostFiles>) -> Result<Console, MachineError> {
    Console::open(serial, host).map_err(|source| match serial {
        SerialConfig::Socket(path) => MachineError::Serial { path: path.clone(), source },
        _ => MachineError::Host { what: "use the terminal", source },
    })
}

/// What a VM is booted with.
pub struct Boot<'a> {
    pub config: &'a VmConfig,
    pub identity: Identity,
    pub inside: Inside,
    pub timeline: &'a Arc<Timeline>,
}

impl Boot<'_> {
    /// Builds the machine, starts it and serves it until it ends. `started` is done after it has been told that it runs.
    ///
    /// # Errors
    /// What keeps it from its start, or from being served.
    pub fn serve(
        self,
        console: impl FnOnce() -> Result<Console, MachineError>,
        started: impl FnOnce(),
    ) -> Result<End, StartError> {
        let Self { config, identity, mut inside, timeline } = self;
        let host = inside.host.clone();
        let mut owner = Owner::new(identity, host.clone(), config.serial.clone(), timeline.clone());
        inside.instruct(&mut owner);
        let parts = Parts { budgets: owner.budgets(), ..Parts::open(config, &*host)? };
        let machine = Machine::build(parts, &*host, timeline)?;
        // Only now, as an error has to find the terminal as it was.
        let mut console = console()?;
        owner.adopt(machine, config)?;
        serve_to_end(owner, &mut console, inside, started)
    }
}

/// Serves a VM until it ends.
///
/// # Errors
/// What keeps it from being served.
pub fn serve_to_end(
    owner: Owner,
    console: &mut Console,
    mut inside: Inside,
    started: impl FnOnce(),
) -> Result<End, StartError> {
    let api = inside.api.take().map(|api| api.serve(owner.view()));
    let api = api.transpose().map_err(resources("serve the API"))?;
    inside.started();
    started();
    let served = serve(owner, console, &mut inside.signals, OnSignal::PowerButton, api);
    match served.map_err(resources("wait for events"))? {
        Served::Ended(end) => Ok(end),
        Served::Signal(_) | Served::LoadFailed => Ok(End::Killed),
    }
}

/// An error of the host, of which a VM's process wants something.
pub fn resources(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}
