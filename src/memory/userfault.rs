//! Linux's userfaultfd: a page that is not there yet is asked for by a message, and whoever holds the descriptor gives
//! it. (Linux, admin-guide/mm/userfaultfd.rst.)

#![expect(unsafe_code, reason = "ioctls, and a system call that std does not have")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemoryBackend;

use super::{PAGE_SIZE, RamRegions};

/// A descriptor that faults are told on. It may be shared with another process; while one of them has it, no page is
/// filled without it.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

/// Where a region lies in our address space, and in the file of the saved memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    pub host: u64,
    pub size: u64,
    pub offset: u64,
    pub page_size: u64,
}

/// `struct uffdio_api` (Linux, uapi/linux/userfaultfd.h).
#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// Faults of KVM count too, so it is not for user mode alone.
const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

impl Userfault {
    /// Of `/dev/userfaultfd`: who may open it, may do this.
    ///
    /// # Errors
    /// The host's.
    pub fn of_device(device: &File) -> io::Result<Self> {
        // SAFETY: this ioctl takes flags, and touches no memory of ours.
        Self::new(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) })
    }

    /// Without a device, for those who have the right.
    ///
    /// # Errors
    /// The host's.
    pub fn of_right() -> io::Result<Self> {
        // SAFETY: this call takes flags, and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
        Self::new(fd.try_into().unwrap_or(-1))
    }

    fn new(fd: libc::c_int) -> io::Result<Self> {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and ours.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = Api { api: UFFD_API, ..Api::default() };
        // SAFETY: the argument is as the kernel declares it.
        this.check(unsafe { libc::ioctl(this.0.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(this)
    }

    /// Has all pages of RAM asked for that are not there yet. Returns where its regions are.
    ///
    /// # Errors
    /// The host's.
    pub fn register(&self, ram: &RamRegions) -> io::Result<Vec<Mapping>> {
        let mut mappings = Vec::new();
        let mut offset = 0;
        for region in ram.iter() {
            let (host, size) = (region.as_ptr() as u64, region.size() as u64);
            let mut register =
                Register { start: host, len: size, mode: UFFDIO_REGISTER_MODE_MISSING, ..Register::default() };
            // SAFETY: the argument is as the kernel declares it; the range is RAM, whose contents are for others to say.
            self.check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })?;
            mappings.push(Mapping { host, size, offset, page_size: PAGE_SIZE });
            offset += size;
        }
        Ok(mappings)
    }

    fn check(&self, result: libc::c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The process that listens at the other end, as a descriptor that is readable once it has ended; none where its number
/// means nothing to us.
#[must_use]
pub fn process_of_peer(stream: &UnixStream) -> Option<OwnedFd> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: there is room for as much as it is told.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len)
    };
    let pid = rustix::process::Pid::from_raw(peer.pid).filter(|_| result == 0)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}
