//! Where a restored VM writes what it changes on a disk of the snapshot: an image over the disk's files.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::SnapshotError;
use crate::backend::disk::tools::make_overlay;
use crate::backend::host::DESCRIPTORS;
use crate::backend::{Deed, HostFile, HostFiles};
use crate::config::{Backing, DiskFormat, Image, SavedDisk};

/// Such an image. Unless it [stays](Self::stay), dropping this takes it away.
pub struct Overlay {
    /// One without a name is reached through this descriptor, and through no other.
    file: File,
    /// The name that it has, as long as it may have to be taken away.
    name: Option<(PathBuf, Arc<dyn HostFiles>)>,
}

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
    pub fn put_over(
        disk: &mut SavedDisk,
        keep: Option<&Path>,
        host: &Arc<dyn HostFiles>,
    ) -> Result<Self, SnapshotError> {
        let Image { format, mut backing } = std::mem::take(&mut disk.config.image);
        backing.insert(0, Backing { path: disk.config.path.clone(), format });
        let (this, path) = match keep {
            Some(dir) => Self::named(dir, &disk.name, host)?,
            None => Self::nameless(&**host)?,
        };
        make_overlay(&this.file, &path, &backing[0], &**host)
            .map_err(|source| SnapshotError::Overlay { disk: disk.name.clone(), source: source.into() })?;
        disk.config.path = path;
        disk.config.image = Image { format: Some(DiskFormat::Qcow2), backing };
        Ok(this)
    }

    fn named(dir: &Path, disk: &str, host: &Arc<dyn HostFiles>) -> Result<(Self, PathBuf), SnapshotError> {
        let path = dir.join(format!("{disk}.qcow2"));
        let failed = |source| SnapshotError::Write { path: path.clone(), source };
        if disk.contains('/') {
            return Err(failed(io::ErrorKind::InvalidFilename.into()));
        }
        let file = host.open(&HostFile::New(path.clone())).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => SnapshotError::Exists(path.clone()),
            _ => failed(error),
        })?;
        Ok((Self { file, name: Some((path.clone(), host.clone())) }, path))
    }

    fn nameless(host: &dyn HostFiles) -> Result<(Self, PathBuf), SnapshotError> {
        // Not `/tmp`, which may be memory.
        let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let file = host.open(&HostFile::Nameless(dir.clone()));
        let file = file.map_err(|source| SnapshotError::Write { path: dir.join("an overlay"), source })?;
        let path = Path::new(DESCRIPTORS).join(file.as_raw_fd().to_string());
        Ok((Self { file, name: None }, path))
    }

    /// A VM has it now, and it goes with that VM if it has no name.
    pub fn stay(&mut self) {
        self.name = None;
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Some((name, host)) = self.name.take() {
            let _ = host.perform(&Deed::RemoveFile(name));
        }
    }
}
