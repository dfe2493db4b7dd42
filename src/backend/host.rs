//! The one door through which host resources come in.
//!
//! The machine never opens a path itself: it asks for a [`HostFile`] and gets a descriptor. Unjailed, the file
//! is opened on the spot; a jailed machine will ask a parent that holds the rights.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// A host resource a VM can ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostFile {
    Kvm,
    /// A kernel or initrd: read only.
    BootFile(PathBuf),
    Disk {
        path: PathBuf,
        read_only: bool,
    },
    /// `/dev/net/tun`, not yet attached to an interface.
    Tun,
    /// A file the serial port writes to: created, or emptied.
    SerialOutput(PathBuf),
}

impl fmt::Display for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("/dev/kvm"),
            Self::Tun => f.write_str("/dev/net/tun"),
            Self::BootFile(path) | Self::SerialOutput(path) | Self::Disk { path, .. } => {
                write!(f, "{}", path.display())
            }
        }
    }
}

/// Turns names into descriptors.
pub trait HostFiles: Send + Sync {
    /// # Errors
    /// Whatever the host says about the file.
    fn open(&self, file: &HostFile) -> io::Result<File>;
}

/// Opens files with the rights of this process.
pub struct OpenDirectly;

impl HostFiles for OpenDirectly {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        // Everything is opened close-on-exec, as std does. O_NONBLOCK keeps a path that turns out to be a FIFO
        // from hanging the start; it means nothing to regular files and block devices.
        let mut options = OpenOptions::new();
        match file {
            HostFile::Kvm | HostFile::Tun => options.read(true).write(true).open(file.to_string()),
            HostFile::BootFile(path) => options.read(true).custom_flags(libc::O_NONBLOCK).open(path),
            HostFile::Disk { path, read_only } => {
                options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path)
            }
            HostFile::SerialOutput(path) => options.write(true).create(true).truncate(true).open(path),
        }
    }
}
