//! Memory whose pages another process gives, the first time that they are looked at: Firecracker's page fault handlers.
//!
//! The handler listens on a unix socket. It gets one message: a JSON list of where the guest's memory lies in our address
//! space and in the file of the snapshot, and the descriptor of a userfaultfd. From then on it serves our faults.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::SendFlags;
use serde::Serialize;
use thiserror::Error;

use super::events::EventQueue;
use super::lifecycle::End;
use crate::backend::host::Peer;
use crate::backend::{HostFile, HostFiles, descriptors};
use crate::memory::RamRegions;
use crate::memory::userfault::{Mapping, Userfault};
use crate::threads::{self, Kind};

#[derive(Debug, Error)]
pub enum PagerError {
    #[error("cannot reach who gives the pages of memory, at {}", path.display())]
    Reach { path: PathBuf, source: io::Error },
    #[error(
        "this host gives us no userfaultfd: it takes root, the right to open /dev/userfaultfd, or \
         'sysctl vm.unprivileged_userfaultfd=1'"
    )]
    NotAllowed(#[source] io::Error),
    #[error("cannot have the pages of memory asked for")]
    Register(#[source] io::Error),
    #[error("who gives the pages of memory takes no message")]
    HandOver(#[source] io::Error),
}

/// A handler that has been reached, and has not been told of any memory yet.
#[derive(Debug)]
pub struct OpenPager {
    handler: Peer,
    userfault: Userfault,
}

/// What the handler is told of a region; the names are Firecracker's.
#[derive(Serialize)]
struct Told {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes, too, and deprecated there.
    page_size_kib: u64,
}

impl From<Mapping> for Told {
    fn from(Mapping { host, size, offset, page_size }: Mapping) -> Self {
        Self { base_host_virt_addr: host, size, offset, page_size, page_size_kib: page_size }
    }
}

impl OpenPager {
    /// # Errors
    /// When nobody listens there, or the host does not allow such a thing.
    pub fn open(path: &Path, host: &dyn HostFiles) -> Result<Self, PagerError> {
        let handler = host.connect(path).map_err(|source| PagerError::Reach { path: path.to_owned(), source })?;
        let userfault = match host.open(&HostFile::Userfault) {
            Ok(device) => Userfault::of_device(&device),
            // Older kernels have no such device.
            Err(_) => Userfault::of_right(),
        };
        Ok(Self { handler, userfault: userfault.map_err(PagerError::NotAllowed)? })
    }

    /// Hands over RAM that nobody has touched. If the handler ends before the VM, that is the VM's end.
    pub(super) fn hand_over(self, ram: &RamRegions, events: &Arc<EventQueue>) -> Result<Pager, PagerError> {
        let mappings = self.userfault.register(ram).map_err(PagerError::Register)?;
        let told: Vec<Told> = mappings.into_iter().map(Told::from).collect();
        let text = serde_json::to_vec(&told).map_err(|error| PagerError::HandOver(error.into()))?;
        // It does not come in pieces: a stream's message of this size never does.
        descriptors::send(&self.handler.socket, &text, &[self.userfault.as_fd()], SendFlags::empty())
            .map_err(PagerError::HandOver)?;
        Pager::watch(self, events.clone()).map_err(PagerError::HandOver)
    }
}

/// A handler at work.
pub struct Pager {
    /// Kept for as long as there are faults: without any descriptor of it, pages would be zeroes.
    _userfault: Userfault,
    stop: Arc<OwnedFd>,
}

/// How long the owner has to bring things to an end, before it is taken for one that waits for a page itself.
const PATIENCE: Duration = Duration::from_secs(3);

impl Pager {
    fn watch(open: OpenPager, events: Arc<EventQueue>) -> io::Result<Self> {
        let OpenPager { handler: Peer { socket, process }, userfault } = open;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        threads::spawn(Kind::Main, "pager", None, move || {
            // It may hang up and go on serving. One whose process we cannot see is trusted to.
            let gone = wait_for(socket.as_fd(), PollFlags::RDHUP, &stopped)
                && process.is_some_and(|process| wait_for(process.as_fd(), PollFlags::IN, &stopped));
            if gone {
                events.end(End::MemoryLost);
                std::thread::sleep(PATIENCE);
                // Still here: who would end it all needs a page that nobody will ever give.
                tracing::error!("the process that gave the guest's memory has ended");
                std::process::abort();
            }
        })?;
        Ok(Self { _userfault: userfault, stop })
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// Waits for something; false if it is not waited for any more.
fn wait_for(what: impl AsFd, event: PollFlags, stop: &OwnedFd) -> bool {
    loop {
        let mut fds = [PollFd::new(&what, event), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        if !fds[1].revents().is_empty() {
            return false;
        }
        if !fds[0].revents().is_empty() {
            return true;
        }
    }
}
