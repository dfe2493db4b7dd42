//! The one owner of a VM: knows what may be asked when, and does it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::latencies::Latencies;
use super::metrics::{ApiCounts, MetricsFile};
use super::plan::Plan;
use super::resize::{Keeper, Size};
use super::snapshots::Saving;
use super::view::{Shown, View, Work};
use super::views;
use super::{Answer, Answerer, Call, Fault, Listener, Message, Power, When};
use crate::backend::{HostFile, HostFiles};
use crate::config::firecracker as fc;
use crate::config::{SerialConfig, Transport, VmConfig};
use crate::machine::{Budgets, End, Machine, MachineError, Notice, Pause, State};
use crate::observe::{Timeline, change_log};
use crate::snapshot::Overlay;

/// Who a VM says it is, and what follows from under whose name the program was called.
#[derive(Debug, Clone)]
pub struct Identity {
    pub id: String,
    pub app_name: &'static str,
    pub version: &'static str,
    pub default_boot_args: &'static str,
    pub transport: Transport,
    /// What a vCPU's thread is called, before its number.
    pub vcpu_thread: &'static str,
    /// Does a snapshot that cannot be loaded end the program?
    pub ends_with_failed_load: bool,
}

impl Identity {
    /// A VM of `tranche run`.
    #[must_use]
    pub fn tranche(transport: Transport) -> Self {
        Self {
            id: "anonymous-instance".into(),
            app_name: "Tranche",
            version: env!("CARGO_PKG_VERSION"),
            default_boot_args: crate::config::DEFAULT_CMDLINE,
            transport,
            vcpu_thread: "vcpu",
            ends_with_failed_load: false,
        }
    }

    /// A VM of those who call the program `firecracker`.
    #[must_use]
    pub fn firecracker(id: String, transport: Transport) -> Self {
        Self {
            id,
            app_name: "Firecracker",
            version: FIRECRACKER_VERSION,
            default_boot_args: "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce",
            transport,
            vcpu_thread: "fc_vcpu ",
            ends_with_failed_load: true,
        }
    }
}

/// Whose interface we speak.
pub const FIRECRACKER_VERSION: &str = "1.17.0";

/// Done once, before a guest's first instruction.
pub type BeforeGuest = Box<dyn FnOnce(Disks) -> io::Result<()> + Send>;

/// The drives by their ids: is a drive only read?
pub type Drives = BTreeMap<String, bool>;

/// The disks of a VM whose guest is about to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disks {
    pub drives: Drives,
    /// Bytes of the largest one, as its guest sees it.
    pub largest: u64,
}

/// A VM and its clients.
pub struct Owner {
    pub(super) identity: Arc<Identity>,
    pub(super) host: Arc<dyn HostFiles>,
    pub(super) console: SerialConfig,
    pub(super) timeline: Arc<Timeline>,
    pub(super) plan: Plan,
    pub(super) budgets: Budgets,
    pub(super) machine: Option<Machine>,
    /// How many machines there have been.
    lives: u32,
    listeners: Vec<Listener>,
    /// Who waits for the vCPUs to be parked.
    pausing: Vec<Answerer>,
    pub(super) saving: Option<Saving>,
    /// What the disks of a restored VM are written to.
    pub(super) overlays: Vec<Overlay>,
    /// A snapshot could not be loaded, after which Firecracker does not go on.
    pub(super) load_failed: bool,
    /// CPUs and memory from the next start on.
    pub(super) next_size: Option<Size>,
    pub(super) keeper: Option<Keeper>,
    /// What is to be done before a guest's first instruction.
    before_guest: Option<BeforeGuest>,
    metrics: Option<MetricsFile>,
    api: Option<ApiCounts>,
    latencies: Arc<Latencies>,
    /// What it is busy with.
    work: Option<Work>,
    /// What the listeners know.
    told: &'static str,
    view: Arc<View>,
    /// Is there anybody to look at the view?
    shows: bool,
}

