//! The one door through which host resources come in.
//!
//! The machine never opens a path itself: it asks for a [`HostFile`] and gets a descriptor. Unjailed, the file
//! is opened on the spot; a jailed machine will ask a parent that holds the rights.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

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
    /// `/dev/userfaultfd`.
    Userfault,
    /// `/dev/vhost-net`, without an owner.
    VhostNet,
    /// A file the serial port writes to: created, or emptied.
    SerialOutput(PathBuf),
    /// A file that lines are added to: created, or continued.
    Log(PathBuf),
}

impl fmt::Display for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("/dev/kvm"),
            Self::Tun => f.write_str("/dev/net/tun"),
            Self::Userfault => f.write_str("/dev/userfaultfd"),
            Self::VhostNet => f.write_str("/dev/vhost-net"),
            Self::BootFile(path) | Self::SerialOutput(path) | Self::Log(path) | Self::Disk { path, .. } => {
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

    /// Starts a program that is to work for the VM, as a child of whoever holds the rights.
    ///
    /// # Errors
    /// `NotFound` when it is not installed.
    fn start(&self, program: &mut Command) -> io::Result<Child>;

    /// Listens on a unix socket at `path`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when somebody does, or the path is something else.
    fn listen(&self, path: &Path) -> io::Result<UnixListener>;

    /// Connects to a unix socket.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when nobody listens there.
    fn connect(&self, path: &Path) -> io::Result<UnixStream>;
}

/// Opens files with the rights of this process.
pub struct OpenDirectly;

impl HostFiles for OpenDirectly {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        // Everything is opened close-on-exec, as std does. O_NONBLOCK keeps a path that turns out to be a FIFO
        // from hanging the start; it means nothing to regular files and block devices.
        let mut options = OpenOptions::new();
        match file {
            HostFile::Kvm | HostFile::Tun | HostFile::Userfault | HostFile::VhostNet => {
                options.read(true).write(true).open(file.to_string())
            }
            HostFile::BootFile(path) => options.read(true).custom_flags(libc::O_NONBLOCK).open(path),
            HostFile::Disk { path, read_only } => {
                options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path)
            }
            // A FIFO's reader may come later, and lines get lost until then.
            HostFile::Log(path) => {
                options.read(true).append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)
            }
            HostFile::SerialOutput(path) => {
                options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
                let file = options.open(path)?;
                // Only the opening was not to wait (for the reader of a FIFO, say); the guest waits for its output.
                rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - rustix::fs::OFlags::NONBLOCK)?;
                Ok(file)
            }
        }
    }

    fn start(&self, program: &mut Command) -> io::Result<Child> {
        program.spawn()
    }

    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        UnixStream::connect(path)
    }

    fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                // Connecting to what is no socket at all is refused just the same.
                let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
                let refused = || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
                if !is_socket || !refused() {
                    return Err(error);
                }
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = OpenDirectly.listen(&path).unwrap();
        assert_eq!(OpenDirectly.listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        OpenDirectly.listen(&path).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        OpenDirectly.listen(&file).unwrap_err();
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
}
