//! `tranche start`: the process that is a named VM, and the one that starts it.
//!
//! One in the background is this program again. Its standard error is a socket to who starts it, until the VM runs:
//! what comes there is why it does not, but for a NUL at the end, which says that it does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use clap::Args;

use super::failure::{Failure, conclude};
use super::hub::{Hub, QuietHub};
use crate::cli::exit::{self, Exit};
use crate::cli::jailed::{self, Outcome, Outside};
use crate::cli::run::{Boot, JailArgs, LogLevel, resources};
use crate::cli::scope;
use crate::cli::start_error::StartError;
use crate::cli::vm_args::resolve_kernel;
use crate::control::{Identity, Keeper};
use crate::machine::MachineError;
use crate::observe::{Timeline, init_log};
use crate::resize;
use crate::store::{Definition, Running, Store, Vm};

/// Start a named VM
///
/// It goes on in the background; 'tranche attach' shows its console.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct StartArgs {
    /// The VM
    name: String,

    /// Be the VM's process, and stay with it until it ends; for a service manager, which is told when it runs (sd_notify)
    #[arg(long)]
    foreground: bool,

    /// What to log: in the foreground on standard error, else in the VM's vmm.log
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,

    /// As who starts it in the background starts it
    #[arg(long, hide = true, conflicts_with = "foreground")]
    detached: bool,
}

pub fn run(args: &StartArgs, start: Instant) -> ExitCode {
    if !args.foreground && !args.detached {
        let start = |store: Store| start_in_background(&store.find(&args.name)?, args.log_level);
        return conclude(Store::of_user().map_err(Failure::from).and_then(start));
    }
    init_log(args.log_level.into());
    let exit = be_the_vm(args, &Arc::new(Timeline::from(start)));
    // Without unwinding the machine: the host takes everything back at once, and faster than we could.
    std::process::exit(exit.into());
}

/// Starts a VM, and returns when it runs.
pub fn start_in_background(vm: &Vm, log_level: LogLevel) -> Result<(), Failure> {
    let failed = || Failure::host("start another process of this program");
    let program = std::env::current_exe().map_err(failed())?;
    let (mut news, theirs) = UnixStream::pair().map_err(failed())?;
    let mut command = Command::new(program);
    command.arg0("tranche").args(["start", "--detached", "--log-level", log_level.name()]).arg(vm.name());
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(OwnedFd::from(theirs));
    let mut child = command.spawn().map_err(failed())?;
    // With our copy of its end, which would keep us waiting.
    drop(command);
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    // Not to the end when all is well: what the VM has started, such as passt, may hold the socket for longer.
    let runs = loop {
        match news.read(&mut chunk).map_err(failed())? {
            0 => break false,
            count => text.extend_from_slice(&chunk[..count]),
        }
        if text.pop_if(|last| *last == 0).is_some() {
            break true;
        }
    };
    exit::say(&String::from_utf8_lossy(&text));
    if runs {
        return Ok(());
    }
    let status = child.wait().map_err(failed())?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).filter(|&code| code != 0);
    Err(Failure::Said(code.unwrap_or(Exit::Internal as u8)))
}

/// Is the VM until it ends, and returns the exit code.
fn be_the_vm(args: &StartArgs, timeline: &Arc<Timeline>) -> u8 {
    let (vm, mut running, definition) = match begin(args) {
        Ok(begun) => begun,
        Err(error) => return error.report() as u8,
    };
    let hub = Arc::new(Mutex::new(None));
    let outcome = serve(args, &vm, definition, &running, hub.clone(), timeline)
        .unwrap_or_else(|error| jailed::conclude(Err(error)));
    running.end(outcome.code, outcome.reason);
    // Whoever is attached looks then how it ended.
    if let Some(hub) = hub.lock().ok().and_then(|mut hub| hub.take()) {
        Hub::finish(hub);
    }
    outcome.code
}

type Begun = (Vm, Running, Definition);

