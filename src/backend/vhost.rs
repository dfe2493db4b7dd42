//! vhost-net: the host's kernel moves frames between a pair of rings and a tap by itself.
//!
//! One descriptor serves one pair; within it ring 0 receives and ring 1 sends. The kernel checks the rings and all
//! that is in them; it reaches no memory but that of [`VhostNet::set_memory`].

#![expect(unsafe_code, reason = "ioctls that take addresses and descriptors")]

use std::ffi::{c_int, c_uint};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::host::{HostFile, HostFiles};
use crate::memory::Ram;

#[derive(Debug, Error)]
pub enum VhostError {
    #[error("cannot open /dev/vhost-net")]
    Open(#[source] io::Error),
    #[error("/dev/vhost-net does not tell its features")]
    Features(#[source] io::Error),
}

impl VhostError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Open(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Some("join the group that owns it (often kvm), or leave out vhost=on")
            }
            Self::Open(_) => Some("load the driver: modprobe vhost_net, or leave out vhost=on"),
            Self::Features(_) => Some("leave out vhost=on"),
        }
    }
}

/// Where a ring is, as addresses of this process.
struct RingAddresses {
    descriptors: u64,
    avail: u64,
    used: u64,
}

/// A ring to be served, and open eventfds, which the kernel then keeps.
pub struct Ring {
    pub size: u16,
    /// Guest physical addresses.
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
    /// The available index to go on from.
    pub next_avail: u16,
    /// Signalled by the driver.
    pub kick: RawFd,
    /// Signalled for the driver when there are used buffers it wants to hear of.
    pub call: RawFd,
    /// Signalled when the driver has broken the ring.
    pub error: RawFd,
}

/// An open `/dev/vhost-net`.
pub struct VhostNet {
    device: Device,
    features: u64,
    owned: bool,
    /// What the kernel was told of, and so must stay.
    ram: Option<Ram>,
}

impl VhostNet {
    /// # Errors
    /// When the host does not have it or keeps it from this user.
    pub fn open(files: &dyn HostFiles) -> Result<Self, VhostError> {
        let file = files.open(&HostFile::VhostNet).map_err(VhostError::Open)?;
        let device = Device(Arc::new(file));
        let mut features = 0u64;
        device.ioctl(request::GET_FEATURES, &mut features).map_err(VhostError::Features)?;
        Ok(Self { device, features, owned: false, ram: None })
    }

    /// The feature bits it knows. Those of the tap are not among them: checksums and segmentation.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Before rings start under new features or in other memory. No ring may be running.
    ///
    /// The first call makes the kernel's thread.
    pub fn prepare(&mut self, features: u64, ram: &Ram) -> io::Result<()> {
        if !self.owned {
            // SAFETY: no argument.
            check(unsafe { libc::ioctl(self.device.0.as_raw_fd(), request::SET_OWNER) })?;
            self.owned = true;
        }
        self.device.ioctl(request::SET_FEATURES, &mut (features & self.features))?;
        if self.ram.as_ref().is_none_or(|old| !Arc::ptr_eq(old, ram)) {
            self.set_memory(ram)?;
            self.ram = Some(ram.clone());
        }
        Ok(())
    }

    /// `struct vhost_memory`: a count, then start, length and address of each region, and a zero.
    fn set_memory(&self, ram: &Ram) -> io::Result<()> {
        let mut table = vec![ram.iter().count() as u64];
        for region in ram.iter() {
            table.extend([region.start_addr().0, region.len(), region.as_ptr() as u64, 0]);
        }
        // SAFETY: the table is as long as its count says.
        check(unsafe { libc::ioctl(self.device.0.as_raw_fd(), request::SET_MEM_TABLE, table.as_mut_ptr()) })
    }

    /// Starts ring 0 or 1 on a tap. When this fails, nothing runs.
    pub fn start(&self, index: u32, ring: &Ring, tap: BorrowedFd<'_>) -> io::Result<()> {
        let started = self.try_start(index, ring, tap);
        if started.is_err() {
            let _ = self.stop(index);
        }
        started
    }

    fn try_start(&self, index: u32, ring: &Ring, tap: BorrowedFd<'_>) -> io::Result<()> {
        let at = self.addresses(ring)?;
        self.device.ioctl(request::SET_VRING_NUM, &mut State { index, number: ring.size.into() })?;
        self.device.ioctl(request::SET_VRING_BASE, &mut State { index, number: ring.next_avail.into() })?;
        let (descriptors, avail, used) = (at.descriptors, at.avail, at.used);
        self.device
            .ioctl(request::SET_VRING_ADDR, &mut Addresses { index, flags: 0, descriptors, used, avail, log: 0 })?;
        self.device.set_fd(request::SET_VRING_ERR, index, Some(ring.error))?;
        self.device.set_fd(request::SET_VRING_CALL, index, Some(ring.call))?;
        self.device.set_fd(request::SET_VRING_KICK, index, Some(ring.kick))?;
        self.device.set_fd(request::NET_SET_BACKEND, index, Some(tap.as_raw_fd()))
    }

