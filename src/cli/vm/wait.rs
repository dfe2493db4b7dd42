//! `tranche wait`: until a VM runs, is up, or has stopped.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use super::failure::{Failure, conclude_with};
use super::lifecycle::{ask, seconds};
use crate::cli::exit;
use crate::store::{Definition, LogReader, Store, Vm};

/// Wait until a named VM runs, is up, or has stopped
///
/// For one that has stopped, this ends with its exit code.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct WaitArgs {
    /// The VM
    name: String,

    /// Its process runs; the guest is up: it drives its root disk, and has written what --ready of 'tranche create' says; or it has stopped
    #[arg(long = "for", value_name = "WHAT", default_value = "stopped")]
    what: Event,

    /// How long to wait, in seconds; for ever without
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Event {
    Running,
    Boot,
    Stopped,
}

/// How often is looked for what nobody tells of.
const PACE: Duration = Duration::from_millis(20);

pub fn run(args: &WaitArgs) -> ExitCode {
    let wait = |store: Store| wait(&store.find(&args.name)?, args);
    conclude_with(Store::of_user().map_err(Failure::from).and_then(wait))
}

fn wait(vm: &Vm, args: &WaitArgs) -> Result<u8, Failure> {
    let deadline = Deadline::after(args.timeout);
    match args.what {
        Event::Stopped => {
            if !vm.wait_until_it_ends(args.timeout) {
                return Err(deadline.passed(vm, "stopped"));
            }
            Ok(vm.life().and_then(|life| life.ended).map_or(0, |ended| ended.code))
        }
        Event::Running => {
            deadline.wait(vm, "started", || Ok(vm.is_locked() && vm.api_socket().exists()))?;
            Ok(0)
        }
        Event::Boot => {
            deadline.wait(vm, "started", || Ok(vm.is_locked()))?;
            wait_for_boot(vm, args.timeout)?;
            Ok(0)
        }
    }
}

#[derive(Clone, Copy)]
struct Deadline(Option<(Instant, Duration)>);

impl Deadline {
    fn after(patience: Option<Duration>) -> Self {
        Self(patience.map(|patience| (Instant::now() + patience, patience)))
    }

    fn passed(self, vm: &Vm, done: &'static str) -> Failure {
        let patience = self.0.map_or(Duration::MAX, |(_, patience)| patience);
        Failure::TimedOut { name: vm.name().to_owned(), done, patience }
    }

    fn wait(
        self,
        vm: &Vm,
        done: &'static str,
        mut is_so: impl FnMut() -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        while !is_so()? {
            if self.0.is_some_and(|(deadline, _)| Instant::now() >= deadline) {
                return Err(self.passed(vm, done));
            }
            std::thread::sleep(PACE);
        }
        Ok(())
    }
}

/// Waits until the guest of a VM that runs is up: it drives its root disk, and has written to its console what its
/// definition says.
pub fn wait_for_boot(vm: &Vm, patience: Option<Duration>) -> Result<(), Failure> {
    let deadline = Deadline::after(patience);
    let definition = vm.running_definition().map_or_else(|| vm.definition(), Ok)?;
    let started = vm.life().map_or(0, |life| life.started);
    let mut drives_root = root_disk(&definition).is_none();
    let mut console = Search::of(definition.ready.as_deref().unwrap_or_default(), vm, started)?;
    deadline.wait(vm, "booted", || {
        if !vm.is_locked() {
            let why = vm.life().and_then(|life| life.ended).map_or("its process is gone".into(), |ended| ended.reason);
            return Err(Failure::Ended { name: vm.name().to_owned(), why });
        }
        drives_root = drives_root || root_disk(&definition).is_none_or(|id| is_driven(vm, id));
        Ok(console.is_found()? && drives_root)
    })
}

/// An image with partitions is not called the root disk: without a text to wait for, the first one counts.
fn root_disk(definition: &Definition) -> Option<&str> {
    let disks = &definition.vm.disks;
    let first = disks.first().filter(|_| definition.ready.is_none());
    disks.iter().find(|disk| disk.root).or(first)?.id.as_deref()
}

fn is_driven(vm: &Vm, disk: &str) -> bool {
    let shown = ask(vm, "GET", "/v2/vm", None).unwrap_or_default();
    let devices = shown["devices"].as_array().into_iter().flatten();
    devices.filter(|device| device["kind"] == "disk" && device["id"] == disk).any(|device| device["driver"] == true)
}

/// Looks for a text in what a VM's console has said since its start.
struct Search<'a> {
    text: &'a [u8],
    log: LogReader,
    since: String,
    /// The end of what was looked at, in which the text may have begun.
    tail: Vec<u8>,
    counts: bool,
    found: bool,
}

impl<'a> Search<'a> {
    fn of(text: &'a str, vm: &Vm, started: u64) -> Result<Self, Failure> {
        let log = LogReader::open(&vm.console_log()).map_err(Failure::host("read the console's log"))?;
        let since = crate::observe::rfc3339(std::time::UNIX_EPOCH + Duration::from_millis(started));
        Ok(Self { text: text.as_bytes(), log, since, tail: Vec::new(), counts: false, found: text.is_empty() })
    }

    fn is_found(&mut self) -> Result<bool, Failure> {
        while !self.found {
            let Some(line) = self.log.next_line().map_err(Failure::host("read the console's log"))? else { break };
            if let Some(time) = &line.time {
                self.counts = *time >= self.since;
                self.tail.clear();
            }
            if self.counts {
                self.tail.extend_from_slice(&line.text);
                self.found = self.tail.windows(self.text.len()).any(|window| window == self.text);
                let keep = self.tail.len().min(self.text.len());
                self.tail.drain(..self.tail.len() - keep);
            }
        }
        Ok(self.found)
    }
}
