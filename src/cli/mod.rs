//! The command line: one file per verb; parse, call, render. No VM logic.

mod api;
mod api_socket;
mod clone;
mod confined;
mod console;
mod disk;
mod doctor;
mod escape;
mod exit;
pub mod firecracker;
mod jailed;
pub mod jailer;
mod kernel;
mod restore;
mod run;
mod scope;
mod serve;
mod signals;
mod snapshot;
mod start_error;
mod table;
mod terminal;
mod vm;
mod vm_args;
mod vmm;

use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::memory::share_one_heap;
use crate::resize;

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
    Create(Box<vm::create::CreateArgs>),
    Start(vm::start::StartArgs),
    Resize(Box<vm::resize::ResizeArgs>),
    #[command(name = resize::CONFINED, hide = true)]
    Confined(confined::ConfinedArgs),
    Stop(vm::lifecycle::StopArgs),
    Restart(vm::lifecycle::RestartArgs),
    Kill(vm::lifecycle::KillArgs),
    Rm(vm::lifecycle::RmArgs),
    Rename(vm::lifecycle::RenameArgs),
    Ls(vm::ls::LsArgs),
    Inspect(vm::inspect::InspectArgs),
    Attach(vm::attach::AttachArgs),
    Logs(vm::logs::LogsArgs),
    Wait(vm::wait::WaitArgs),
    Events(vm::events::EventsArgs),
    Stats(vm::stats::StatsArgs),
    Top(vm::stats::TopArgs),
    Doctor(doctor::DoctorArgs),
    Vmm(vmm::VmmArgs),
    Api(api::ApiArgs),
    /// Pause a VM: its vCPUs stop where they are
    Pause(api::SocketArgs),
    /// Let a paused VM go on
    Resume(api::SocketArgs),
    /// Start a VM, press its power button, reset it, or end it
    Power(api::PowerArgs),
    /// Save a VM to a directory, look at one that was saved, check it
    Snapshot(snapshot::SnapshotArgs),
    Restore(restore::RestoreArgs),
    Clone(clone::CloneArgs),
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

/// What is asked for, if it begins with the word `verb`, of which alone the definition is made then: that of all others takes
/// half a millisecond, which counts where a VM starts.
fn parse_only<A: Args>(verb: &'static str, wrap: fn(A) -> Verb) -> Option<Verb> {
    if std::env::args_os().nth(1).is_none_or(|first| first != verb) {
        return None;
    }
    let command = clap::Command::new("tranche").subcommand(A::augment_args(clap::Command::new(verb)));
    let mut matches = command.get_matches();
    let mut matches = matches.remove_subcommand()?.1;
    Some(wrap(A::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.exit())))
}

/// Runs the program; `start` is when it began.
#[must_use]
pub fn main(start: Instant) -> ExitCode {
    share_one_heap();
    let verb = parse_only("run", |args| Verb::Run(Box::new(args)))
        .or_else(|| parse_only("vmm", Verb::Vmm))
        .or_else(|| parse_only("restore", Verb::Restore))
        .or_else(|| parse_only("start", Verb::Start))
        .unwrap_or_else(|| Cli::parse().verb);
    match verb {
        Verb::Run(args) => run::run(*args, start),
        Verb::Create(args) => vm::create::run(*args),
        Verb::Resize(args) => vm::resize::run(*args),
        Verb::Confined(args) => confined::run(&args),
        Verb::Start(args) => vm::start::run(&args, start),
        Verb::Stop(args) => vm::lifecycle::stop(&args),
        Verb::Restart(args) => vm::lifecycle::restart(&args),
        Verb::Kill(args) => vm::lifecycle::kill(&args),
        Verb::Rm(args) => vm::lifecycle::rm(&args),
        Verb::Rename(args) => vm::lifecycle::rename(&args),
        Verb::Ls(args) => vm::ls::run(&args),
        Verb::Inspect(args) => vm::inspect::run(&args),
        Verb::Attach(args) => vm::attach::run(&args),
        Verb::Logs(args) => vm::logs::run(&args),
        Verb::Wait(args) => vm::wait::run(&args),
        Verb::Events(args) => vm::events::run(&args),
        Verb::Stats(args) => vm::stats::stats(&args),
        Verb::Top(args) => vm::stats::top(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Vmm(args) => vmm::run(&args, start),
        Verb::Api(args) => api::api(&args),
        Verb::Pause(args) => api::pause(&args),
        Verb::Resume(args) => api::resume(&args),
        Verb::Power(args) => api::power(&args),
        Verb::Snapshot(args) => snapshot::run(args),
        Verb::Restore(args) => restore::run(&args, start),
        Verb::Clone(args) => clone::run(&args),
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
