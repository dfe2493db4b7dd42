//! Named VMs on disk: what they are, what became of them, and who has them.
//!
//! ```text
//! STATE/vms/NAME/           renamed here when it is whole, and away before it is removed
//!   vm.json                 its definition: what the next start takes
//!   lock                    locked by the process that is the VM, as long as it is
//!   life.json               when it was started last, by which process, and how that ended
//!   console.log, .log.1     what the guest wrote to its console, with times
//!   vmm.log                 what the last process had to say
//! RUN/NAME/                 of the process that is the VM, and gone with it
//!   api.sock, console.sock
//!   vm.json                 the definition that it was started with
//! ```
//! There is no daemon and no index: the directories are the truth. A command that changes a VM locks its directory; what a
//! killed one has left behind has a name that begins with a dot, and the next command that changes something removes it.

mod console_log;
mod definition;
mod error;
mod life;
mod vm;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

pub use self::console_log::{LogLine, LogReader, LogWriter};
pub use self::definition::{Definition, DefinitionError, is_kernel_name};
pub use self::error::StoreError;
pub use self::life::{Ended, Life, State};
pub use self::vm::{Change, Running, Vm};

const DEFINITION: &str = "vm.json";
/// Directories that are not VMs: not yet, or not any more.
const UNFINISHED: &str = ".new-";

/// Most bytes of a name: it becomes part of a socket's path, which has 107.
const LONGEST_NAME: usize = 48;

/// Where a user's VMs are.
#[derive(Debug, Clone)]
pub struct Store {
    vms: PathBuf,
    run: PathBuf,
}

/// Can a VM be called that? A letter or digit, then also `-`, `_` and `.`.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    letters && name.len() <= LONGEST_NAME && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

impl Store {
    #[must_use]
    pub fn in_dirs(state: &Path, run: &Path) -> Self {
        Self { vms: state.join("vms"), run: run.to_owned() }
    }

    /// `$XDG_STATE_HOME/tranche` and `$XDG_RUNTIME_DIR/tranche`. Without those variables `/var/lib/tranche` and `/run/tranche`
    /// for root, and `~/.local/state/tranche` and `/tmp/tranche-UID` for others.
    ///
    /// # Errors
    /// When the first cannot be told.
    pub fn of_user() -> Result<Self, StoreError> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let user = rustix::process::geteuid();
        let root = |path: &str| user.is_root().then(|| PathBuf::from(path));
        let state = absolute("XDG_STATE_HOME")
            .or_else(|| root("/var/lib"))
            .or_else(|| Some(absolute("HOME")?.join(".local/state")))
            .ok_or(StoreError::NoPlace)?;
        let run = absolute("XDG_RUNTIME_DIR").or_else(|| root("/run")).map(|dir| dir.join("tranche"));
        let run = run.unwrap_or_else(|| format!("/tmp/tranche-{}", user.as_raw()).into());
        Ok(Self::in_dirs(&state.join("tranche"), &run))
    }

    /// # Errors
    /// `Unknown` when there is none of that name.
    pub fn find(&self, name: &str) -> Result<Vm, StoreError> {
        let vm = self.vm(name);
        if is_name(name) && vm.dir().is_dir() { Ok(vm) } else { Err(StoreError::Unknown(name.into())) }
    }

    fn vm(&self, name: &str) -> Vm {
        Vm::new(name.to_owned(), self.vms.join(name), self.run.join(name))
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn all(&self) -> Result<Vec<Vm>, StoreError> {
        let entries = match fs::read_dir(&self.vms) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(StoreError::io("read", &self.vms))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| is_name(name)).collect();
        names.sort_unstable();
        Ok(names.iter().map(|name| self.vm(name)).collect())
    }

    /// Makes a VM: all of it, or nothing.
    ///
    /// # Errors
    /// When there is one of that name, it can have no such name, or the host says no.
    pub fn create(&self, name: &str, definition: &Definition) -> Result<Vm, StoreError> {
        if !is_name(name) {
            return Err(StoreError::Name(name.into()));
        }
        self.sweep()?;
        let vm = self.vm(name);
        let partial = self.unfinished(name);
        let make = || {
            make_dir(&partial)?;
            let _lock = lock_dir(&partial)?;
            write_whole(&partial.join(DEFINITION), &definition.to_json())?;
            File::create(partial.join(vm::LOCK))?;
            let placed = rename_to_free(&partial, vm.dir());
            placed.and_then(|()| File::open(&self.vms)?.sync_all())
        };
        match make() {
            Ok(()) => Ok(vm),
            Err(error) => {
                let _ = fs::remove_dir_all(&partial);
                Err(not_placed("make", vm.dir(), name)(error))
            }
        }
    }

    /// Removes a VM that does not run. Its disks are its owner's, and stay.
    ///
    /// # Errors
    /// When it runs or is being changed, or the host says no.
    pub fn remove(&self, vm: &Vm) -> Result<(), StoreError> {
        let _change = vm.change()?;
        let _lock = vm.lock()?;
        self.sweep()?;
        // Renamed first: half a VM must not be found under its name.
        let gone = self.unfinished(vm.name());
        let removed = fs::rename(vm.dir(), &gone).and_then(|()| fs::remove_dir_all(&gone));
        removed.map_err(StoreError::io("remove", vm.dir()))
    }

    /// Gives a VM that does not run another name.
    ///
    /// # Errors
    /// When there is one of that name, it runs or is being changed, or the host says no.
    pub fn rename(&self, vm: &Vm, name: &str) -> Result<(), StoreError> {
        if !is_name(name) {
            return Err(StoreError::Name(name.into()));
        }
        let _change = vm.change()?;
        let _lock = vm.lock()?;
        rename_to_free(vm.dir(), &self.vms.join(name)).map_err(not_placed("rename", vm.dir(), name))
    }

    fn unfinished(&self, name: &str) -> PathBuf {
        self.vms.join(format!("{UNFINISHED}{name}-{}", std::process::id()))
    }

    /// Removes what killed commands have left behind.
    fn sweep(&self) -> Result<(), StoreError> {
        let failed = StoreError::io("use", &self.vms);
        DirBuilder::new().recursive(true).mode(0o700).create(&self.vms).map_err(failed)?;
        let entries = fs::read_dir(&self.vms).map_err(StoreError::io("read", &self.vms))?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let is_unfinished =
                path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes()));
            // What is locked belongs to one that is at it.
            if is_unfinished && let Ok(_lock) = lock_dir(&path) {
                let _ = fs::remove_dir_all(&path);
            }
        }
        Ok(())
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Locks a directory, without waiting.
fn lock_dir(path: &Path) -> io::Result<File> {
    let dir = File::open(path)?;
    flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
    Ok(dir)
}

/// Writes a file whole or not at all, and to stable storage.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = path.with_extension("new");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

fn rename_to_free(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that cannot promise that nothing is replaced; a directory that has files never is.
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(from, to),
        renamed => Ok(renamed?),
    }
}

/// Why a directory did not get its `name`.
fn not_placed(what: &'static str, path: &Path, name: &str) -> impl FnOnce(io::Error) -> StoreError {
    let (failed, name) = (StoreError::io(what, path), name.to_owned());
    move |error| match error.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => StoreError::Exists(name),
        _ => failed(error),
    }
}

#[cfg(test)]
mod tests;
