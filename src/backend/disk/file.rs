//! A disk's file: opened through the host's door, looked at, locked.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde::Serialize;

use super::{DiskError, SECTOR};
use crate::backend::host::{HostFile, HostFiles};
use crate::backend::patience::until_free;

/// An open, locked file or block device. Closing it gives up the lock.
///
/// The lock is an open-file-description lock on the whole file: exclusive for a writer, shared for readers. It
/// binds the VMs on this host that open the same inode; QEMU's own locks conflict with it, a file system
/// mounted from a block device does not.
#[derive(Debug)]
pub struct DiskFile {
    pub file: File,
    /// Its size in bytes.
    pub size: u64,
    /// The unit in bytes that the host reads and writes most cheaply; any number, as the host tells it.
    pub block_size: u64,
}

impl DiskFile {
    /// Opens and locks what is at `path`.
    ///
    /// # Errors
    /// Where it is no disk, or another has it.
    pub fn open(files: &dyn HostFiles, path: &Path, read_only: bool) -> Result<Self, DiskError> {
        // POSIX allows either for a lock that another holds.
        let is_held = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
        Self::open_with(files, path, read_only, |file| {
            until_free(|| lock(file, read_only), is_held).map_err(|error| match is_held(&error) {
                true => DiskError::Locked { path: path.to_owned(), read_only },
                false => DiskError::Lock { path: path.to_owned(), source: error },
            })
        })
    }

    /// Opens what is at `path` for a look, without a lock, and tells who has one.
    ///
    /// # Errors
    /// Where it is no disk.
    pub fn look(files: &dyn HostFiles, path: &Path) -> Result<(Self, Use), DiskError> {
        let mut seen = Use::No;
        let file = Self::open_with(files, path, true, |file| {
            seen = use_of(file).map_err(|source| DiskError::Lock { path: path.to_owned(), source })?;
            Ok(())
        })?;
        Ok((file, seen))
    }

    fn open_with(
        files: &dyn HostFiles,
        path: &Path,
        read_only: bool,
        lock: impl FnOnce(&File) -> Result<(), DiskError>,
    ) -> Result<Self, DiskError> {
        let path = path.to_owned();
        let file = match files.open(&HostFile::Disk { path: path.clone(), read_only }) {
            Ok(file) => file,
            // What open(2) itself says about the two kinds of file that it refuses.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                return Err(DiskError::NotADisk { path, what: "a directory" });
            }
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                return Err(DiskError::NotADisk { path, what: "a socket or the node of a missing device" });
            }
            Err(source) => return Err(DiskError::Open { path, source }),
        };
        let metadata = file.metadata().map_err(|source| DiskError::Open { path: path.clone(), source })?;
        let kind = metadata.file_type();
        let what = match () {
            () if kind.is_file() || kind.is_block_device() => None,
            () if kind.is_dir() => Some("a directory"),
            () if kind.is_fifo() => Some("a named pipe"),
            () if kind.is_char_device() => Some("a character device"),
            () if kind.is_socket() => Some("a socket"),
            () => Some("a special file"),
        };
        if let Some(what) = what {
            return Err(DiskError::NotADisk { path, what });
        }
        lock(&file)?;
        // The size from after the lock: whoever held it may have changed it.
        let size = size(&file).map_err(|source| DiskError::Size { path: path.clone(), source })?;
        let block_size = match kind.is_block_device() {
            true => rustix::fs::ioctl_blkpbszget(&file).map_or(SECTOR, u64::from),
            false => metadata.blksize(),
        };
        Ok(Self { file, size, block_size })
    }
}

/// A file's size in bytes. A block device has none in its metadata, but its end can be sought.
pub fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Who has a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    No,
    Reading,
    Writing,
}

/// Takes the lock without waiting for it.
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, if read_only { libc::F_RDLCK } else { libc::F_WRLCK }).map(drop)
}

/// Asks for a lock that keeps us from having the disk for ourselves.
fn use_of(file: &File) -> io::Result<Use> {
    Ok(match libc::c_int::from(fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK)?) {
        libc::F_UNLCK => Use::No,
        libc::F_RDLCK => Use::Reading,
        _ => Use::Writing,
    })
}

/// Locks the whole file, or asks about it; returns the kind of lock that there is then.
#[expect(unsafe_code, reason = "rustix has the locks that belong to a process, not those of a description")]
fn fcntl(file: &File, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_short> {
    let mut whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel reads and writes one `flock`, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut whole) } {
        0 => Ok(whole.l_type),
        _ => Err(io::Error::last_os_error()),
    }
}
