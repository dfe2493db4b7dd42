//! Saving a VM while it lives, and bringing one to life that was saved.
//!
//! The VM stands still while its state and its memory are written, as fast as the host's memory takes them. It goes on
//! then, and a thread brings the snapshot to stable storage; the client hears of it when that is done.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::owner::Owner;
use super::{Answer, Answerer, Fault, Work};
use crate::config::firecracker as fc;
use crate::config::{Override, SavedVm};
use crate::machine::{Machine, MachineError, OpenPager, Origin, Parts, Pause, SavedMemory, SerialSetup, State};
use crate::memory::written::Written;
use crate::platform::chips::Clock;
use crate::snapshot::{
    Folder, NewFiles, NewFolder, NewSnapshot, Overlay, Saved, SavedState, Snapshot, SnapshotError, is_nameless,
};
use crate::threads::{self, Kind};

/// A snapshot that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory to make.
    #[cfg_attr(test, schema(value_type = String))]
    pub path: PathBuf,
    /// Ends the VM when the snapshot is on stable storage: it has not run since.
    #[serde(default)]
    pub stop: bool,
    /// Does it hold the disks? Else whoever restores it has to have them as they are now.
    #[serde(default = "yes")]
    pub disks: bool,
}

/// A snapshot that is to go on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The snapshot's directory.
    #[cfg_attr(test, schema(value_type = String))]
    pub path: PathBuf,
    /// Other files and networks than the saved ones: `disk.NAME` and a path, or `net.NAME` and a tap.
    #[serde(default)]
    pub overrides: BTreeMap<String, String>,
    #[serde(default)]
    pub clock: Clock,
    /// Does it go on at once, or stay paused?
    #[serde(default = "yes")]
    pub resume: bool,
    /// A directory for what the VM writes to the snapshot's disks, in a file NAME.qcow2 for each. Without one it is gone
    /// when the VM ends.
    #[serde(default)]
    #[cfg_attr(test, schema(value_type = Option<String>))]
    pub disks: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

/// How long a snapshot took, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct SnapshotTimes {
    /// For so long the VM stood still; nothing if it was paused before, or is not to go on.
    pub pause_us: u64,
    /// After so long it was on stable storage.
    pub durable_us: u64,
}

/// A snapshot on its way to stable storage.
pub(super) struct Saving {
    result: Receiver<Result<(), SnapshotError>>,
    begun: Instant,
    pause: Duration,
    /// What becomes of the VM if it is there.
    stop: bool,
    /// What becomes of it if not.
    resume: bool,
    written: Option<Written>,
    answerer: Answerer,
}

/// What has been written, and has to be brought to stable storage.
struct Begun {
    new: NewSnapshot,
    saved: Saved,
    /// Pages that count as kept, in a chain of differences.
    written: Option<Written>,
    pause: Duration,
    /// Is the VM to go on if the rest fails?
    resume: bool,
}

/// What of memory goes into a snapshot, and do the disks?
#[derive(Clone, Copy)]
enum Extent {
    /// All of memory, apart from any chain of differences.
    All {
        disks: bool,
    },
    /// All of memory, and the differences that come refer to it.
    Base,
    Differences,
}

/// How a saved VM is to go on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Revival {
    pub clock: Clock,
    /// Is account kept of the pages that it writes?
    pub track_writes: bool,
}

impl Owner {
    pub(super) fn snapshot(&mut self, request: &SnapshotRequest, answerer: Answerer) {
        let begun = Instant::now();
        let host = self.host.clone();
        let new = || NewFolder::begin(&request.path, &host).map(NewSnapshot::Folder);
        let what = Extent::All { disks: request.disks };
        let begin = self.at_work(Work::Saving, |owner| owner.begin_snapshot(new, what, request.stop, begun));
        self.go_on_saving(begin, begun, request.stop, answerer);
    }

    /// The same in two files, of a VM that is paused and stays so.
    pub(super) fn snapshot_to_files(&mut self, request: &fc::SnapshotCreate, answerer: Answerer) {
        let begun = Instant::now();
        let extent = match request.snapshot_type {
            fc::SnapshotType::Full => Extent::Base,
            fc::SnapshotType::Diff => Extent::Differences,
        };
        let paused = self.machine.as_ref().is_some_and(|machine| matches!(machine.state(), State::Paused { .. }));
        if !paused {
            let text = "A snapshot is made of a paused microVM: PATCH /vm first.";
            return answerer(Err(Fault::Conflict(text.into())));
        }
        let merge_with = match (extent, &self.machine) {
            (Extent::Differences, Some(machine)) => Some(machine.memory_bytes()),
            _ => None,
        };
        let host = self.host.clone();
        let new = || {
            let new = NewFiles::begin(&request.snapshot_path, &request.mem_file_path, &host)?;
            merge_with.map_or(Ok(()), |bytes| new.begin_with_what_is_there(bytes))?;
            Ok(NewSnapshot::Files(new))
        };
        let begin = self.at_work(Work::Saving, |owner| owner.begin_snapshot(new, extent, false, begun));
        let done = Box::new(|answer: Result<_, _>| answerer(answer.map(|_| Answer::Done)));
        self.go_on_saving(begin, begun, false, done);
    }

