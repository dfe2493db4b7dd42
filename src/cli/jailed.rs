//! A VM's process and its jail: what is done on this side of the wall, and on the other.
//!
//! Unjailed, both sides are this process.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitOptions, pidfd_send_signal, waitpid};

use super::api_socket::{ApiClients, ApiFront, ApiSocket};
use super::exit::{self, Exit};
use super::run::{JailArgs, resources, tell, what_ended};
use super::signals::Signals;
use super::start_error::StartError;
use super::terminal::RawTerminal;
use crate::backend::disk::uring::make_last_rings;
use crate::backend::{HostFiles, OpenDirectly, Right};
use crate::config::{JailLevel, SerialConfig};
use crate::control::{Keeper, Owner};
use crate::jail::{self, Ask, AskParent, Cgroup, Given, JailError, News, Parent, Policy, Side};
use crate::machine::{Budgets, End};
use crate::memory::release_startup_code;
use crate::threads::{self, Kind};

/// How long clients may take in the end to take in their last answers, in milliseconds.
const LAST_PATIENCE: i64 = 500;

/// So many signals that ask for an end have the VMM killed, whatever it is about to do.
const PRESSES: u32 = 3;

/// What is there before there is a jail.
pub struct Outside {
    pub jail: JailArgs,
    pub api: Option<ApiSocket>,
    pub signals: Signals,
    /// What the VM may have besides what it asks for before its guest runs.
    pub rights: Vec<Right>,
    /// Its console is what the program was started with.
    reads_stdin: bool,
    pub duties: Duties,
}

impl Outside {
    /// With the API on a socket, if it is to be there, and a console that may be on one.
    ///
    /// # Errors
    /// When it cannot be listened there.
    pub fn new(jail: &JailArgs, api: Option<&Path>, console: &SerialConfig) -> Result<Self, StartError> {
        let signals = Signals::block().map_err(resources("listen to signals"))?;
        let api = api.map(|path| ApiSocket::listen(path, &OpenDirectly)).transpose()?;
        // It is made when all else is there, which may be after the start.
        let rights = match console {
            SerialConfig::Socket(path) => vec![Right::Listen(path.clone())],
            _ => Vec::new(),
        };
        let reads_stdin = *console == SerialConfig::Stdio;
        Ok(Self { jail: jail.clone(), api, signals, rights, reads_stdin, duties: Duties::default() })
    }
}

/// What the VM has done for it that is not its own business.
#[derive(Default)]
pub struct Duties {
    /// It runs.
    pub started: Option<Box<dyn FnOnce()>>,
    /// Who is told what it is to be from its next start on.
    pub keeper: Option<Keeper>,
    /// Its VMM is another process, of this number.
    pub split: Option<Box<dyn FnOnce(u32)>>,
    /// Its console is to be served, by a thread that does not get into a jail.
    pub console: Option<Box<dyn FnOnce() -> io::Result<()>>>,
}

/// What a VM is made with.
pub struct Inside {
    pub host: Arc<dyn HostFiles>,
    pub api: Option<ApiClients>,
    pub signals: Signals,
    budgets: Budgets,
    duties: Duties,
    parent: Option<AskParent>,
}

/// How it went.
pub struct Outcome {
    pub code: u8,
    pub reason: String,
}

impl Inside {
    /// Has the owner do its part: rights go before the guest runs, and sizes are kept.
    pub fn instruct(&mut self, owner: &mut Owner) {
        owner.set_budgets(self.budgets.clone());
        if let Some(keeper) = self.duties.keeper.take() {
            owner.keep_size_with(keeper);
        }
        if let Some(parent) = self.parent.clone() {
            // Clients may plug in a disk.
            let spare_rings = usize::from(self.api.is_some());
            owner.before_guest(Box::new(move |disks| {
                make_last_rings(spare_rings);
                parent.ask(&Ask::Freeze(disks), None)?;
                threads::confine(Kind::Main)
            }));
        }
    }

    /// The VM runs.
    pub fn started(&mut self) {
        if let Some(started) = self.duties.started.take() {
            started();
        }
    }

    #[must_use]
    pub fn is_jailed(&self) -> bool {
        self.parent.is_some()
    }
}

/// Makes the jail, and the VM in it: `inside` makes and serves it. It may run in another process, which ends with it.
pub fn run(outside: Outside, inside: impl FnOnce(Inside) -> Result<End, StartError>) -> Outcome {
    try_run(outside, inside).unwrap_or_else(|error| conclude(Err(error)))
}

/// Ends this process, as its VM has ended or has failed to start.
pub fn end(outcome: Result<Outcome, StartError>) -> ! {
    let Outcome { code, .. } = outcome.unwrap_or_else(|error| conclude(Err(error)));
    // Without unwinding the machine: the host takes everything back at once, and faster than we could.
    std::process::exit(code.into())
}