impl Owner {
    #[must_use]
    pub fn new(identity: Identity, host: Arc<dyn HostFiles>, console: SerialConfig, timeline: Arc<Timeline>) -> Self {
        Self {
            identity: Arc::new(identity),
            host,
            console,
            timeline,
            plan: Plan::default(),
            budgets: Budgets::default(),
            machine: None,
            lives: 0,
            listeners: Vec::new(),
            pausing: Vec::new(),
            saving: None,
            overlays: Vec::new(),
            load_failed: false,
            next_size: None,
            keeper: None,
            before_guest: None,
            metrics: None,
            api: None,
            latencies: Arc::default(),
            work: None,
            told: NOT_STARTED,
            view: Arc::default(),
            shows: false,
        }
    }

    /// What the devices of each machine together may do.
    pub fn set_budgets(&mut self, budgets: Budgets) {
        self.budgets = budgets;
    }

    #[must_use]
    pub fn budgets(&self) -> Budgets {
        self.budgets.clone()
    }

    /// Has something done before there is a guest that runs.
    pub fn before_guest(&mut self, work: BeforeGuest) {
        self.before_guest = Some(work);
    }

    /// To be called before a guest may run.
    pub(super) fn prepare_for_guest(&mut self, machine: &Machine) -> Result<(), MachineError> {
        let Some(work) = self.before_guest.take() else { return Ok(()) };
        let drives = machine.disks().map(|(id, disk)| (id.to_owned(), disk.read_only())).collect();
        let largest = machine.disks().map(|(_, disk)| disk.bytes()).max().unwrap_or(0);
        work(Disks { drives, largest }).map_err(|source| {
            // Without that, nothing may run.
            self.before_guest = Some(Box::new(|_| Err(io::ErrorKind::PermissionDenied.into())));
            MachineError::Host { what: "give up rights that nobody needs any more", source }
        })
    }

