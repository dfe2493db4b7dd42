//! `tranche stop`, `kill`, `restart`, `rm` and `rename`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;

use super::failure::{Failure, conclude};
use super::start::start_in_background;
use crate::api::client::{Answer, Client, ClientError};
use crate::cli::exit;
use crate::cli::run::LogLevel;
use crate::store::{Store, StoreError, Vm};

/// Stop named VMs: press their power buttons, and wait until they are off
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct StopArgs {
    /// The VMs
    #[arg(required = true)]
    name: Vec<String>,

    #[command(flatten)]
    patience: Patience,

    /// Pull the plug of one that is not off by then
    #[arg(long)]
    kill: bool,
}

#[derive(Debug, Clone, Copy, Args)]
pub struct Patience {
    /// How long to wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    timeout: Duration,
}

/// Seconds, or a part of one.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "give seconds, such as 30 or 0.5".into())
}

/// Pull the plugs of named VMs
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct KillArgs {
    /// The VMs
    #[arg(required = true)]
    name: Vec<String>,
}

/// Stop a named VM if it runs, and start it
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct RestartArgs {
    /// The VM
    name: String,

    #[command(flatten)]
    patience: Patience,

    /// Pull the plug if it is not off by then
    #[arg(long)]
    kill: bool,
}

/// Remove named VMs; their disks stay
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct RmArgs {
    /// The VMs
    #[arg(required = true)]
    name: Vec<String>,

    /// Pull the plug of one that runs
    #[arg(long, short)]
    force: bool,
}

/// Give a named VM that does not run another name
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct RenameArgs {
    /// The VM
    name: String,
    /// What it is to be called
    new_name: String,
}

/// How long a VM's process may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

/// How long a VM may take to end when its plug is pulled through the API, before its process is killed.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

pub fn stop(args: &StopArgs) -> ExitCode {
    each(&args.name, |_, vm| {
        press_power_button(vm)?;
        wait_until_off(vm, args.patience.timeout, args.kill)
    })
}

pub fn kill(args: &KillArgs) -> ExitCode {
    each(&args.name, |_, vm| if vm.is_locked() { pull_plug(vm) } else { Err(not_running(vm)) })
}

pub fn restart(args: &RestartArgs) -> ExitCode {
    each(std::slice::from_ref(&args.name), |_, vm| {
        stop_if_it_runs(vm, args.patience.timeout, args.kill)?;
        start_in_background(vm, LogLevel::Warn)
    })
}

pub fn rm(args: &RmArgs) -> ExitCode {
    each(&args.name, |store, vm| {
        if args.force && vm.is_locked() {
            pull_plug(vm)?;
        }
        Ok(store.remove(vm)?)
    })
}

pub fn rename(args: &RenameArgs) -> ExitCode {
    each(std::slice::from_ref(&args.name), |store, vm| Ok(store.rename(vm, &args.new_name)?))
}

/// Does it to each VM, also after one with which it failed.
fn each(names: &[String], verb: impl Fn(&Store, &Vm) -> Result<(), Failure>) -> ExitCode {
    let store = match Store::of_user() {
        Ok(store) => store,
        Err(error) => return conclude(Err(error.into())),
    };
    let codes = names.iter().map(|name| {
        let done = store.find(name).map_err(Failure::from).and_then(|vm| verb(&store, &vm));
        done.map_or_else(|failure| failure.report(), |()| 0)
    });
    // The first failure's, after all have been tried.
    ExitCode::from(codes.collect::<Vec<_>>().into_iter().find(|&code| code != 0).unwrap_or(0))
}

fn not_running(vm: &Vm) -> Failure {
    StoreError::NotRunning(vm.name().to_owned()).into()
}

pub fn stop_if_it_runs(vm: &Vm, patience: Duration, kill: bool) -> Result<(), Failure> {
    if !vm.is_locked() {
        return Ok(());
    }
    press_power_button(vm)?;
    wait_until_off(vm, patience, kill)
}

fn press_power_button(vm: &Vm) -> Result<(), Failure> {
    if vm.is_locked() { power(vm, "off") } else { Err(not_running(vm)) }
}

fn wait_until_off(vm: &Vm, patience: Duration, kill: bool) -> Result<(), Failure> {
    if vm.wait_until_it_ends(Some(patience)) {
        Ok(())
    } else if kill {
        pull_plug(vm)
    } else {
        Err(Failure::TimedOut { name: vm.name().to_owned(), done: "stopped", patience })
    }
}

/// Ends the VM at once: in good order as far as its process goes, or with its process.
pub fn pull_plug(vm: &Vm) -> Result<(), Failure> {
    // A process that does not answer is killed below.
    let _ = power(vm, "kill");
    if vm.wait_until_it_ends(Some(KILL_PATIENCE)) {
        return Ok(());
    }
    if let Some(process) = vm.process() {
        pidfd_send_signal(process, Signal::KILL)
            .map_err(|error| Failure::host("kill the VM's process")(error.into()))?;
    }
    if vm.wait_until_it_ends(Some(KILL_PATIENCE)) {
        Ok(())
    } else {
        Err(Failure::TimedOut { name: vm.name().to_owned(), done: "ended", patience: KILL_PATIENCE })
    }
}

fn power(vm: &Vm, power: &str) -> Result<(), Failure> {
    let body = json!({ "power": power }).to_string();
    match ask(vm, "PUT", "/v2/vm/power", Some(body.as_bytes())) {
        // It ended while it was asked.
        Err(Failure::Client { .. }) if !vm.is_locked() => Ok(()),
        asked => asked.map(drop),
    }
}

/// Asks a VM's process, and returns its answer.
pub fn ask(vm: &Vm, method: &str, path: &str, body: Option<&[u8]>) -> Result<serde_json::Value, Failure> {
    let answer = exchange(vm, method, path, body)?;
    let value: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    if (200..300).contains(&answer.status) {
        return Ok(value);
    }
    let text = value["detail"].as_str().or(value["title"].as_str()).unwrap_or("it does not say why").to_owned();
    Err(Failure::Refused { name: vm.name().to_owned(), text })
}

/// Asks for a text.
pub fn ask_text(vm: &Vm, path: &str) -> Result<String, Failure> {
    exchange(vm, "GET", path, None).map(|answer| String::from_utf8_lossy(&answer.body).into_owned())
}

fn exchange(vm: &Vm, method: &str, path: &str, body: Option<&[u8]>) -> Result<Answer, Failure> {
    let socket = UnixStream::connect(vm.api_socket())
        .map(|socket| InTime { socket, deadline: Instant::now() + ANSWER_PATIENCE })
        .map_err(|source| ClientError::Connect { path: vm.api_socket(), source });
    let asked = socket.and_then(|socket| Client::over(socket).request(method, path, body));
    asked.map_err(Failure::client(vm))
}

/// A connection for one question, all of whose answer has to come in time.
struct InTime {
    socket: UnixStream,
    deadline: Instant,
}

impl InTime {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for InTime {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer)
    }
}

impl Write for InTime {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
