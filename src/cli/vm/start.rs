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
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::failure::{Failure, conclude};
use super::hub::Hub;
use crate::backend::{HostFiles, OpenDirectly};
use crate::cli::api_socket::ApiSocket;
use crate::cli::exit::{self, Exit};
use crate::cli::run::{Boot, LogLevel, resources, tell, what_ended};
use crate::cli::signals::Signals;
use crate::cli::start_error::StartError;
use crate::cli::vm_args::resolve_kernel;
use crate::control::{Identity, Keeper};
use crate::machine::{End, MachineError};
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
    let (signals, vm, mut running, definition) = match begin(args) {
        Ok(begun) => begun,
        Err(error) => return error.report() as u8,
    };
    let started = || {
        if args.detached
            && let Err(error) = let_go_of_starter(&vm)
        {
            tracing::warn!("the VM's log cannot be written: {error}");
        }
        notify_service_manager();
    };
    let ended = Hub::start(&vm.console_log(), &vm.console_socket())
        .map_err(|error| StartError::from(resources("make the console")(error)))
        .and_then(|mut hub| {
            let ended = serve(&vm, definition, &mut hub, signals, timeline, started);
            Ok((ended?, hub))
        });
    match ended {
        Ok((end, hub)) => {
            tell(&end);
            let code = Exit::from(&end) as u8;
            running.end(code, what_ended(&end));
            // Whoever is attached looks then how it ended.
            hub.finish();
            code
        }
        Err(error) => {
            let code = error.report() as u8;
            running.end(code, exit::one_line(&error));
            code
        }
    }
}

type Begun = (Signals, Vm, Running, Definition);

fn begin(args: &StartArgs) -> Result<Begun, StartError> {
    if args.detached {
        // The terminal that it was started on is not its own. It fails for the leader of a group, who has none.
        let _ = rustix::process::setsid();
    }
    let signals = Signals::block().map_err(resources("listen to signals"))?;
    let vm = Store::of_user()?.find(&args.name)?;
    let (running, definition) = vm.run()?;
    Ok((signals, vm, running, definition))
}

fn serve(
    vm: &Vm,
    mut definition: Definition,
    hub: &mut Hub,
    signals: Signals,
    timeline: &Arc<Timeline>,
    started: impl FnOnce(),
) -> Result<End, StartError> {
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
    let mut config = definition.vm;
    resolve_kernel(&mut config)?;
    config.serial = hub.output();
    let host: Arc<dyn HostFiles> = Arc::new(OpenDirectly);
    let socket = Some(ApiSocket::listen(&vm.api_socket(), &*host)?);
    let identity = Identity { id: vm.name().to_owned(), ..Identity::tranche(config.transport) };
    let console = || Ok::<_, MachineError>(hub.console());
    Boot { config: &config, identity, socket, signals, host: &host, timeline, keeper: Some(keeper(vm.clone())) }
        .serve(console, started)
}

/// Has a size that a client asks for through the API be that of the next start.
fn keeper(vm: Vm) -> Keeper {
    Box::new(move |size| {
        let keep = || {
            let change = vm.change()?;
            let mut definition = vm.definition()?;
            (definition.vm.cpus, definition.vm.memory) = (size.cpus, size.memory);
            vm.define(&change, &definition)
        };
        keep().map_err(|error| exit::one_line(&error))
    })
}

/// Tells who started this process that the VM runs. What it has to say goes to its log from then on.
fn let_go_of_starter(vm: &Vm) -> io::Result<()> {
    let log = File::create(vm.process_log()).or_else(|_| File::options().write(true).open("/dev/null"))?;
    let told = io::stderr().write_all(&[0]);
    rustix::stdio::dup2_stderr(log.as_fd())?;
    // It may have been killed, which is no reason to end.
    let _ = told;
    Ok(())
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
