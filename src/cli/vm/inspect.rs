//! `tranche inspect`: all that is known of a named VM.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::failure::{Failure, conclude};
use crate::cli::exit;
use crate::jail;
use crate::store::Store;

/// Show all that is known of a named VM, as JSON
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct InspectArgs {
    /// The VM
    name: String,

    /// Only its definition, which 'tranche create --config' takes
    #[arg(long)]
    definition: bool,
}

pub fn run(args: &InspectArgs) -> ExitCode {
    conclude(Store::of_user().map_err(Failure::from).and_then(|store| inspect(&store, args)))
}

fn inspect(store: &Store, args: &InspectArgs) -> Result<(), Failure> {
    let vm = store.find(&args.name)?;
    let definition = vm.definition()?;
    if args.definition {
        exit::print(&String::from_utf8_lossy(&definition.to_json()));
        return Ok(());
    }
    let state = vm.state();
    let running = vm.running_definition().filter(|_| state.name() == "running");
    let life = vm.life();
    let process = life.as_ref().filter(|_| running.is_some()).and_then(|life| life.vmm.or(Some(life.pid)));
    let shown = json!({
        "name": vm.name(),
        "state": state.name(),
        "why": state.why(),
        "definition": definition,
        // What the next start would change.
        "pending": running.as_ref().is_some_and(|running| definition.differs_from(running)),
        "running": running,
        // Of the process in which the guest runs, as the kernel tells it.
        "jail": process.and_then(jail::look_at),
        "last-start": life,
        "paths": {
            "directory": vm.dir(),
            "api-socket": vm.api_socket(),
            "console-socket": vm.console_socket(),
            "console-log": vm.console_log(),
            "process-log": vm.process_log(),
        },
    });
    exit::print(&format!("{shown:#}\n"));
    Ok(())
}
