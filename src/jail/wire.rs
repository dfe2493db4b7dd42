//! What goes between a VMM and the parent that holds the rights: one message asks, one answers, with descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{RecvFlags, SendFlags, recv};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::backend::kernel_cache::Key;
use crate::backend::{Deed, HostFile, PasstError, Right, TapError, descriptors, io_error};
use crate::config::UserNetwork;
use crate::control::{Disks, NextSize};

/// Most bytes of a message: a network with a thousand forwarded ports.
pub const LONGEST: usize = 64 << 10;

/// What a VMM asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    Open(HostFile),
    /// With the descriptor.
    OpenAgain {
        read_only: bool,
    },
    Perform(Deed),
    /// With the file's descriptor.
    Link(PathBuf),
    Canonical(PathBuf),
    JoinTap {
        name: String,
        several: bool,
    },
    StartPasst {
        network: UserNetwork,
        mtu: u16,
    },
    Listen(PathBuf),
    Connect(PathBuf),
    /// With the bzImage's descriptor.
    FindKernelByFile,
    FindKernel(Key),
    /// With the unpacked kernel's descriptor.
    KeepKernel(Key),
    /// With the bzImage's descriptor.
    RememberKernel(Key),
    LetGo(Right),
    /// The guest is about to run: what has not been asked for by now has to be named by somebody else.
    Freeze(Disks),
    /// The VM runs.
    Started,
    /// What a client wants it to be from its next start on.
    KeepSize(NextSize),
    /// It is about to tell how it has ended.
    Ending,
    /// It has come to its end.
    Ended {
        code: u8,
        reason: String,
    },
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
pub enum Given {
    /// And a descriptor, or two, if there are to be some.
    Done,
    Path(PathBuf),
    /// A tap's MTU.
    Tap(u16),
    /// Bytes of an unpacked kernel.
    Kernel(u64),
    /// There is no such thing.
    Nothing,
    Failed(#[serde(with = "io_error")] io::Error),
    TapFailed(TapError),
    PasstFailed(PasstError),
}

/// # Errors
/// When nobody listens any more; `WouldBlock` if it is not to wait and would have to.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    descriptors::send(socket, &text, fds, flags)
}

/// What came: bytes, and descriptors.
#[derive(Debug, Default)]
pub struct Received {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Received {
    /// # Errors
    /// When it is no such thing.
    pub fn parse<T: DeserializeOwned>(&self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.bytes)?)
    }

    /// The next descriptor.
    ///
    /// # Errors
    /// When none came.
    pub fn fd(&mut self) -> io::Result<OwnedFd> {
        if self.fds.is_empty() { Err(io::ErrorKind::InvalidData.into()) } else { Ok(self.fds.remove(0)) }
    }
}

/// Waits for a message; none at the end of all.
///
/// # Errors
/// When it is longer than messages are.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Received>> {
    // Its length first: few are long, and room for one that is would be there in two processes all the time.
    let length = loop {
        match recv(&socket, &mut [0; 0], RecvFlags::PEEK | RecvFlags::TRUNC) {
            // The latter once, of who ended without having taken in what he was sent. What he said himself comes after it.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => {}
            peeked => break peeked?.1,
        }
    };
    if length > LONGEST {
        return Err(io::Error::other("a message that is too long"));
    }
    let mut bytes = vec![0; length];
    let (count, fds) = descriptors::receive(socket, &mut bytes, RecvFlags::empty())?;
    bytes.truncate(count);
    Ok((!bytes.is_empty()).then_some(Received { bytes, fds }))
}
