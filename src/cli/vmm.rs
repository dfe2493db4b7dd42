//! `tranche vmm`: a VM that is configured and driven through its API.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::exit;
use super::jailed::{self, Outcome, Outside};
use super::run::{JailArgs, LogLevel, open_console, serve_to_end};
use super::start_error::StartError;
use crate::config::firecracker::VmDescription;
use crate::config::{SerialConfig, Transport};
use crate::control::{Identity, Owner};
use crate::observe::{Timeline, init_log};

/// Serve the API on a unix socket, for a VM that is described there (see docs/api.md)
///
/// The VM starts when the API says so, or at once with --config. The program ends with its VM.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct VmmArgs {
    /// Where the API listens; a socket that nobody listens on any more is replaced
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,

    /// Describe and start the VM from a file, in the form of Firecracker's configuration files
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The VM's id: 1 to 64 letters, digits and '-'
    #[arg(long, value_name = "ID", default_value = "anonymous-instance", value_parser = instance_id)]
    id: String,

    /// How the guest reaches its virtio devices
    #[arg(long, value_name = "pci|mmio[,pci]", default_value = "pci")]
    transport: Transport,

    /// Where the serial console goes
    #[arg(long, value_name = "stdio|null|file=PATH|socket=PATH", default_value = "stdio")]
    serial: SerialConfig,

    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 51_200)]
    http_api_max_payload_size: usize,

    /// What to log on standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,

    #[command(flatten)]
    jail: JailArgs,
}

/// The id of a VM, as Firecracker's clients choose it.
pub fn instance_id(text: &str) -> Result<String, String> {
    let valid = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if valid { Ok(text.to_owned()) } else { Err("an id has 1 to 64 letters, digits and '-'".into()) }
}

/// Reads a description from a file.
pub fn read_description(path: &std::path::Path) -> Result<VmDescription, StartError> {
    let failed = |source| StartError::Description { path: path.to_owned(), source };
    let text = std::fs::read(path).map_err(|error| failed(Box::new(error)))?;
    serde_json::from_slice(&text).map_err(|error| failed(Box::new(error)))
}

pub fn run(args: &VmmArgs, start: Instant) -> ExitCode {
    init_log(args.log_level.into());
    super::scope::enter(&args.jail.share);
    jailed::end(run_to_end(args, &Arc::new(Timeline::from(start))))
}

fn run_to_end(args: &VmmArgs, timeline: &Arc<Timeline>) -> Result<Outcome, StartError> {
    let mut outside = Outside::new(&args.jail, Some(&args.api_sock), &args.serial)?;
    if let Some(socket) = &mut outside.api {
        socket.max_body = args.http_api_max_payload_size;
    }
    let description = args.config.as_deref().map(read_description).transpose()?;
    let identity = Identity { id: args.id.clone(), ..Identity::tranche(args.transport) };
    Ok(jailed::run(outside, |mut inside| {
        let mut owner = Owner::new(identity, inside.host.clone(), args.serial.clone(), timeline.clone());
        inside.instruct(&mut owner);
        if let Some(description) = description {
            owner.load(description)?;
            owner.start()?;
        }
        let mut console = open_console(&args.serial, &inside.host)?;
        serve_to_end(owner, &mut console, inside, || {})
    }))
}