/// Tells how it went.
pub fn conclude(ended: Result<End, StartError>) -> Outcome {
    match ended {
        Ok(end) => {
            tell(&end);
            Outcome { code: Exit::from(&end) as u8, reason: what_ended(&end) }
        }
        Err(error) => Outcome { code: error.report() as u8, reason: exit::one_line(&error) },
    }
}

fn try_run(outside: Outside, inside: impl FnOnce(Inside) -> Result<End, StartError>) -> Result<Outcome, StartError> {
    let Outside { jail, api, signals, rights, reads_stdin, mut duties } = outside;
    let (level, share) = (jail.level(), jail.share);
    let budgets = Budgets::from(&share);
    let host = |error| StartError::Machine(resources("make a jail")(error));
    if level == JailLevel::Off {
        if share.needs_cgroup() {
            return Err(StartError::Jail(JailError::LimitsUnjailed));
        }
        exit::say("tranche: warning: --jail off: whoever takes the VMM over has all rights of its user\n");
        #[cfg(debug_assertions)]
        threads::confine_with(jail::attack_unjailed);
        let (direct, api) = (Arc::new(OpenDirectly), api.map(ApiSocket::into_clients));
        duties.console.take().map_or(Ok(()), |serve| serve()).map_err(host)?;
        return Ok(conclude(inside(Inside { host: direct, api, signals, budgets, duties, parent: None })));
    }
    let (front, clients) = match api {
        Some(api) => {
            let (front, clients) = api.into_front().map_err(host)?;
            (Some(front), Some(clients))
        }
        None => (None, None),
    };
    let (pass_on, passed_on) = UnixStream::pair().map_err(host)?;
    pass_on.set_nonblocking(true).map_err(host)?;
    // A terminal is not to be read by who has no business with it.
    let no_input = if reads_stdin { None } else { Some(File::open("/dev/null").map_err(host)?) };
    // The VMM's own is an empty one.
    let directory = std::env::current_dir().unwrap_or_default();
    let cgroup = match Cgroup::make(&share) {
        Err(error) if share.needs_cgroup() => return Err(StartError::Jail(error.into())),
        made => made.ok(),
    };
    match jail::split(level, cgroup.as_ref()).map_err(StartError::Jail)? {
        Side::Vmm { socket, missing } => {
            for (layer, why) in missing {
                tracing::warn!("the jail is incomplete: no {}: {why}", layer.name());
            }
            // What is this side's is not the other's. The store's lock stays: as long as the VMM lives, its VM does.
            front.into_iter().for_each(ApiFront::forget);
            if let Some(none) = no_input {
                rustix::stdio::dup2_stdin(none).map_err(|error| host(error.into()))?;
            }
            drop((pass_on, signals));
            std::mem::forget(cgroup);
            std::mem::forget(duties.split.take());
            let parent = AskParent::new(socket, directory);
            threads::confine_with(jail::confine_thread);
            let told = parent.clone();
            let started: Box<dyn FnOnce()> = Box::new(move || drop(told.ask(&Ask::Started, None)));
            let keep = parent.clone();
            let keeper = duties.keeper.take().map(|keeper| {
                std::mem::forget(keeper);
                let keeper =
                    move |size| keep.ask(&Ask::KeepSize(size), None).map(drop).map_err(|error| error.to_string());
                Box::new(keeper) as Keeper
            });
            std::mem::forget(duties.started.take());
            // Closes this process's descriptors of it.
            drop(duties.console.take());
            let vm = Signals::passed_on(passed_on).map_err(host).and_then(|signals| {
                let duties = Duties { started: Some(started), keeper, ..Duties::default() };
                let host = Arc::new(parent.clone());
                let parent = Some(parent.clone());
                inside(Inside { host, api: clients, signals, budgets, duties, parent })
            });
            // Of one whose parent was killed, nobody is to hear how it has ended.
            let _ = parent.ask(&Ask::Ending, None);
            let Outcome { code, reason } = conclude(vm);
            let _ = parent.ask(&Ask::Ended { code, reason }, None);
            std::process::exit(code.into())
        }
        Side::Parent { process, pid, socket } => {
            // What the VMM is to have is not to stay open here, and nothing of it is to be undone.
            drop((clients, passed_on));
            std::mem::forget(inside);
            if let Some(split) = duties.split.take() {
                split(pid.unsigned_abs());
            }
            duties.console.take().map_or(Ok(()), |serve| serve()).map_err(host)?;
            let terminal = RawTerminal::guard().map_err(host)?;
            let parent = Parent::new(socket, pid, Policy::knowing(rights), cgroup);
            let outcome = Supervisor { parent, process, pass_on, signals, front, duties }.supervise(pid)?;
            drop(terminal);
            Ok(outcome.unwrap_or_else(|unnatural| unnatural.report()))
        }
    }
}

/// The parent at work.
struct Supervisor {
    parent: Parent,
    process: OwnedFd,
    pass_on: UnixStream,
    signals: Signals,
    front: Option<ApiFront>,
    duties: Duties,
}

