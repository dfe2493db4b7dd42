//! A disk's file: opened through the host's door, looked at, locked.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{DiskError, SECTOR};
use crate::backend::host::{HostFile, HostFiles};

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
        let path = path.to_owned();
        let mut file = match files.open(&HostFile::Disk { path: path.clone(), read_only }) {
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
        match lock(&file, read_only) {
            Ok(()) => {}
            // POSIX allows either for a lock that another holds.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(DiskError::Locked { path, read_only });
            }
            Err(source) => return Err(DiskError::Lock { path, source }),
        }
        // The size from after the lock: whoever held it may have changed it. A block device has none in its
        // metadata, but its end can be sought.
        let size = file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Size { path: path.clone(), source })?;
        let block_size = match kind.is_block_device() {
            true => rustix::fs::ioctl_blkpbszget(&file).map_or(SECTOR, u64::from),
            false => metadata.blksize(),
        };
        Ok(Self { file, size, block_size })
    }
}

/// Takes the lock without waiting for it.
#[expect(unsafe_code, reason = "rustix has the locks that belong to a process, not those of a description")]
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel reads one `flock`, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
