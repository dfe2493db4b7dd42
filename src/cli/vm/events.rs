//! `tranche events`: what becomes of a VM, as it does.

use std::process::ExitCode;

use clap::Args;

use super::Target;
use crate::cli::api;

/// Print each change of a VM's state, as a line of JSON, until it ends
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The VM, by its name or its API socket
    #[arg(value_name = "NAME|SOCKET")]
    vm: Target,
}

pub fn run(args: &EventsArgs) -> ExitCode {
    api::ask_target(&args.vm, "GET", "/v2/events", None)
}