/// An end that the VMM has not told of.
enum Unnatural {
    NotJailed(String),
    Violation { call: String, thread: &'static str },
    OutOfMemory,
    Signal(i32),
    Silent,
}

impl Supervisor {
    /// Serves the VMM until it ends.
    fn supervise(mut self, pid: i32) -> Result<Result<Outcome, Unnatural>, StartError> {
        let failed = |source: io::Error| JailError::Host { what: "no events", source };
        let mut end = None;
        let mut presses = 0;
        loop {
            let mut wanted = vec![
                PollFd::new(&self.parent, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
                PollFd::new(&self.process, PollFlags::IN),
            ];
            if let Some(front) = &self.front {
                wanted.extend(front.relay.wanted());
            }
            match poll(&mut wanted, None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled.map_err(|error| StartError::Jail(failed(error.into())))?,
            };
            let ready: Vec<_> = wanted.iter().map(PollFd::revents).collect();
            drop(wanted);
            if !ready[1].is_empty() {
                while let Some(signal) = self.signals.next() {
                    // One that is far behind is about to end.
                    let _ = self.pass_on.write(&[signal as u8]);
                    presses += 1;
                }
                // The first is the VM's own business, the second one the VMM's. It may be in other hands.
                if presses >= PRESSES {
                    end.get_or_insert_with(|| Ok(ended_by_force()));
                    break;
                }
            }
            if let Some(front) = &mut self.front {
                front.relay.go_on(&ready[3..], &mut |call| self.parent.hear(call));
            }
            if ready[0].is_empty() {
                // It may have given its end of the socket to somebody who keeps it.
                if ready[2].is_empty() { continue } else { break }
            }
            match self.parent.serve() {
                News::Nothing => {}
                News::Started => {
                    if let Some(started) = self.duties.started.take() {
                        started();
                    }
                    self.parent.answer(&Given::Done, &[]);
                    // What has brought it here is not needed any more.
                    release_startup_code();
                }
                News::KeepSize(size) => {
                    let kept = self.duties.keeper.as_mut().map_or(Ok(()), |keeper| keeper(size));
                    let given = kept.map_or_else(|why| Given::Failed(io::Error::other(why)), |()| Given::Done);
                    self.parent.answer(&given, &[]);
                }
                News::Ended { code, reason } => {
                    end = Some(Ok(Outcome { code, reason: plain(&reason) }));
                    self.parent.answer(&Given::Done, &[]);
                }
                News::NotJailed(why) => end = Some(Err(Unnatural::NotJailed(plain(&why)))),
                News::Violation { call, thread } => end = Some(Err(Unnatural::Violation { call, thread })),
                News::HungUp => break,
            }
        }
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let status = Pid::from_raw(pid).and_then(|pid| waitpid(Some(pid), WaitOptions::empty()).ok().flatten());
        if let Some(front) = &mut self.front {
            front.relay.finish(LAST_PATIENCE);
        }
        if end.is_none() && self.parent.ran_out_of_memory() {
            end = Some(Err(Unnatural::OutOfMemory));
        }
        let by_signal = status.and_then(|(_, status)| status.terminating_signal());
        Ok(end.unwrap_or(Err(by_signal.map_or(Unnatural::Silent, Unnatural::Signal))))
    }
}

fn ended_by_force() -> Outcome {
    let reason = "ended by a third signal".to_owned();
    exit::say(&format!("tranche: {reason}\n"));
    Outcome { code: Exit::Killed as u8, reason }
}

/// What a VMM says of itself, which may have been taken over: short, and nothing for a terminal to act on.
fn plain(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(1000).collect()
}

impl Unnatural {
    fn report(self) -> Outcome {
        let (exit, reason, hint) = match self {
            Self::NotJailed(why) => {
                let error = JailError::Step(why);
                (Exit::NoJail, format!("the VMM cannot be jailed: {error}"), error.hint())
            }
            Self::Violation { call, thread } => (
                Exit::JailBroken,
                format!("the VMM was ended: its {thread} thread called {call}, which its jail forbids"),
                Some("a guest may have taken it over, or it is a bug: please report it"),
            ),
            Self::OutOfMemory => (
                Exit::MemoryTaken,
                "the host's kernel ended the VM: it took more memory than its limit".into(),
                Some(
                    "--memory-limit has to have room for what the guest uses, and some for the VMM; see docs/shares.md",
                ),
            ),
            Self::Signal(signal) => (Exit::Internal, format!("the VMM was killed by signal {signal}"), None),
            Self::Silent => (Exit::Internal, "the VMM has ended without a word".into(), None),
        };
        let hint = hint.map(|hint| format!("  hint: {hint}\n")).unwrap_or_default();
        exit::say(&format!("tranche: error: {reason}\n{hint}"));
        Outcome { code: exit as u8, reason }
    }
}