    /// Has a thread bring to stable storage what has been written.
    fn go_on_saving(&mut self, begin: Result<Begun, Fault>, begun: Instant, stop: bool, answerer: Answerer) {
        match begin {
            Ok(Begun { new, saved, written, pause, resume }) => {
                let waker = self.machine.as_ref().map(Machine::waker);
                let (sender, result) = mpsc::sync_channel(1);
                let write = move || {
                    // Nobody waits for it only when the process ends.
                    let _ = sender.send(new.finish(&saved));
                    if let Some(wake) = waker {
                        wake();
                    }
                };
                match threads::spawn(Kind::Main, "snapshot", None, write) {
                    Ok(_) => {
                        self.saving = Some(Saving { result, begun, pause, stop, resume, written, answerer });
                    }
                    Err(source) => {
                        self.give_back(written.as_ref());
                        self.go_on(resume);
                        answerer(Err(MachineError::Host { what: "write a snapshot", source }.into()));
                    }
                }
            }
            Err(fault) => {
                // Whoever hears of it may ask for the next thing at once.
                self.follow();
                answerer(Err(fault));
            }
        }
        self.follow();
    }

    /// Writes what has to be written while the VM stands still.
    fn begin_snapshot(
        &mut self,
        new: impl FnOnce() -> Result<NewSnapshot, SnapshotError>,
        extent: Extent,
        stop: bool,
        begun: Instant,
    ) -> Result<Begun, Fault> {
        if self.saving.is_some() {
            return Err(Fault::Conflict("Another snapshot of this VM is being written.".into()));
        }
        let description = self.plan.description.clone();
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        let was_paused = match machine.state() {
            State::Ended(_) => return Err(Fault::Ended),
            State::Paused { .. } | State::Pausing { .. } => true,
            _ => false,
        };
        let host = self.host.clone();
        let mut new = new()?;
        if machine.pause()? == Pause::Pausing {
            self.go_on(!was_paused);
            return Err(Fault::Conflict("A vCPU is held up in a device of the host: try again later.".into()));
        }
        // What the guest has just done to its devices counts.
        self.handle_events();
        let machine = self.machine.as_mut().ok_or(Fault::BeforeStart)?;
        let saved = machine.at_rest(|rest| {
            // The state first: what was written counts as kept once memory is.
            let state = SavedState { machine: rest.state()?, description };
            let mut config = rest.config(&*host);
            match (&mut new, extent) {
                (NewSnapshot::Folder(new), Extent::All { disks: true }) => {
                    for (number, disk) in config.disks.iter_mut().enumerate() {
                        new.store(number, disk, &rest.layers(&disk.name)?)?;
                    }
                }
                _ => {
                    if let Some(disk) = config.disks.iter().find(|disk| is_nameless(&disk.config.path)) {
                        return Err(Fault::NamelessDisk(disk.name.clone()));
                    }
                }
            }
            let saved = Saved { config, state };
            let written = match extent {
                Extent::All { .. } => rest.write_memory(new.memory()).map(|()| None),
                Extent::Base => rest.write_base(new.memory()).map(Some),
                Extent::Differences => rest.write_differences(new.memory()).map(Some),
            };
            Ok((saved, written?))
        });
        if saved.is_err() || !stop {
            self.go_on(!was_paused);
        }
        let pause = if was_paused || stop { Duration::ZERO } else { begun.elapsed() };
        let (saved, written) = saved?;
        Ok(Begun { new, saved, written, pause, resume: !was_paused && stop })
    }

    fn give_back(&self, written: Option<&Written>) {
        if let (Some(machine), Some(written)) = (&self.machine, written) {
            machine.give_back_written(written);
        }
    }

    pub(super) fn go_on(&mut self, resume: bool) {
        if let Some(machine) = self.machine.as_mut().filter(|_| resume) {
            // It may have ended meanwhile.
            let _ = machine.resume();
        }
    }

    /// Tells who waits for a snapshot that it is done, or has failed. With `wait`, not before it is.
    pub(super) fn settle_snapshot(&mut self, wait: bool) {
        let Some(saving) = &self.saving else { return };
        let lost = || {
            let source = std::io::Error::other("its thread has ended early");
            Err(SnapshotError::Write { path: PathBuf::new(), source })
        };
        let result = match wait {
            true => saving.result.recv().unwrap_or_else(|_| lost()),
            false => match saving.result.try_recv() {
                Ok(result) => result,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => lost(),
            },
        };
        let Some(Saving { begun, pause, stop, resume, written, answerer, .. }) = self.saving.take() else { return };
        let micros = |time: Duration| time.as_micros().try_into().unwrap_or(u64::MAX);
        match result {
            Ok(()) => {
                if stop {
                    self.kill();
                }
                let times = SnapshotTimes { pause_us: micros(pause), durable_us: micros(begun.elapsed()) };
                answerer(Ok(super::views::json(&times)));
            }
            Err(error) => {
                self.give_back(written.as_ref());
                self.go_on(resume);
                answerer(Err(error.into()));
            }
        }
    }