    /// Stops a ring after the request in hand; returns the available index it has come to.
    pub fn stop(&self, index: u32) -> io::Result<u16> {
        self.device.set_fd(request::NET_SET_BACKEND, index, None)?;
        for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            self.device.set_fd(request, index, None)?;
        }
        let mut state = State { index, number: 0 };
        self.device.ioctl(request::GET_VRING_BASE, &mut state)?;
        Ok(state.number as u16)
    }

    fn addresses(&self, ring: &Ring) -> io::Result<RingAddresses> {
        let ram = self.ram.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let size = usize::from(ring.size);
        // Each ends in a field for event indices, used or not (virtio 1.2, 2.7).
        let host = |addr, len| {
            let slice = ram.get_slice(GuestAddress(addr), len).map_err(|_| io::ErrorKind::InvalidInput)?;
            Ok::<_, io::Error>(slice.ptr_guard().as_ptr() as u64)
        };
        Ok(RingAddresses {
            descriptors: host(ring.descriptors, 16 * size)?,
            avail: host(ring.avail, 6 + 2 * size)?,
            used: host(ring.used, 6 + 8 * size)?,
        })
    }

    /// What stops a ring from any thread.
    #[must_use]
    pub fn silencer(&self, index: u32) -> Silencer {
        Silencer { device: self.device.clone(), index }
    }
}

/// See [`VhostNet::silencer`].
pub struct Silencer {
    device: Device,
    index: u32,
}

impl Silencer {
    /// Nothing is done with the ring any more when this returns.
    pub fn silence(&self) {
        if let Err(error) = self.device.set_fd(request::NET_SET_BACKEND, self.index, None) {
            tracing::error!("vhost does not leave a ring alone: {error}");
        }
    }
}

#[derive(Clone)]
struct Device(Arc<File>);

impl Device {
    fn set_fd(&self, request: libc::Ioctl, index: u32, fd: Option<RawFd>) -> io::Result<()> {
        self.ioctl(request, &mut Descriptor { index, fd: fd.unwrap_or(-1) })
    }

    /// An ioctl of those here that read or write one `T`.
    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: the callers, all in this file, pair each request with the type it reads or writes. What memory the
        // kernel works on later is that of `VhostNet::ram`.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) })
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct vhost_vring_state`
#[repr(C)]
struct State {
    index: c_uint,
    number: c_uint,
}

/// `struct vhost_vring_file`
#[repr(C)]
struct Descriptor {
    index: c_uint,
    fd: c_int,
}

/// `struct vhost_vring_addr`
#[repr(C)]
struct Addresses {
    index: c_uint,
    flags: c_uint,
    descriptors: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// Those of `linux/vhost.h`.
mod request {
    use super::{Addresses, Descriptor, State};

    const VHOST: u32 = 0xaf;

    pub const GET_FEATURES: libc::Ioctl = libc::_IOR::<u64>(VHOST, 0x00);
    pub const SET_FEATURES: libc::Ioctl = libc::_IOW::<u64>(VHOST, 0x00);
    pub const SET_OWNER: libc::Ioctl = libc::_IO(VHOST, 0x01);
    /// The size is that of an empty table.
    pub const SET_MEM_TABLE: libc::Ioctl = libc::_IOW::<u64>(VHOST, 0x03);
    pub const SET_VRING_NUM: libc::Ioctl = libc::_IOW::<State>(VHOST, 0x10);
    pub const SET_VRING_ADDR: libc::Ioctl = libc::_IOW::<Addresses>(VHOST, 0x11);
    pub const SET_VRING_BASE: libc::Ioctl = libc::_IOW::<State>(VHOST, 0x12);
    pub const GET_VRING_BASE: libc::Ioctl = libc::_IOWR::<State>(VHOST, 0x12);
    pub const SET_VRING_KICK: libc::Ioctl = libc::_IOW::<Descriptor>(VHOST, 0x20);
    pub const SET_VRING_CALL: libc::Ioctl = libc::_IOW::<Descriptor>(VHOST, 0x21);
    pub const SET_VRING_ERR: libc::Ioctl = libc::_IOW::<Descriptor>(VHOST, 0x22);
    pub const NET_SET_BACKEND: libc::Ioctl = libc::_IOW::<Descriptor>(VHOST, 0x30);
}
