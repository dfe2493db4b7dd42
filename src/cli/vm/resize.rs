//! `tranche resize`: a named VM of another size.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::failure::{Failure, conclude_with};
use super::lifecycle::{ask, pull_plug, seconds, stop_if_it_runs};
use super::start::start_in_background;
use super::wait::wait_for_boot;
use crate::cli::exit::{self, Exit};
use crate::cli::run::LogLevel;
use crate::config::{DiskConfig, MemorySize, NetConfig};
use crate::resize::{Done, Plan, Request, Way, apply, give_up_copies};
use crate::store::{Change, Definition, Store, StoreError, Vm};

/// Give a named VM another size, or other devices
///
/// First it says what that means. A VM that does not run is changed at once; of one that runs, the next start is.
/// A larger disk's last partition grows with it, and an ext4 file system on it (by this host's e2fsprogs, confined).
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct ResizeArgs {
    /// The VM
    name: String,

    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,

    /// Guest memory
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemorySize>,

    /// A disk's size, by the disk's id; may be repeated
    #[arg(long, value_name = "ID=SIZE", value_parser = disk_size)]
    disk: Vec<(String, MemorySize)>,

    /// Another disk, as 'tranche run --disk' takes it; may be repeated
    #[arg(long, value_name = "PATH[,OPTION]...", value_parser = DiskConfig::from_arg)]
    add_disk: Vec<DiskConfig>,

    /// A disk that goes, by its id; its file stays. May be repeated
    #[arg(long, value_name = "ID")]
    remove_disk: Vec<String>,

    /// All network cards, in place of those it has; 'none' for none
    #[arg(long, value_name = "user|tap=NAME[,OPTION]...|none", value_parser = nic)]
    net: Vec<Nic>,

    /// Only say what it means
    #[arg(long)]
    dry_run: bool,

    /// Stop the VM, change it, start it, and wait until it is up; if it does not get there, put back what can be
    #[arg(long, conflicts_with = "dry_run")]
    restart: bool,

    /// Let a larger disk be known to the running guest at once; its partitions and file systems are the guest's to grow
    #[arg(long, conflicts_with_all = ["restart", "cpus", "memory", "add_disk", "remove_disk", "net"])]
    live: bool,

    /// How long the guest may take to stop, and to be up again, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    timeout: Duration,

    /// How to print the plan
    #[arg(long, default_value = "text")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// A network card, or the word that there is to be none.
#[derive(Debug, Clone)]
enum Nic {
    None,
    Card(Box<NetConfig>),
}

fn nic(text: &str) -> Result<Nic, String> {
    if text == "none" {
        return Ok(Nic::None);
    }
    text.parse().map(|card| Nic::Card(Box::new(card))).map_err(|error: crate::config::ConfigError| error.to_string())
}

fn disk_size(text: &str) -> Result<(String, MemorySize), String> {
    let (id, size) = text.rsplit_once('=').ok_or("give a disk's id and its size, such as root=10G")?;
    let size = size.parse().map_err(|error: crate::config::ConfigError| error.to_string())?;
    Ok((id.to_owned(), size))
}

impl ResizeArgs {
    fn way(&self) -> Way {
        match (self.live, self.restart) {
            (true, _) => Way::Live,
            (_, true) => Way::Restart,
            _ => Way::NextStart,
        }
    }

    fn request(&self) -> Request {
        let cards = self.net.iter().filter_map(|nic| match nic {
            Nic::None => None,
            Nic::Card(card) => Some((**card).clone()),
        });
        Request {
            cpus: self.cpus,
            memory: self.memory,
            disks: self.disk.clone(),
            add_disks: self.add_disk.clone(),
            remove_disks: self.remove_disk.clone(),
            nics: (!self.net.is_empty()).then(|| cards.collect()),
        }
    }
}

pub fn run(args: ResizeArgs) -> ExitCode {
    conclude_with(Store::of_user().map_err(Failure::from).and_then(|store| resize(&store.find(&args.name)?, &args)))
}

fn resize(vm: &Vm, args: &ResizeArgs) -> Result<u8, Failure> {
    // Held to the end: two changes at a time would each undo the other's.
    let change = if args.dry_run { None } else { Some(vm.change()?) };
    let definition = vm.definition()?;
    let plan = Plan::new(vm.name(), &definition, &args.request(), args.way())?;
    match args.format {
        Format::Json => exit::print(&format!("{:#}\n", json!(plan))),
        Format::Text if plan.is_empty() => exit::print("there is nothing to change\n"),
        Format::Text => exit::print(&plan.to_string()),
    }
    let Some(change) = change.filter(|_| !plan.is_empty()) else { return Ok(0) };
    if args.live {
        return grow_live(vm, &plan, args).map(|()| 0);
    }
    if args.restart {
        return Restart { vm, change: &change, before: definition, patience: args.timeout }.run(plan.target);
    }
    if vm.is_locked() {
        vm.define(&change, &plan.target)?;
        exit::say(&format!("tranche: '{0}' runs: its next start is of this size ('tranche restart {0}')\n", vm.name()));
        return Ok(0);
    }
    for done in change_stopped(vm, &change, &definition, plan.target, false)? {
        exit::say(&format!("tranche: {}\n", done.report));
    }
    Ok(0)
}

/// Changes a VM that does not run. If its disks cannot be changed, its definition is as it was.
fn change_stopped(
    vm: &Vm,
    change: &Change,
    before: &Definition,
    mut target: Definition,
    keep: bool,
) -> Result<Vec<Done>, Failure> {
    let _held = vm.hold()?;
    vm.define(change, &target)?;
    if target.disk_sizes.is_empty() {
        return Ok(Vec::new());
    }
    give_up_copies(&target);
    match apply(&mut target, keep, |target| Ok::<_, Failure>(vm.define(change, target)?)) {
        Ok(done) => {
            vm.define(change, &target)?;
            Ok(done)
        }
        Err(error) => {
            vm.define(change, before)?;
            Err(error)
        }
    }
}

fn grow_live(vm: &Vm, plan: &Plan, args: &ResizeArgs) -> Result<(), Failure> {
    if !vm.is_locked() {
        return Err(StoreError::NotRunning(vm.name().to_owned()).into());
    }
    for (id, size) in &plan.target.disk_sizes {
        let body = json!({ "disks": { id: size.0 } }).to_string();
        ask(vm, "PUT", "/v2/vm/resize", Some(body.as_bytes()))?;
    }
    if args.format == Format::Text {
        exit::say("tranche: the guest has been told; what is on the disks is its own to grow\n");
    }
    Ok(())
}

/// A stop, a change and a start, with a way back.
struct Restart<'a> {
    vm: &'a Vm,
    change: &'a Change,
    before: Definition,
    patience: Duration,
}