    /// Brings a VM to life that was saved. It is paused then, as it was when it was saved.
    ///
    /// # Errors
    /// What is missing, or does not go together; it can be tried again then.
    pub fn restore(&mut self, snapshot: Snapshot, revival: Revival) -> Result<(), Fault> {
        let Snapshot { config, state, memory, mut overlays } = snapshot;
        let memory = SavedMemory::File(memory);
        self.at_work(Work::Starting, |owner| owner.build_saved(&config, state, memory, revival))?;
        overlays.iter_mut().for_each(Overlay::stay);
        self.overlays = overlays;
        Ok(())
    }

    fn build_saved(
        &mut self,
        config: &SavedVm,
        state: SavedState,
        memory: SavedMemory,
        revival: Revival,
    ) -> Result<(), Fault> {
        let Revival { clock, track_writes } = revival;
        let console = SerialSetup::open(&self.console, &*self.host)?;
        let origin = Origin::Saved { state: Box::new(state.machine), memory, clock };
        let parts = Parts::of_saved(config, origin, console, self.identity.vcpu_thread, &*self.host)?;
        let parts = Parts { track_writes, budgets: self.budgets(), ..parts };
        let machine = Machine::build(parts, &*self.host, &self.timeline)?;
        self.prepare_for_guest(&machine)?;
        self.install(machine);
        Arc::make_mut(&mut self.identity).transport = config.transport;
        self.plan.describe_saved(&state.description, config, track_writes);
        Ok(())
    }

    /// Brings a VM to life from two files, as Firecracker's clients ask for it.
    pub(super) fn load_files(&mut self, load: &fc::SnapshotLoad) -> Result<(), Fault> {
        load.check()?;
        if !self.plan.is_untouched() {
            let text = "Loading a microVM snapshot not allowed after configuring boot-specific resources.";
            return Err(Fault::Conflict(text.into()));
        }
        self.load_untouched(load).inspect_err(|_| self.load_failed = self.identity.ends_with_failed_load)
    }

    fn load_untouched(&mut self, load: &fc::SnapshotLoad) -> Result<(), Fault> {
        let (backend, path) = match (&load.mem_backend, &load.mem_file_path) {
            (Some(backend), _) => (backend.backend_type, &backend.backend_path),
            (None, Some(path)) => (fc::MemoryBackendType::File, path),
            (None, None) => return Err(Fault::Missing("Memory without a back end")),
        };
        if load.vsock_override.is_some() {
            return Err(Fault::Missing("The vsock device"));
        }
        let (mut config, state) = Snapshot::read_state(&load.snapshot_path, &*self.host)?;
        let memory = match backend {
            fc::MemoryBackendType::File => SavedMemory::File(Snapshot::open_memory(path, &*self.host)?),
            fc::MemoryBackendType::Uffd => {
                SavedMemory::Pager(OpenPager::open(path, &*self.host).map_err(MachineError::from)?)
            }
        };
        for change in &load.network_overrides {
            let tap = Override::Net(change.iface_id.clone(), change.host_dev_name.clone());
            tap.apply(&mut config).map_err(|error| Fault::Conflict(error.to_string()))?;
        }
        let clock = if load.clock_realtime { Clock::Advance } else { Clock::Continue };
        let revival = Revival { clock, track_writes: load.track_dirty_pages };
        self.at_work(Work::Starting, |owner| owner.build_saved(&config, state, memory, revival))?;
        if load.resume_vm { self.resume() } else { Ok(()) }
    }

    /// From a directory.
    pub(super) fn restore_folder(&mut self, request: &RestoreRequest) -> Result<(), Fault> {
        if !self.plan.is_untouched() {
            return Err(Fault::Conflict("A VM has been described already: restore into one that has not.".into()));
        }
        let mut folder = Folder::open(&request.path, &*self.host)?;
        for (place, value) in &request.overrides {
            let change: Override = format!("{place}={value}").parse().map_err(Fault::Override)?;
            change.apply(&mut folder.snapshot.config).map_err(Fault::Override)?;
        }
        let snapshot = folder.with_overlays(request.disks.as_deref(), &self.host)?;
        self.restore(snapshot, Revival { clock: request.clock, track_writes: false })?;
        if request.resume { self.resume() } else { Ok(()) }
    }

    /// Lets a restored VM go on.
    ///
    /// # Errors
    /// When there is none.
    pub fn resume(&mut self) -> Result<(), Fault> {
        self.machine.as_mut().ok_or(Fault::BeforeStart)?.resume()?;
        self.follow();
        Ok(())
    }
}
