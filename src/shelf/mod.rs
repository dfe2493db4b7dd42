//! Files and directories of ours on the host's disk: where a user's are, and how they come to be whole or not at all.
//!
//! A [`Shelf`] is a directory of directories. One that is being written, or removed, has a name that begins with a dot and
//! is locked by the process that is at it; what a killed one has left is removed by the next that begins one.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

/// Directories that are not what their names say: not yet, or not any more.
const UNFINISHED: &str = ".new-";

/// The directory that an XDG variable names; without it `root` for root, and `others` in the home of others.
#[must_use]
pub fn user_dir(variable: &str, root: &str, others: &str) -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(variable)
        .or_else(|| rustix::process::geteuid().is_root().then(|| root.into()))
        .or_else(|| Some(absolute("HOME")?.join(others)))
}

/// Writes a file whole or not at all, and to stable storage.
///
/// # Errors
/// The host's; what was there before is there still.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = path.with_extension("new");
    let mut file = File::create(&partial)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written.and_then(|()| sync_parent(path))
}

/// Has the host remember what a directory entry names.
///
/// # Errors
/// The host's.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// Renames a directory to a name that nothing has.
///
/// # Errors
/// The host's; `AlreadyExists` or `DirectoryNotEmpty` when something has that name.
pub fn rename_to_free(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that cannot promise that nothing is replaced; a directory that has files never is.
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(from, to),
        renamed => Ok(renamed?),
    }
}

/// Does an error say that there is something of this name already?
#[must_use]
pub fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty)
}

/// Locks a directory, without waiting.
///
/// # Errors
/// The host's; `WouldBlock` when somebody else has it.
pub fn lock_dir(path: &Path) -> io::Result<File> {
    let dir = File::open(path)?;
    flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
    Ok(dir)
}

/// A directory of directories.
#[derive(Debug, Clone)]
pub struct Shelf {
    dir: PathBuf,
    /// Of what is made here.
    mode: u32,
}

impl Shelf {
    #[must_use]
    pub fn new(dir: PathBuf, mode: u32) -> Self {
        Self { dir, mode }
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is on it, by name, as far as it fits `is_name`.
    ///
    /// # Errors
    /// The host's; that there is no shelf yet is none.
    pub fn names(&self, is_name: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| is_name(name)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Begins a directory that is to be called `name`.
    ///
    /// # Errors
    /// The host's.
    pub fn begin(&self, name: &str) -> io::Result<Unfinished> {
        DirBuilder::new().recursive(true).mode(self.mode).create(&self.dir)?;
        // Nobody sweeps between the making of a directory and its lock.
        let _turn = self.turn()?;
        self.sweep()?;
        let path = self.unfinished(name);
        DirBuilder::new().mode(self.mode).create(&path)?;
        let lock = lock_dir(&path)?;
        Ok(Unfinished { shelf: self.clone(), name: name.to_owned(), path, _lock: lock })
    }

    /// Removes one.
    ///
    /// # Errors
    /// The host's; as long as it could not be renamed, it is there still.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        // Renamed first: half of it must not be found under its name.
        let gone = self.unfinished(name);
        let _turn = self.turn()?;
        fs::rename(self.path(name), &gone)?;
        fs::remove_dir_all(&gone)
    }

    fn unfinished(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{UNFINISHED}{name}-{}", std::process::id()))
    }

    /// Waits until no other process makes or removes directories here.
    fn turn(&self) -> io::Result<File> {
        let dir = File::open(&self.dir)?;
        flock(&dir, FlockOperation::LockExclusive)?;
        Ok(dir)
    }

    /// Removes what killed processes have left.
    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let left = entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes());
            if left && let Ok(_lock) = lock_dir(&entry.path()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }
}

/// A directory that is being written. Dropped before it has its name, it is gone.
#[derive(Debug)]
pub struct Unfinished {
    shelf: Shelf,
    name: String,
    path: PathBuf,
    _lock: File,
}

impl Unfinished {
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, once its files are on stable storage; in the place of another one if it may `replace` it.
    ///
    /// # Errors
    /// The host's; [`is_taken`] tells whether there is something of that name.
    pub fn finish(self, replace: bool) -> io::Result<()> {
        File::open(&self.path)?.sync_all()?;
        let _turn = self.shelf.turn()?;
        let place = self.shelf.path(&self.name);
        if replace && place.exists() {
            // What was replaced goes when `self` is dropped.
            exchange(&self.path, &place)?;
        } else {
            rename_to_free(&self.path, &place)?;
        }
        sync_parent(&place)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Has two directories change places, at once where the file system can do that.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS) => exchange_in_steps(new, old),
        done => Ok(done?),
    }
}

/// For a moment there is no `old`. It is back if anything fails but the last step, after which it is where it shall be.
fn exchange_in_steps(new: &Path, old: &Path) -> io::Result<()> {
    let aside = new.with_added_extension("old");
    fs::rename(old, &aside)?;
    if let Err(error) = fs::rename(new, old) {
        let _ = fs::rename(&aside, old);
        return Err(error);
    }
    fs::rename(&aside, new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_that_cannot_exchange_get_there_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let [new, old] = ["new", "old"].map(|name| dir.path().join(name));
        let content = |dir: &Path| fs::read_to_string(dir.join("is")).unwrap();
        for exchange in [exchange, exchange_in_steps] {
            for dir in [&new, &old] {
                fs::create_dir_all(dir).unwrap();
                fs::write(dir.join("is"), dir.file_name().unwrap().as_encoded_bytes()).unwrap();
            }
            exchange(&new, &old).unwrap();
            assert_eq!((content(&new).as_str(), content(&old).as_str()), ("old", "new"));
            // A new one that is not there leaves the old one as it is.
            exchange(&dir.path().join("lost"), &old).unwrap_err();
            assert_eq!(content(&old), "new");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside them");
    }

    #[test]
    fn what_killed_processes_leave_behind_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(dir.path().join("a/b"), 0o700);
        assert_eq!(shelf.names(|_| true).unwrap(), [""; 0]);
        shelf.begin("one").unwrap().finish(false).unwrap();
        let (left, kept) = (shelf.path(".new-left-1"), shelf.path(".new-kept-2"));
        for dir in [&left, &kept] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("file"), "{").unwrap();
        }
        let lock = lock_dir(&kept).unwrap();
        let taken = shelf.begin("one").unwrap();
        fs::write(taken.path().join("file"), "").unwrap();
        assert!(!left.exists() && kept.exists());
        drop(lock);
        fs::write(shelf.path("one").join("file"), "").unwrap();
        assert!(is_taken(&taken.finish(false).unwrap_err()));
        shelf.begin("two").unwrap().finish(true).unwrap();
        assert!(!kept.exists());
        shelf.remove("one").unwrap();
        assert_eq!(shelf.names(|_| true).unwrap(), ["two"]);
    }
}
