//! The one door through which host resources come in.
//!
//! The machine never touches a path itself: it asks for a [`HostFile`] and gets a descriptor, or has a [`Deed`] done.
//! Unjailed, that happens on the spot; a jailed machine asks a parent that holds the rights.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::kernel_cache::KernelCache;
use super::passt::{self, PasstError};
use super::tap::{self, TapError, TapQueue};
use crate::config::UserNetwork;
use crate::memory::userfault::process_of_peer;
use crate::shelf;

/// A file that a VM can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostFile {
    Kvm,
    /// A kernel or initrd: read only.
    BootFile(PathBuf),
    Disk {
        path: PathBuf,
        read_only: bool,
    },
    /// `/dev/userfaultfd`.
    Userfault,
    /// `/dev/vhost-net`, without an owner.
    VhostNet,
    /// A file the serial port writes to: created, or emptied.
    SerialOutput(PathBuf),
    /// A file that lines are added to: created, or continued.
    Log(PathBuf),
    /// Something of ours to read: a description, a part of a snapshot. Also a directory, to lock it or have it on stable
    /// storage.
    Read(PathBuf),
    /// A file that is not there yet, to write and read.
    New(PathBuf),
    /// A file to write and read: created, or emptied.
    Replacement(PathBuf),
    /// A file without a name in this directory, to write and read.
    Nameless(PathBuf),
    /// What is at a path, whatever it is: neither to read nor to write.
    Place(PathBuf),
}

impl HostFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Kvm => Path::new("/dev/kvm"),
            Self::Userfault => Path::new("/dev/userfaultfd"),
            Self::VhostNet => Path::new("/dev/vhost-net"),
            Self::BootFile(path)
            | Self::SerialOutput(path)
            | Self::Log(path)
            | Self::Read(path)
            | Self::New(path)
            | Self::Replacement(path)
            | Self::Nameless(path)
            | Self::Place(path)
            | Self::Disk { path, .. } => path,
        }
    }
}

impl fmt::Display for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path().display())
    }
}

/// What a VM can have done to names of files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Deed {
    MakeDir(PathBuf),
    /// The directory goes to a name that nothing has, and that is on stable storage then.
    Place {
        from: PathBuf,
        to: PathBuf,
    },
    /// The file goes to a name, in the place of what has it; that is on stable storage then.
    Replace {
        from: PathBuf,
        to: PathBuf,
    },
    /// The same of the state of a snapshot in two files.
    ReplaceState {
        from: PathBuf,
        to: PathBuf,
    },
    RemoveFile(PathBuf),
    RemoveTree(PathBuf),
    /// Nobody is to write to the file any more.
    MakeReadOnly(PathBuf),
}

/// Something that a VM may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Right {
    Open(HostFile),
    Perform(Deed),
    /// Any name in a directory, and in those below it.
    Below(PathBuf),
    Link(PathBuf),
    Canonical(PathBuf),
    JoinTap(String),
    StartPasst(UserNetwork),
    Listen(PathBuf),
    Connect(PathBuf),
}

impl Right {
    /// The paths that it is about.
    pub fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Self::Open(HostFile::Kvm | HostFile::Userfault | HostFile::VhostNet)
            | Self::JoinTap(_)
            | Self::StartPasst(_) => Vec::new(),
            Self::Open(
                HostFile::BootFile(path)
                | HostFile::Disk { path, .. }
                | HostFile::SerialOutput(path)
                | HostFile::Log(path)
                | HostFile::Read(path)
                | HostFile::New(path)
                | HostFile::Replacement(path)
                | HostFile::Nameless(path)
                | HostFile::Place(path),
            )
            | Self::Perform(
                Deed::MakeDir(path) | Deed::RemoveFile(path) | Deed::RemoveTree(path) | Deed::MakeReadOnly(path),
            )
            | Self::Below(path)
            | Self::Link(path)
            | Self::Canonical(path)
            | Self::Listen(path)
            | Self::Connect(path) => vec![path],
            Self::Perform(Deed::Place { from, to } | Deed::Replace { from, to } | Deed::ReplaceState { from, to }) => {
                vec![from, to]
            }
        }
    }
}

/// Another process that we are connected to.
#[derive(Debug)]
pub struct Peer {
    pub socket: UnixStream,
    /// To wait for its end, if we may know who it is.
    pub process: Option<OwnedFd>,
}

/// Turns names into descriptors. What a host does not have, it refuses.
pub trait HostFiles: Send + Sync {
    /// # Errors
    /// Whatever the host says about the file.
    fn open(&self, file: &HostFile) -> io::Result<File>;

