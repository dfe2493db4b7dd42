//! One named VM: its directory, and who has it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{DEFINITION, Definition, DefinitionError, Ended, Life, State, StoreError, life};
use crate::shelf::{lock_dir, write_whole};

pub(super) const LOCK: &str = "lock";
const LIFE: &str = "life.json";

/// A VM's place. That there is one is as true as the moment it was looked for.
#[derive(Debug, Clone)]
pub struct Vm {
    name: String,
    dir: PathBuf,
    run: PathBuf,
}

/// The right to change a VM's files. One command has it at a time.
#[derive(Debug)]
pub struct Change(#[expect(dead_code, reason = "a lock")] File);

/// The right to keep a VM from being started.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "a lock")] File);

/// The right to be a VM, held as long as it runs.
#[derive(Debug)]
pub struct Running {
    vm: Vm,
    life: Life,
    _lock: File,
}

impl Vm {
    pub(super) fn new(name: String, dir: PathBuf, run: PathBuf) -> Self {
        Self { name, dir, run }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    #[must_use]
    pub fn console_socket(&self) -> PathBuf {
        self.run.join("console.sock")
    }

    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// What its process has to say.
    #[must_use]
    pub fn process_log(&self) -> PathBuf {
        self.dir.join("vmm.log")
    }

    /// What the next start takes.
    ///
    /// # Errors
    /// When it cannot be read or used.
    pub fn definition(&self) -> Result<Definition, StoreError> {
        self.read(&self.dir.join(DEFINITION))
    }

    fn read(&self, path: &Path) -> Result<Definition, StoreError> {
        let read = || {
            let definition = Definition::parse(&fs::read(path)?)?;
            definition.validate()?;
            Ok(definition)
        };
        read().map_err(|source| match source {
            DefinitionError::Read(error) if error.kind() == io::ErrorKind::NotFound && !self.dir.exists() => {
                StoreError::Unknown(self.name.clone())
            }
            source => StoreError::Definition { path: path.to_owned(), source },
        })
    }

    /// What it was started with, while it runs.
    #[must_use]
    pub fn running_definition(&self) -> Option<Definition> {
        Definition::parse(&fs::read(self.run.join(DEFINITION)).ok()?).ok()
    }

    /// Its last start, and how that ended.
    #[must_use]
    pub fn life(&self) -> Option<Life> {
        Life::read(&self.dir.join(LIFE))
    }

    #[must_use]
    pub fn state(&self) -> State {
        if self.is_locked() { State::Running } else { self.life().map_or(State::Stopped, |life| life.state()) }
    }

    /// Does it run?
    #[must_use]
    pub fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.dir.join(LOCK)) else { return false };
        matches!(flock(&file, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK))
    }

    /// Its process, to wait for and to signal, while it runs.
    #[must_use]
    pub fn process(&self) -> Option<OwnedFd> {
        let life = self.life().filter(|life| life.ended.is_none())?;
        let process = pidfd_open(Pid::from_raw(i32::try_from(life.pid).ok()?)?, PidfdFlags::empty()).ok()?;
        // Looked at after it was opened: as long as the VM is locked, the number is that of the process that has locked it.
        self.is_locked().then_some(process)
    }

    /// Waits until it does not run; `false` if it still does after `patience`.
    #[must_use]
    pub fn wait_until_it_ends(&self, patience: Option<Duration>) -> bool {
        let deadline = patience.map(|patience| Instant::now() + patience);
        while self.is_locked() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            // One that has just begun to be the VM has not said yet who it is.
            let process = self.process();
            let longest = if process.is_some() { Duration::from_secs(1) } else { Duration::from_millis(10) };
            let wait = left.map_or(longest, |left| left.min(longest));
            let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
            match &process {
                Some(process) => drop(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout))),
                None => std::thread::sleep(wait),
            }
        }
        true
    }

    /// Removes what a killed process has left of its runtime directory.
    pub(super) fn forget_runtime(&self) {
        let _ = fs::remove_dir_all(&self.run);
    }

    /// Keeps it from being started while its files are changed.
    ///
    /// # Errors
    /// `Running` when it runs.
    pub fn hold(&self) -> Result<Held, StoreError> {
        self.lock().map(Held)
    }

    /// Takes the right to be this VM.
    ///
    /// # Errors
    /// `Running` when it runs, `Busy` when it is being changed.
    pub(super) fn lock(&self) -> Result<File, StoreError> {
        let failed = |what| StoreError::io(what, &self.dir);
        let file = File::options().write(true).create(true).truncate(false).open(self.dir.join(LOCK));
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::Unknown(self.name.clone()),
            _ => failed("lock")(error),
        })?;
        // Somebody who just looks whether it runs has it for a moment.
        for tries in (0..20).rev() {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if tries > 0 => std::thread::sleep(Duration::from_millis(5)),
                Err(Errno::WOULDBLOCK) => {
                    // Whoever changes its files holds it too, and so does a start that has not come far yet.
                    let is_running = self.process().is_some();
                    let name = self.name.clone();
                    return Err(if is_running { StoreError::Running(name) } else { StoreError::Busy(name) });
                }
                Err(error) => return Err(failed("lock")(error.into())),
            }
        }
        // It may have been removed, and another made in its place, while we waited.
        let inode = |metadata: io::Result<fs::Metadata>| metadata.ok().map(|metadata| metadata.ino());
        if inode(file.metadata()) != inode(fs::metadata(self.dir.join(LOCK))) {
            return Err(StoreError::Unknown(self.name.clone()));
        }
        Ok(file)
    }

    /// Takes the right to change its files.
    ///
    /// # Errors
    /// `Busy` when another command has it.
    pub fn change(&self) -> Result<Change, StoreError> {
        lock_dir(&self.dir).map(Change).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => StoreError::Busy(self.name.clone()),
            io::ErrorKind::NotFound => StoreError::Unknown(self.name.clone()),
            _ => StoreError::io("lock", &self.dir)(error),
        })
    }

    /// Has the next start take another definition.
    ///
    /// # Errors
    /// When it cannot be used, or the host says no; the one before stays then.
    pub fn define(&self, _change: &Change, definition: &Definition) -> Result<(), StoreError> {
        let path = self.dir.join(DEFINITION);
        if let Err(source) = definition.validate() {
            return Err(StoreError::Definition { path, source });
        }
        write_whole(&path, &definition.to_json()).map_err(StoreError::io("write", &path))
    }

    /// Begins to be this VM, in a runtime directory of its own.
    ///
    /// # Errors
    /// `Running` when it runs already, or what the host says.
    pub fn run(&self) -> Result<(Running, Definition), StoreError> {
        let lock = self.lock()?;
        let definition = self.definition()?;
        let life = Life::begin();
        let begin = || -> io::Result<()> {
            if let Some(parent) = self.run.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
                // In a directory that all may write to, it may be somebody else's trap.
                if fs::symlink_metadata(parent)?.uid() != rustix::process::geteuid().as_raw() {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, "its directory is another user's"));
                }
            }
            match fs::remove_dir_all(&self.run) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => DirBuilder::new().mode(0o700).create(&self.run)?,
            }
            fs::write(self.run.join(DEFINITION), definition.to_json())?;
            life.write(&self.dir.join(LIFE))
        };
        begin().map_err(StoreError::io("use", &self.run))?;
        Ok((Running { vm: self.clone(), life, _lock: lock }, definition))
    }
}

impl Running {
    /// What writes down that the guest runs in another process.
    pub fn note_vmm(&self) -> impl FnOnce(u32) + use<> {
        let (path, life) = (self.vm.dir.join(LIFE), self.life.clone());
        move |vmm| {
            if let Err(error) = (Life { vmm: Some(vmm), ..life }).write(&path) {
                tracing::warn!("cannot write down which process the VM's is: {error}");
            }
        }
    }

    /// Writes down how it ended. The VM stays locked until the process that was it is gone, and its disks with it.
    pub fn end(&mut self, code: u8, reason: String) {
        self.life.ended = Some(Ended { time: life::now(), code, reason });
        if let Err(error) = self.life.write(&self.vm.dir.join(LIFE)) {
            tracing::warn!("cannot write down how the VM ended: {error}");
        }
        self.vm.forget_runtime();
    }
}