impl Restart<'_> {
    fn run(&self, target: Definition) -> Result<u8, Failure> {
        stop_if_it_runs(self.vm, self.patience, false)?;
        let done = match change_stopped(self.vm, self.change, &self.before, target, true) {
            Ok(done) => done,
            Err(failure) => {
                // As it was, it did run.
                let code = failure.report();
                start_in_background(self.vm, LogLevel::Warn)?;
                return Ok(code);
            }
        };
        for done in &done {
            exit::say(&format!("tranche: {}\n", done.report));
        }
        match self.start() {
            Ok(()) => {
                give_up_copies(&self.before);
                exit::say(&format!("tranche: '{}' is up\n", self.vm.name()));
                Ok(0)
            }
            Err(failure) => {
                failure.report();
                self.go_back(&done)
            }
        }
    }

    fn start(&self) -> Result<(), Failure> {
        start_in_background(self.vm, LogLevel::Warn)?;
        wait_for_boot(self.vm, Some(self.patience))
    }

    /// Puts back what there was, and says what could not be.
    fn go_back(&self, done: &[Done]) -> Result<u8, Failure> {
        if self.vm.is_locked() {
            pull_plug(self.vm)?;
        }
        self.vm.define(self.change, &self.before)?;
        let mut report = String::from("tranche: the definition is as it was\n");
        for done in done {
            report += &match done.undo() {
                Ok(true) => format!("tranche: the disk '{}' is as it was\n", done.id),
                Ok(false) => format!("tranche: the disk '{}' keeps its new size, with all that is on it\n", done.id),
                Err(error) => format!("tranche: the disk '{}': {}\n", done.id, exit::one_line(&error)),
            };
        }
        exit::say(&report);
        match self.start() {
            Ok(()) => exit::say(&format!("tranche: '{}' is up, as it was before\n", self.vm.name())),
            Err(failure) => drop(failure.report()),
        }
        Ok(Exit::RolledBack as u8)
    }
}
