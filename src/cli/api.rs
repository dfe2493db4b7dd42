//! `tranche api`, `pause`, `resume` and `power`: a running VM's API from the command line.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::exit::{self, Exit};
use super::vm::{Target, conclude_with};
use crate::api::client::{Client, ClientError};

/// Send a request to a VM's API and print the answer
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 the API did it, 70 it refused, 71 it cannot be reached; 2 wrong usage.")]
pub struct ApiArgs {
    /// The VM, by its name or its API socket
    #[arg(long, value_name = "NAME|SOCKET")]
    socket: Target,

    /// GET, PUT, PATCH or DELETE
    #[arg(value_parser = ["GET", "PUT", "PATCH", "DELETE"], ignore_case = true)]
    method: String,

    /// Such as /v2/vm or /machine-config
    path: String,

    /// The body: a JSON document, or @FILE to read it from there
    #[arg(value_name = "JSON|@FILE")]
    body: Option<String>,
}

/// A running VM.
#[derive(Debug, Args)]
pub struct SocketArgs {
    /// The VM, by its name or its API socket
    #[arg(value_name = "NAME|SOCKET")]
    socket: Target,
}

#[derive(Debug, Args)]
pub struct PowerArgs {
    /// The VM, by its name or its API socket
    #[arg(value_name = "NAME|SOCKET")]
    socket: Target,

    /// Start the VM, press its power button, reset it, or pull the plug
    action: PowerAction,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PowerAction {
    On,
    Off,
    Reset,
    Kill,
}

pub fn api(args: &ApiArgs) -> ExitCode {
    let body = match args.body.as_deref().map(|body| match body.strip_prefix('@') {
        Some(file) => std::fs::read(file).map_err(|error| format!("cannot read {file}: {error}")),
        None => Ok(body.as_bytes().to_vec()),
    }) {
        None => None,
        Some(Ok(body)) => Some(body),
        Some(Err(text)) => {
            exit::say(&format!("tranche: error: {text}\n"));
            return ExitCode::from(Exit::Usage as u8);
        }
    };
    ask_target(&args.socket, &args.method.to_uppercase(), &args.path, body.as_deref())
}

pub fn pause(args: &SocketArgs) -> ExitCode {
    ask_target(&args.socket, "PATCH", "/vm", Some(br#"{"state":"Paused"}"#))
}

pub fn resume(args: &SocketArgs) -> ExitCode {
    ask_target(&args.socket, "PATCH", "/vm", Some(br#"{"state":"Resumed"}"#))
}

pub fn power(args: &PowerArgs) -> ExitCode {
    let action = match args.action {
        PowerAction::On => "on",
        PowerAction::Off => "off",
        PowerAction::Reset => "reset",
        PowerAction::Kill => "kill",
    };
    ask_target(&args.socket, "PUT", "/v2/vm/power", Some(format!(r#"{{"power":"{action}"}}"#).as_bytes()))
}

/// As [`ask`], of a VM that is named on the command line.
pub(super) fn ask_target(target: &Target, method: &str, path: &str, body: Option<&[u8]>) -> ExitCode {
    match target.socket() {
        Ok(socket) => ask(&socket, method, path, body),
        Err(failure) => conclude_with(Err(failure)),
    }
}

/// Sends one request; prints what comes, on standard error if it is a refusal.
pub(super) fn ask(socket: &Path, method: &str, path: &str, body: Option<&[u8]>) -> ExitCode {
    match exchange(socket, method, path, body) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(Exit::ApiRefused as u8),
        Err(error) => {
            let hint = error.hint().map(str::to_owned);
            ExitCode::from(exit::report_with(&error, Exit::NoApi, hint) as u8)
        }
    }
}

/// Prints an answer as it comes, which may take as long as the VM lives. `true` if the request was done.
fn exchange(socket: &Path, method: &str, path: &str, body: Option<&[u8]>) -> Result<bool, ClientError> {
    let mut answer = Client::connect(socket)?.stream(method, path, body)?;
    let done = (200..300).contains(&answer.status);
    let mut complete = true;
    while let Some(bytes) = answer.next_bytes()? {
        let text = String::from_utf8_lossy(&bytes);
        complete = text.ends_with('\n');
        if done {
            exit::print(&exit::for_reader(&text, io::stdout().is_terminal()));
        } else {
            exit::say(&exit::for_reader(&text, io::stderr().is_terminal()));
        }
    }
    if !complete {
        if done { exit::print("\n") } else { exit::say("\n") }
    }
    Ok(done)
}