    /// Where the owner publishes how things stand, once it serves.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        self.view.clone()
    }

    /// From now on GETs are answered from the view. Before, they wait: whoever has the VM started with the program is to
    /// find it started.
    pub fn begin_to_serve(&mut self) {
        self.shows = true;
        self.follow();
    }

    /// The machine, once it has been started.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        self.machine.as_mut()
    }

    /// The number of the machine: another one after a reset, whose descriptors have to be waited on anew.
    #[must_use]
    pub fn life(&self) -> u32 {
        self.lives
    }

    /// Takes over a machine that has begun to run.
    pub(super) fn install(&mut self, machine: Machine) {
        self.machine = Some(machine);
        self.lives += 1;
    }

    /// Takes in a whole description, as a client would give it object by object.
    ///
    /// # Errors
    /// The first object that is not right.
    pub fn load(&mut self, description: fc::VmDescription) -> Result<(), Fault> {
        let mut calls = Vec::new();
        calls.extend(description.logger.map(Call::PutLogger));
        calls.extend(description.metrics.map(Call::PutMetrics));
        calls.extend(description.machine_config.map(Call::PutMachineConfig));
        calls.extend(description.boot_source.map(Call::PutBootSource));
        calls.extend(description.drives.into_iter().map(|drive| Call::PutDrive(Box::new(drive.with_defaults()))));
        calls.extend(description.network_interfaces.into_iter().map(|nic| Call::PutNetwork(Box::new(nic))));
        calls.extend(description.entropy.map(Call::PutEntropy));
        match description.cpu_config {
            Some(fc::CpuConfigSource::Inline(config)) => calls.push(Call::PutCpuConfig(config)),
            Some(fc::CpuConfigSource::Path(path)) => {
                calls.push(Call::PutCpuConfig(read_cpu_config(&path, &*self.host)?))
            }
            None => {}
        }
        let missing = [
            (description.balloon.is_some(), "The balloon device"),
            (description.vsock.is_some(), "The vsock device"),
            (!description.pmem.is_empty(), "The pmem device"),
            (description.mmds_config.is_some(), "MMDS"),
            (description.memory_hotplug.is_some(), "Memory hot-plug"),
        ];
        calls.extend(missing.iter().filter(|m| m.0).map(|m| Call::Missing(m.1, When::Before)));
        calls.into_iter().try_for_each(|call| self.perform(call).map(drop))
    }

    /// Takes in what clients have sent.
    pub fn handle(&mut self, message: Message) {
        let message = match message {
            Message::Call(call, answerer) => {
                let answerer = self.latencies.timed(&call, answerer);
                Message::Call(call, answerer)
            }
            listen @ Message::Listen(_) => listen,
        };
        match message {
            Message::Call(Call::SetState(state), answerer) => self.set_state(state, answerer),
            Message::Call(Call::Snapshot(request), answerer) if self.machine.is_some() => {
                self.snapshot(&request, answerer);
            }
            Message::Call(Call::CreateFiles(request), answerer) if self.machine.is_some() => {
                self.snapshot_to_files(&request, answerer);
            }
            Message::Call(call, answerer) => {
                let answer = self.perform(call);
                self.follow();
                answerer(answer);
            }
            Message::Listen(mut listener) => {
                let line = views::state_event(None, self.told);
                if listener(&line) {
                    self.listeners.push(listener);
                }
            }
        }
    }

    /// Takes in what the machine has reported.
    pub fn handle_events(&mut self) {
        let notices = self.machine.as_mut().map(Machine::handle_events).unwrap_or_default();
        notices.into_iter().for_each(|notice| self.heed(notice));
        self.settle_snapshot(false);
        self.follow();
    }

    pub(super) fn heed(&mut self, notice: Notice) {
        match notice {
            // It is seen in the state.
            Notice::Paused => {}
            Notice::Unplugged(device) => self.forget(&device),
            // It was answered when it had begun.
            Notice::Replaced(_) => {}
        }
    }

    /// How the VM has ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<&End> {
        match self.machine.as_ref()?.state() {
            State::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// Is there nothing left to do, as a snapshot could not be loaded?
    #[must_use]
    pub fn has_given_up(&self) -> bool {
        self.load_failed
    }

    /// Asked for from outside, by a signal or a key.
    pub fn press_power_button(&mut self) {
        if let Some(machine) = &mut self.machine {
            machine.press_power_button();
        }
        self.follow();
    }

    pub fn kill(&mut self) {
        if let Some(machine) = &mut self.machine {
            machine.kill();
        }
        self.follow();
    }

    /// Builds the machine and starts it.
    ///
    /// # Errors
    /// What is missing, or cannot be had; it can be tried again then.
    pub fn start(&mut self) -> Result<(), Fault> {
        self.at_work(Work::Starting, Self::build)
    }

    /// Does what may take long, and shows that meanwhile.
    pub(super) fn at_work<T>(&mut self, work: Work, job: impl FnOnce(&mut Self) -> T) -> T {
        self.work = Some(work);
        self.follow();
        let done = job(self);
        self.work = None;
        self.follow();
        done
    }

    fn build(&mut self) -> Result<(), Fault> {
        let mut parts = self.plan.parts(&*self.host, &self.identity, &self.console)?;
        parts.budgets = self.budgets();
        let mut machine = Machine::build(parts, &*self.host, &self.timeline)?;
        machine.serial().limit(self.plan.serial_limits);
        self.prepare_for_guest(&machine)?;
        machine.start()?;
        self.install(machine);
        self.write_metrics();
        Ok(())
    }

    /// Takes over a machine that has been built of `config`, and starts it.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn adopt(&mut self, mut machine: Machine, config: &VmConfig) -> Result<(), MachineError> {
        self.prepare_for_guest(&machine)?;
        machine.start()?;
        self.install(machine);
        self.plan.describe(config);
        self.told = self.state();
        Ok(())
    }

    /// Lets go of all listeners, and answers who still waits.
    pub fn hang_up(&mut self) {
        self.answer_pauses(false);
        self.settle_snapshot(true);
        self.listeners.clear();
    }

    /// Brings the disks to rest, for a process that is about to exit.
    pub fn close_disks(&self) {
        if let Some(machine) = &self.machine {
            machine.close_disks();
        }
    }

    /// Shows what the API counts among the rest.
    pub fn count_api(&mut self, api: ApiCounts) {
        self.api = Some(api);
    }

    /// Has metrics written to a file, a line now and then one whenever [`Self::write_metrics`] is called.
    ///
    /// # Errors
    /// When that has been asked for before, or the file cannot be opened.
    pub fn set_metrics(&mut self, metrics: &fc::Metrics) -> Result<(), Fault> {
        if self.metrics.is_some() {
            return Err(Fault::RepeatedMetrics);
        }
        let path = &metrics.metrics_path;
        let file = self.host.open(&HostFile::Log(path.clone()));
        let file = file.map_err(|source| Fault::Open { path: path.display().to_string(), source })?;
        self.metrics = Some(MetricsFile::new(file));
        self.plan.description.metrics = Some(metrics.clone());
        Ok(())
    }

    #[must_use]
    pub fn has_metrics(&self) -> bool {
        self.metrics.is_some()
    }

    /// Adds a line to the metrics file, if there is one.
    pub fn write_metrics(&mut self) {
        let sample = self.shown().sample();
        if let Some(Err(error)) = self.metrics.as_mut().map(|file| file.write(sample)) {
            tracing::warn!("metrics cannot be written: {error}");
        }
    }

    /// Takes up what a client wants of the log.
    ///
    /// # Errors
    /// When its file cannot be opened; the log is as it was then.
    pub fn set_logger(&mut self, logger: &fc::Logger) -> Result<(), Fault> {
        let file = match &logger.log_path {
            Some(path) => Some(
                self.host
                    .open(&HostFile::Log(path.clone()))
                    .map_err(|source| Fault::Open { path: path.display().to_string(), source })?,
            ),
            None => None,
        };
        change_log(|choice| {
            choice.file = file.or_else(|| choice.file.take());
            choice.level = logger.level.map_or(choice.level, Into::into);
            choice.show_level = logger.show_level.unwrap_or(choice.show_level);
            choice.show_origin = logger.show_log_origin.unwrap_or(choice.show_origin);
            choice.module = logger.module.clone().or_else(|| choice.module.take());
        });
        self.plan.description.logger = Some(logger.clone());
        Ok(())
    }

    fn perform(&mut self, call: Call) -> Result<Answer, Fault> {
        match (call.when(), &self.machine) {
            (When::Before, Some(_)) => return Err(Fault::AfterStart),
            (When::After, None) => return Err(Fault::BeforeStart),
            _ => {}
        }
        match call {
            Call::GetInstance
            | Call::GetVersion
            | Call::GetDescription
            | Call::GetMachineConfig
            | Call::GetVm
            | Call::GetMetrics => return Ok(self.shown().answer(&call).unwrap_or(Answer::Done)),
            Call::PutMachineConfig(config) => {
                let replaced = self.plan.machine_config().replaced_by(config);
                self.plan.set_machine_config(replaced, config.cpu_template.is_some())?;
            }
            Call::PatchMachineConfig(patch) => {
                let patched = self.plan.machine_config().patched(&patch);
                self.plan.set_machine_config(patched, patch.cpu_template.is_some())?;
            }
            Call::PutCpuConfig(config) => self.plan.put_cpu_config(config)?,
            Call::PutBootSource(source) => self.plan.put_boot_source(source, &*self.host, &self.identity)?,
            Call::PutDrive(drive) if self.machine.is_some() => self.plug_drive(*drive)?,
            Call::PutDrive(drive) => self.plan.put_drive(*drive, &*self.host)?,
            Call::Resize(request) => self.resize(&request)?,
            Call::PatchDrive(patch) => self.patch_drive(patch)?,
            Call::DeleteDrive(id) => self.unplug_drive(&id)?,
            Call::PutNetwork(nic) if self.machine.is_some() => self.plug_network(*nic)?,
            Call::PutNetwork(nic) => self.plan.put_network(*nic, &*self.host)?,
            Call::PatchNetwork(patch) => self.patch_network(patch)?,
            Call::DeleteNetwork(id) => self.unplug_network(&id)?,
            Call::PutEntropy(entropy) => self.plan.description.entropy = Some(entropy),
            Call::PutSerial(serial) => self.plan.put_serial(&serial, &*self.host)?,
            Call::PutLogger(logger) => self.set_logger(&logger)?,
            Call::PutMetrics(metrics) => self.set_metrics(&metrics)?,
            Call::Act(fc::ActionType::InstanceStart) => self.start()?,
            Call::Act(fc::ActionType::SendCtrlAltDel) => self.press_power_button(),
            // Without a file there is nothing to write, which Firecracker calls a success.
            Call::Act(fc::ActionType::FlushMetrics) => self.write_metrics(),
            Call::Missing(what, _) => return Err(Fault::Missing(what)),
            Call::Power(power) => self.power(power)?,
            // They may have to wait: see `set_state` and `snapshot`.
            Call::SetState(_) | Call::Snapshot(_) | Call::CreateFiles(_) => {}
            Call::Restore(request) => self.restore_folder(&request)?,
            Call::LoadFiles(load) => self.load_files(&load)?,
        }
        Ok(Answer::Done)
    }

    /// What the VM is doing, in a word.
    fn state(&self) -> &'static str {
        match (self.work, &self.machine) {
            (Some(work), _) => work.name(),
            (None, Some(machine)) => machine.state().name(),
            (None, None) => NOT_STARTED,
        }
    }

    fn shown(&self) -> Shown {
        Shown {
            identity: self.identity.clone(),
            state: self.state(),
            work: self.work,
            description: self.plan.description.clone(),
            next_size: self.next_size(),
            devices: self.machine.as_ref().map(|m| m.devices().map(|(id, presence)| (id.clone(), presence)).collect()),
            meters: self.machine.as_ref().map(Machine::meters),
            api: self.api.clone(),
            latencies: self.latencies.clone(),
        }
    }

    /// Something may have changed: shows it, tells the listeners of another state, and those who wait for a pause that it
    /// is complete or will not come.
    pub(super) fn follow(&mut self) {
        if self.shows {
            self.view.publish(self.shown());
        }
        let state = self.state();
        if state != self.told {
            let line = views::state_event(Some(self.told), state);
            self.listeners.retain_mut(|listener| listener(&line));
            self.told = state;
        }
        match self.machine.as_ref().map(Machine::state) {
            Some(State::Pausing { .. }) => {}
            state => {
                let paused = matches!(state, Some(State::Paused { .. }));
                self.answer_pauses(paused);
            }
        }
    }

    fn answer_pauses(&mut self, paused: bool) {
        for answerer in self.pausing.drain(..) {
            answerer(if paused {
                Ok(Answer::Done)
            } else {
                Err(Fault::Conflict("The VM went on instead of pausing.".into()))
            });
        }
    }

    fn set_state(&mut self, state: fc::WantedState, answerer: Answerer) {
        let Some(machine) = &mut self.machine else { return answerer(Err(Fault::BeforeStart)) };
        let answer = match state {
            fc::WantedState::Paused => match machine.pause() {
                Ok(Pause::Paused) => Ok(Answer::Done),
                // A vCPU is still on its way out.
                Ok(Pause::Pausing) => {
                    self.pausing.push(answerer);
                    return self.follow();
                }
                Err(error) => Err(error.into()),
            },
            fc::WantedState::Resumed => machine.resume().map(|()| Answer::Done).map_err(Fault::from),
        };
        self.follow();
        answerer(answer);
    }

    fn power(&mut self, power: Power) -> Result<(), Fault> {
        match (power, &mut self.machine) {
            (Power::On, None) => self.start(),
            (Power::On, Some(machine)) => match machine.state() {
                State::Ended(_) => Err(Fault::Ended),
                _ => Ok(()),
            },
            (_, None) => Err(Fault::BeforeStart),
            (Power::Off, Some(machine)) => {
                machine.press_power_button();
                Ok(())
            }
            (Power::Kill, Some(machine)) => {
                machine.kill();
                Ok(())
            }
            (Power::Reset, Some(_)) => self.reset(),
        }
    }
}

fn read_cpu_config(path: &Path, host: &dyn HostFiles) -> Result<fc::CpuConfig, Fault> {
    let failed = |source| Fault::Open { path: path.display().to_string(), source };
    let file = host.open(&HostFile::Read(path.to_owned())).map_err(failed)?;
    serde_json::from_reader(std::io::BufReader::new(file)).map_err(|error| failed(error.into()))
}

/// What is not built yet.
pub const NOT_STARTED: &str = "not started";
