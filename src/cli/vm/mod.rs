//! Named VMs: made, started, watched, changed and removed.

pub mod attach;
pub mod create;
pub mod events;
mod failure;
mod hub;
pub mod inspect;
pub mod lifecycle;
pub mod logs;
pub mod ls;
pub mod resize;
pub mod start;
pub mod stats;
mod target;
pub mod wait;

pub use self::failure::{conclude_with, report_resize};
pub use self::target::Target;

use std::process::ExitCode;

use self::create::NewVm;
use self::failure::Failure;
use super::exit;
use super::run::LogLevel;
use crate::store::Store;

/// `tranche run --name`: makes a VM, starts it and attaches this terminal.
pub fn run_named(name: &str, new: NewVm, log_level: LogLevel, detach: bool) -> ExitCode {
    conclude_with(Store::of_user().map_err(Failure::from).and_then(|store| {
        let vm = create::create(&store, name, new)?;
        if let Err(failure) = start::start_in_background(&vm, log_level) {
            // Whoever mends the command gives it again.
            if let Err(error) = store.remove(&vm) {
                exit::report_store(&error);
            }
            return Err(failure);
        }
        if detach {
            exit::print(&format!("{name}\n"));
            return Ok(0);
        }
        attach::attach(&vm, false)
    }))
}
