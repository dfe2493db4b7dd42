//! The host as a jailed VMM sees it: a parent that it can ask.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::SendFlags;

use super::wire::{self, Ask, Given, Received};
use crate::backend::host::{DESCRIPTORS, Peer};
use crate::backend::kernel_cache::{Key, UnpackedKernels};
use crate::backend::tap::TapQueue;
use crate::backend::{Deed, HostFile, HostFiles, KernelCache, OpenDirectly, PasstError, Right, TapError, passt};
use crate::config::UserNetwork;

/// Asks a parent.
#[derive(Clone)]
pub struct AskParent(Arc<Line>);

struct Line {
    socket: OwnedFd,
    /// Where paths begin, on the other side of the wall.
    directory: PathBuf,
    /// One question at a time.
    turn: Mutex<()>,
}

impl AskParent {
    #[must_use]
    pub fn new(socket: OwnedFd, directory: PathBuf) -> Self {
        Self(Arc::new(Line { socket, directory, turn: Mutex::new(()) }))
    }

    /// Asks for something; what is refused is an error.
    ///
    /// # Errors
    /// The parent's, or the host's.
    pub fn ask(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> io::Result<(Given, Received)> {
        let _turn = self.0.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let exchange = wire::send(&self.0.socket, ask, fd.as_slice(), SendFlags::empty());
        let received = match exchange.and_then(|()| wire::receive(&self.0.socket)) {
            Ok(Some(received)) => received,
            // Too long to be sent.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => return Err(error),
            // Without a parent it is about to be killed, and is not to complain about that.
            Ok(None) | Err(_) => std::process::exit(1),
        };
        match received.parse()? {
            Given::Failed(error) => Err(error),
            given => Ok((given, received)),
        }
    }

    fn fd(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
        self.ask(ask, fd)?.1.fd()
    }
}

/// The descriptor of this process that a path below [`DESCRIPTORS`] names.
fn own_descriptor(path: &Path) -> Option<io::Result<OwnedFd>> {
    let number = path.strip_prefix(DESCRIPTORS).ok()?.to_str()?.parse().ok()?;
    // A path as the snapshot's overlays have it, of a file that is open as long as its disk.
    Some(duplicate(number))
}

#[expect(unsafe_code, reason = "a descriptor that is known by its number alone")]
fn duplicate(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes any number, and its result is checked before it is owned.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    // SAFETY: a fresh descriptor that nobody else owns.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

impl HostFiles for AskParent {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        if let HostFile::Disk { path, read_only } = file
            && let Some(open) = own_descriptor(path)
        {
            return self.open_again(&open?.into(), *read_only);
        }
        self.fd(&Ask::Open(file.clone()), None).map(File::from)
    }

    fn open_again(&self, file: &File, read_only: bool) -> io::Result<File> {
        self.fd(&Ask::OpenAgain { read_only }, Some(file.as_fd())).map(File::from)
    }

    fn perform(&self, deed: &Deed) -> io::Result<()> {
        self.ask(&Ask::Perform(deed.clone()), None).map(drop)
    }

    fn link(&self, file: &File, path: &Path) -> io::Result<()> {
        self.ask(&Ask::Link(path.to_owned()), Some(file.as_fd())).map(drop)
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        match self.ask(&Ask::Canonical(path.to_owned()), None)?.0 {
            Given::Path(path) => Ok(path),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn join_tap(&self, name: &str, several: bool) -> Result<TapQueue, TapError> {
        let ask = Ask::JoinTap { name: name.into(), several };
        match self.ask(&ask, None).map_err(TapError::Open)? {
            (Given::Tap(mtu), mut received) => {
                Ok(TapQueue { file: received.fd().map_err(TapError::Open)?.into(), mtu })
            }
            (Given::TapFailed(error), _) => Err(error),
            _ => Err(TapError::Open(io::ErrorKind::InvalidData.into())),
        }
    }

    fn absolute(&self, path: &Path) -> PathBuf {
        OpenDirectly.absolute(&self.0.directory.join(path))
    }

    fn let_go(&self, right: &Right) {
        let _ = self.ask(&Ask::LetGo(right.clone()), None);
    }

    fn start_passt(&self, network: &UserNetwork, mtu: u16) -> Result<passt::Process, PasstError> {
        let ask = Ask::StartPasst { network: network.clone(), mtu };
        match self.ask(&ask, None).map_err(PasstError::Start)? {
            (Given::PasstFailed(error), _) => Err(error),
            (_, mut received) => {
                let socket = UnixStream::from(received.fd().map_err(PasstError::Connect)?);
                let complaints = PipeReader::from(received.fd().map_err(PasstError::Connect)?);
                Ok(passt::Process { socket, complaints, child: None })
            }
        }
    }

    fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        self.fd(&Ask::Listen(path.to_owned()), None).map(UnixListener::from)
    }

    fn connect(&self, path: &Path) -> io::Result<Peer> {
        let mut received = self.ask(&Ask::Connect(path.to_owned()), None)?.1;
        Ok(Peer { socket: received.fd()?.into(), process: received.fd().ok() })
    }

    fn kernel_cache(&self) -> KernelCache {
        KernelCache::Asked(Arc::new(self.clone()))
    }
}

impl AskParent {
    fn kernel(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> Option<(File, u64)> {
        match self.ask(ask, fd).ok()? {
            (Given::Kernel(bytes), mut received) => Some((received.fd().ok()?.into(), bytes)),
            _ => None,
        }
    }
}

impl UnpackedKernels for AskParent {
    fn find_by_file(&self, bzimage: &File) -> Option<(File, u64)> {
        self.kernel(&Ask::FindKernelByFile, Some(bzimage.as_fd()))
    }

    fn find(&self, key: &Key) -> Option<(File, u64)> {
        self.kernel(&Ask::FindKernel(key.clone()), None)
    }

    fn insert(&self, key: &Key, unpacked: &File) -> bool {
        matches!(self.ask(&Ask::KeepKernel(key.clone()), Some(unpacked.as_fd())), Ok((Given::Done, _)))
    }

    fn remember(&self, bzimage: &File, key: &Key) {
        let _ = self.ask(&Ask::RememberKernel(key.clone()), Some(bzimage.as_fd()));
    }
}