fn begin(args: &StartArgs) -> Result<Begun, StartError> {
    if args.detached {
        // The terminal that it was started on is not its own. It fails for the leader of a group, who has none.
        let _ = rustix::process::setsid();
    }
    let vm = Store::of_user()?.find(&args.name)?;
    scope::enter(&vm.definition()?.share);
    let (running, definition) = vm.run()?;
    Ok((vm, running, definition))
}

fn serve(
    args: &StartArgs,
    vm: &Vm,
    mut definition: Definition,
    running: &Running,
    hub: Arc<Mutex<Option<Hub>>>,
    timeline: &Arc<Timeline>,
) -> Result<Outcome, StartError> {
    let failed = |what| move |error| StartError::from(resources(what)(error));
    if !definition.disk_sizes.is_empty() {
        // Asked for while it ran, or by a command that was killed at it.
        let change = vm.change()?;
        for done in
            resize::apply(&mut definition, false, |definition| Ok::<_, StartError>(vm.define(&change, definition)?))?
        {
            tracing::info!("{}", done.report);
        }
        vm.define(&change, &definition)?;
    }
    let (mut config, jail) = (definition.vm, JailArgs { level: Some(definition.jail), share: definition.share });
    resolve_kernel(&mut config)?;
    let (quiet, mut ends) =
        QuietHub::open(&vm.console_log(), &vm.console_socket()).map_err(failed("make the console"))?;
    config.serial = ends.output();
    let mut outside = Outside::new(&jail, Some(&vm.api_socket()), &config.serial)?;
    let log = args.detached.then(|| open_log(vm));
    outside.duties.keeper = Some(keeper(vm.clone()));
    let theirs = log.as_ref().and_then(|log| log.try_clone().ok());
    outside.duties.started = Some(Box::new(move || {
        if let Some(log) = log {
            let_go_of_starter(&log);
        }
        notify_service_manager();
    }));
    outside.duties.split = Some(Box::new(running.note_vmm()));
    outside.duties.console = Some(Box::new(move || {
        *hub.lock().map_err(|_| io::ErrorKind::Other)? = Some(quiet.start()?);
        Ok(())
    }));
    let identity = Identity { id: vm.name().to_owned(), ..Identity::tranche(config.transport) };
    Ok(jailed::run(outside, |inside| {
        let is_jailed = inside.is_jailed();
        Boot { config: &config, identity, inside, timeline }.serve(
            || Ok::<_, MachineError>(ends.console()),
            || {
                // Its parent has let go already.
                if let Some(log) = theirs.filter(|_| is_jailed) {
                    let _ = rustix::stdio::dup2_stderr(log.as_fd());
                }
            },
        )
    }))
}

/// Has a size that a client asks for through the API be that of the next start.
fn keeper(vm: Vm) -> Keeper {
    Box::new(move |size| {
        let keep = || {
            let change = vm.change()?;
            let mut definition = vm.definition()?;
            definition.vm.cpus = size.cpus.unwrap_or(definition.vm.cpus);
            definition.vm.memory = size.memory.unwrap_or(definition.vm.memory);
            vm.define(&change, &definition)
        };
        keep().map_err(|error| exit::one_line(&error))
    })
}

/// Where the process of a VM says what it has to say once the VM runs.
fn open_log(vm: &Vm) -> File {
    let log = File::options().append(true).create(true).open(vm.process_log());
    log.or_else(|_| File::options().write(true).open("/dev/null")).unwrap_or_else(|error| {
        tracing::warn!("the VM's log cannot be written: {error}");
        io::stderr().as_fd().try_clone_to_owned().map(File::from).expect("standard error")
    })
}

/// Tells who started this process that the VM runs. What it has to say goes to its log from then on.
fn let_go_of_starter(log: &File) {
    // What is there is of the start before.
    let _ = log.set_len(0);
    // It may have been killed, which is no reason to end.
    let _ = io::stderr().write_all(&[0]);
    if let Err(error) = rustix::stdio::dup2_stderr(log.as_fd()) {
        tracing::warn!("the VM's log cannot be written: {error}");
    }
}

/// As sd_notify(3) has it.
fn notify_service_manager() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let bytes = name.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let told = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = told {
        tracing::warn!("the service manager cannot be told that the VM runs: {error}");
    }
}
