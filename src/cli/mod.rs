//! The command line: one file per verb; parse, call, render. No VM logic.

mod console;
mod disk;
mod escape;
mod exit;
mod kernel;
mod run;
mod signals;
mod table;
mod terminal;

use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};

use crate::memory::share_one_heap;

/// A paravirtualized micro-VM monitor over KVM.
#[derive(Debug, Parser)]
#[command(name = "tranche", version, arg_required_else_help = true, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    #[command(subcommand)]
    Kernel(kernel::KernelVerb),
    /// Make disks, look at them, resize, mend and copy them
    Disk(disk::DiskArgs),
}

/// The command line's definition, from which man pages and completions are generated.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program; `start` is when it began.
#[must_use]
pub fn main(start: Instant) -> ExitCode {
    share_one_heap();
    match Cli::parse().verb {
        Verb::Run(args) => run::run(*args, start),
        Verb::Kernel(verb) => kernel::run(verb),
        Verb::Disk(args) => disk::run(args),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_well_formed() {
        super::command().debug_assert();
    }
}
