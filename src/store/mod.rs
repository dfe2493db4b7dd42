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

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::shelf::{Shelf, is_taken, rename_to_free, sync_parent, user_dir, write_whole};

pub use self::console_log::{LogLine, LogReader, LogWriter};
pub use self::definition::{Definition, DefinitionError, is_kernel_name};
pub use self::error::StoreError;
pub use self::life::{Ended, Life, State, now};
pub use self::vm::{Change, Held, Running, Vm};

const DEFINITION: &str = "vm.json";
/// Most bytes of a name: it becomes part of a socket's path, which has 107.
const LONGEST_NAME: usize = 48;

/// Where a user's VMs are.
#[derive(Debug, Clone)]
pub struct Store {
    vms: Shelf,
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
        Self { vms: Shelf::new(state.join("vms"), 0o700), run: run.to_owned() }
    }

    /// `$XDG_STATE_HOME/tranche` and `$XDG_RUNTIME_DIR/tranche`. Without those variables `/var/lib/tranche` and `/run/tranche`
    /// for root, and `~/.local/state/tranche` and `/tmp/tranche-UID` for others.
    ///
    /// # Errors
    /// When the first cannot be told.
    pub fn of_user() -> Result<Self, StoreError> {
        let state = user_dir("XDG_STATE_HOME", "/var/lib", ".local/state").ok_or(StoreError::NoPlace)?;
        let user = rustix::process::geteuid();
        let run = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        let run = match run {
            Some(dir) => dir.join("tranche"),
            None if user.is_root() => "/run/tranche".into(),
            None => format!("/tmp/tranche-{}", user.as_raw()).into(),
        };
        Ok(Self::in_dirs(&state.join("tranche"), &run))
    }

    /// # Errors
    /// `Unknown` when there is none of that name.
    pub fn find(&self, name: &str) -> Result<Vm, StoreError> {
        let vm = self.vm(name);
        if is_name(name) && vm.dir().is_dir() { Ok(vm) } else { Err(StoreError::Unknown(name.into())) }
    }

    fn vm(&self, name: &str) -> Vm {
        Vm::new(name.to_owned(), self.vms.path(name), self.run.join(name))
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn all(&self) -> Result<Vec<Vm>, StoreError> {
        let names = self.vms.names(is_name).map_err(StoreError::io("read", self.vms.dir()))?;
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
        let vm = self.vm(name);
        let make = || {
            let unfinished = self.vms.begin(name)?;
            write_whole(&unfinished.path().join(DEFINITION), &definition.to_json())?;
            File::create(unfinished.path().join(vm::LOCK))?;
            unfinished.finish(false)
        };
        make().map_err(not_placed("make", vm.dir(), name))?;
        Ok(vm)
    }

    /// Removes a VM that does not run. Its disks are its owner's, and stay.
    ///
    /// # Errors
    /// When it runs or is being changed, or the host says no.
    pub fn remove(&self, vm: &Vm) -> Result<(), StoreError> {
        let _change = vm.change()?;
        let _lock = vm.lock()?;
        vm.forget_runtime();
        self.vms.remove(vm.name()).map_err(StoreError::io("remove", vm.dir()))
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
        vm.forget_runtime();
        let place = self.vms.path(name);
        let renamed = rename_to_free(vm.dir(), &place).and_then(|()| sync_parent(&place));
        renamed.map_err(not_placed("rename", vm.dir(), name))
    }
}

/// Why a directory did not get its `name`.
fn not_placed(what: &'static str, path: &Path, name: &str) -> impl FnOnce(io::Error) -> StoreError {
    let (failed, name) = (StoreError::io(what, path), name.to_owned());
    move |error| if is_taken(&error) { StoreError::Exists(name) } else { failed(error) }
}

#[cfg(test)]
mod tests;
