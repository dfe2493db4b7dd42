//! `tranche events`: what becomes of VMs, as it does.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::json;

use super::Target;
use super::failure::{Failure, conclude};
use crate::cli::api;
use crate::observe::rfc3339;
use crate::store::Store;

/// Print each change of a VM's state, as a line of JSON
///
/// Of one VM, as its API tells it, until it ends; without a name of all named ones: running, stopped, failed, dead, removed.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The VM, by its name or its API socket
    #[arg(value_name = "NAME|SOCKET")]
    vm: Option<Target>,
}

/// How often all VMs are looked at: there is no daemon that would tell.
const PACE: Duration = Duration::from_millis(100);

pub fn run(args: &EventsArgs) -> ExitCode {
    match &args.vm {
        Some(vm) => api::ask_target(vm, "GET", "/v2/events", None),
        None => conclude(Store::of_user().map_err(Failure::from).and_then(|store| watch(&store))),
    }
}

/// Tells of all named VMs, until nobody listens any more.
fn watch(store: &Store) -> Result<(), Failure> {
    let mut known: BTreeMap<String, &'static str> = BTreeMap::new();
    loop {
        let now: BTreeMap<_, _> = store.all()?.iter().map(|vm| (vm.name().to_owned(), vm.state().name())).collect();
        let gone = known.keys().filter(|name| !now.contains_key(*name)).map(|name| (name, "removed"));
        let changes = now.iter().map(|(name, state)| (name, *state)).chain(gone);
        for (name, to) in changes.filter(|(name, to)| known.get(*name) != Some(to)) {
            let time = rfc3339(SystemTime::now());
            let line = json!({ "time": time, "vm": name, "event": "state", "from": known.get(name), "to": to });
            if writeln!(io::stdout(), "{line}").is_err() {
                return Ok(());
            }
        }
        known = now;
        std::thread::sleep(PACE);
    }
}
