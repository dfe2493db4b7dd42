//! Where a restored VM writes what it changes on a disk of the snapshot: an image over the disk's files.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::SnapshotError;
use crate::backend::disk::tools::make_overlay;
use crate::config::{Backing, DiskFormat, Image, SavedDisk};

/// Such an image. Unless it [stays](Self::stay), dropping this takes it away.
#[derive(Debug)]
pub struct Overlay {
    /// One without a name is reached through this descriptor, and through no other.
    file: File,
    /// The name that it has, maybe just for now.
    name: Option<PathBuf>,
    keeps_name: bool,
}

/// The files of this process, by their descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";

/// Is this the path of a file that is gone with its VM?
#[must_use]
pub fn is_nameless(path: &Path) -> bool {
    path.starts_with(DESCRIPTORS)
}

impl Overlay {
    /// Puts an image over a disk whose files are in their places, in the directory `keep` or, without one, in a file that
    /// has no name and goes with the VM.
    ///
    /// # Errors
    /// What is wrong with the disk's file, or keeps us from making another.
    pub fn put_over(disk: &mut SavedDisk, keep: Option<&Path>) -> Result<Self, SnapshotError> {
        let Image { format, mut backing } = std::mem::take(&mut disk.config.image);
        backing.insert(0, Backing { path: disk.config.path.clone(), format });
        let (this, path) = match keep {
            Some(dir) => Self::named(dir, &disk.name)?,
            None => Self::nameless()?,
        };
        make_overlay(&this.file, &path, &backing[0])
            .map_err(|source| SnapshotError::Overlay { disk: disk.name.clone(), source: source.into() })?;
        disk.config.path = path;
        disk.config.image = Image { format: Some(DiskFormat::Qcow2), backing };
        Ok(this)
    }

    fn named(dir: &Path, disk: &str) -> Result<(Self, PathBuf), SnapshotError> {
        let path = dir.join(format!("{disk}.qcow2"));
        let failed = |source| SnapshotError::Write { path: path.clone(), source };
        if disk.contains('/') {
            return Err(failed(io::ErrorKind::InvalidFilename.into()));
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => SnapshotError::Exists(path.clone()),
            _ => failed(error),
        })?;
        Ok((Self { file, name: Some(path.clone()), keeps_name: true }, path))
    }

    fn nameless() -> Result<(Self, PathBuf), SnapshotError> {
        // Not `/tmp`, which may be memory.
        let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let (file, name) = match options.clone().custom_flags(libc::O_TMPFILE).open(&dir) {
            Ok(file) => (Ok(file), None),
            // A file system on which all files have names, at first.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
                let mut random = [0; 8];
                rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                    .map_err(|source| SnapshotError::Write { path: dir.clone(), source: source.into() })?;
                let name = dir.join(format!(".tranche.{:016x}", u64::from_ne_bytes(random)));
                (options.create_new(true).open(&name), Some(name))
            }
            Err(error) => (Err(error), None),
        };
        let file = file.map_err(|source| SnapshotError::Write { path: dir.join("an overlay"), source })?;
        let path = Path::new(DESCRIPTORS).join(file.as_raw_fd().to_string());
        Ok((Self { file, name, keeps_name: false }, path))
    }

    /// A VM has it now, and it goes with that VM if it has no name.
    pub fn stay(&mut self) {
        match self.keeps_name {
            true => self.name = None,
            false => self.take_name_away(),
        }
    }

    fn take_name_away(&mut self) {
        if let Some(name) = self.name.take() {
            let _ = fs::remove_file(name);
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.take_name_away();
    }
}