    /// Opens what is open already once more, with none of the locks on it; to write only if it is open so.
    ///
    /// # Errors
    /// The host's.
    fn open_again(&self, _file: &File, _read_only: bool) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// # Errors
    /// The host's.
    fn perform(&self, _deed: &Deed) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Gives an open file one more name, on its own file system.
    ///
    /// # Errors
    /// The host's.
    fn link(&self, _file: &File, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A path without symbolic links.
    ///
    /// # Errors
    /// The host's.
    fn canonical(&self, _path: &Path) -> io::Result<PathBuf> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Joins a tap by one queue, of `several`.
    ///
    /// # Errors
    /// What is wrong with the tap.
    fn join_tap(&self, name: &str, _several: bool) -> Result<TapQueue, TapError> {
        Err(TapError::NoSuchTap(name.into()))
    }

    /// Where a path leads that may begin where this program was started.
    fn absolute(&self, path: &Path) -> PathBuf {
        std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
    }

    /// Has no use for something any more: it may be asked for when somebody has named it anew.
    fn let_go(&self, _right: &Right) {}

    /// Starts passt, as a child of whoever holds the rights.
    ///
    /// # Errors
    /// `Start` with `NotFound` when it is not installed.
    fn start_passt(&self, _network: &UserNetwork, _mtu: u16) -> Result<passt::Process, PasstError> {
        Err(PasstError::Start(io::ErrorKind::Unsupported.into()))
    }

    /// Listens on a unix socket at `path`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when somebody does, or the path is something else.
    fn listen(&self, path: &Path) -> io::Result<UnixListener>;

    /// Connects to a unix socket.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when nobody listens there.
    fn connect(&self, path: &Path) -> io::Result<Peer>;

    /// Where unpacked kernels are kept.
    fn kernel_cache(&self) -> KernelCache {
        KernelCache::Off
    }
}

/// Does everything with the rights of this process.
pub struct OpenDirectly;

impl HostFiles for OpenDirectly {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        // Everything is opened close-on-exec, as std does. O_NONBLOCK keeps a path that turns out to be a FIFO
        // from hanging the start; it means nothing to regular files and block devices.
        let mut options = OpenOptions::new();
        match file {
            HostFile::Kvm | HostFile::Userfault | HostFile::VhostNet => {
                options.read(true).write(true).open(file.path())
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
                rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
                Ok(file)
            }
            HostFile::Read(path) => options.read(true).custom_flags(libc::O_NONBLOCK).open(path),
            HostFile::New(path) => options.read(true).write(true).create_new(true).open(path),
            HostFile::Replacement(path) => options.read(true).write(true).create(true).truncate(true).open(path),
            HostFile::Nameless(dir) => nameless(dir),
            HostFile::Place(path) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?.into())
            }
        }
    }

    fn open_again(&self, file: &File, read_only: bool) -> io::Result<File> {
        // Nothing is to become more than it is, also where the file's owner asks for it.
        let flags = rustix::fs::fcntl_getfl(file)?;
        let is_open_so = match flags & OFlags::RWMODE {
            OFlags::RDWR => true,
            OFlags::RDONLY => read_only,
            _ => false,
        };
        if !is_open_so || flags.intersects(OFlags::PATH | OFlags::APPEND) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(descriptor(file))
    }

    fn perform(&self, deed: &Deed) -> io::Result<()> {
        match deed {
            Deed::MakeDir(path) => fs::create_dir(path),
            Deed::Place { from, to } => {
                shelf::rename_to_free(from, to)?;
                shelf::sync_parent(to)
            }
            Deed::Replace { from, to } | Deed::ReplaceState { from, to } => {
                fs::rename(from, to)?;
                shelf::sync_parent(to)
            }
            Deed::RemoveFile(path) => fs::remove_file(path),
            Deed::RemoveTree(path) => fs::remove_dir_all(path),
            Deed::MakeReadOnly(path) => {
                let mode = fs::metadata(path)?.permissions().mode();
                fs::set_permissions(path, fs::Permissions::from_mode(mode & !0o222))
            }
        }
    }

    fn link(&self, file: &File, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::linkat(CWD, descriptor(file), CWD, path, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        path.canonicalize()
    }

    fn join_tap(&self, name: &str, several: bool) -> Result<TapQueue, TapError> {
        tap::join(name, several)
    }

    fn start_passt(&self, network: &UserNetwork, mtu: u16) -> Result<passt::Process, PasstError> {
        passt::spawn(network, mtu)
    }

    fn connect(&self, path: &Path) -> io::Result<Peer> {
        let socket = connect_at_once(path)?;
        socket.set_nonblocking(false)?;
        let process = process_of_peer(&socket);
        Ok(Peer { socket, process })
    }

    fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                // Connecting to what is no socket at all is refused just the same.
                let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
                let refused = || connect_at_once(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
                if !is_socket || !refused() {
                    return Err(error);
                }
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            result => result,
        }
    }

    fn kernel_cache(&self) -> KernelCache {
        KernelCache::of_user()
    }
}

/// Connects without waiting: whoever listens there, and has as many clients waiting as there may be, is somebody.
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// The files of this process, by their descriptors.
pub const DESCRIPTORS: &str = "/proc/self/fd";

fn descriptor(file: impl AsFd) -> PathBuf {
    Path::new(DESCRIPTORS).join(file.as_fd().as_raw_fd().to_string())
}

/// Makes a file that nobody else finds.
fn nameless(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
        // A file system on which all files have names, at first.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let name = dir.join(format!(".tranche.{:016x}", u64::from_ne_bytes(random)));
            let file = options.create_new(true).open(&name)?;
            fs::remove_file(name)?;
            Ok(file)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_opened_again_is_no_more_than_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "content").unwrap();
        let open = |file: HostFile| OpenDirectly.open(&file).unwrap();
        let again = |file: &File, read_only| OpenDirectly.open_again(file, read_only).is_ok();
        let disk = |read_only| open(HostFile::Disk { path: path.clone(), read_only });
        assert!(again(&disk(false), false) && again(&disk(false), true) && again(&disk(true), true));
        assert!(!again(&disk(true), false));
        for less in [HostFile::Log(path.clone()), HostFile::Place(path.clone()), HostFile::SerialOutput(path.clone())] {
            let file = open(less.clone());
            assert!(!again(&file, true) && !again(&file, false), "{less:?}");
        }
    }

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
