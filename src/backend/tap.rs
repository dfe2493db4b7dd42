//! A tap interface: Ethernet frames in and out of the host's network, each behind a virtio-net header.

#![expect(unsafe_code, reason = "ioctls of tap devices and network interfaces, which rustix lacks")]

use std::borrow::Cow;
use std::ffi::{c_int, c_short, c_uint};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::host::HostFiles;
use super::io_error;
use super::patience::until_free;

/// The header before each frame, in both directions: `virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).
pub const HEADER_BYTES: usize = 12;

#[derive(Debug, Error, Serialize, Deserialize)]
pub enum TapError {
    #[error("cannot open /dev/net/tun")]
    Open(
        #[source]
        #[serde(with = "io_error")]
        io::Error,
    ),
    #[error("{0:?} is no interface name: it has to have 1 to 15 bytes, without spaces or slashes")]
    Name(String),
    #[error("there is no tap interface {0}")]
    NoSuchTap(String),
    #[error("interface {0} is not a tap")]
    NotATap(String),
    #[error("tap {0} is in use by another process")]
    Busy(String),
    #[error("no permission to use tap {0}")]
    Permission(String),
    #[error("tap {0} was made for one queue")]
    OneQueue(String),
    #[error("the host's tun driver lacks {0}")]
    Unsupported(Cow<'static, str>),
    #[error("tap {name}: {what} failed")]
    Ioctl {
        name: String,
        what: Cow<'static, str>,
        #[serde(with = "io_error")]
        source: io::Error,
    },
}

impl TapError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open(error) if error.kind() == io::ErrorKind::NotFound => {
                Some("load the driver: modprobe tun".into())
            }
            Self::NoSuchTap(name) => Some(format!("create it: ip tuntap add dev {name} mode tap user $USER")),
            Self::Permission(name) => {
                Some(format!("its owner is set when it is created: ip tuntap add dev {name} mode tap user $USER"))
            }
            Self::Name(_) => Some("'ip tuntap list' lists the taps there are".into()),
            Self::Busy(_) => Some("a tap serves one VM: create another for this one".into()),
            Self::NotATap(name) => Some(format!("ip -d link show {name} tells what it is")),
            Self::OneQueue(name) => {
                Some(format!("make it anew: ip tuntap add dev {name} mode tap multi_queue user $USER"))
            }
            _ => None,
        }
    }
}

/// What the host may leave undone in the frames it hands over, because the guest will do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksums; the others are nothing without it.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4 and IPv6.
    pub tso4: bool,
    pub tso6: bool,
    /// Segmentation where TCP signals congestion; nothing without one of the two before.
    pub ecn: bool,
    /// Segmentation of UDP over IPv4 and IPv6: the host has both or none (Linux 6.2).
    pub uso: bool,
}

impl Offloads {
    pub const NONE: Self = Self { checksum: false, tso4: false, tso6: false, ecn: false, uso: false };
    pub const ALL: Self = Self { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };

    fn flags(self) -> c_uint {
        let mut flags = 0;
        if self.checksum {
            flags |= libc::TUN_F_CSUM;
            flags |= if self.tso4 { libc::TUN_F_TSO4 } else { 0 };
            flags |= if self.tso6 { libc::TUN_F_TSO6 } else { 0 };
            flags |= if self.ecn && (self.tso4 || self.tso6) { libc::TUN_F_TSO_ECN } else { 0 };
            flags |= if self.uso { libc::TUN_F_USO4 | libc::TUN_F_USO6 } else { 0 };
        }
        flags
    }
}

/// A queue of an existing tap interface; reads and writes of its descriptor move one frame each and never wait.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    mtu: u16,
    offloads: Offloads,
}

impl Tap {
    /// Attaches to the tap called `name` by as many queues; the host spreads flows over them. It has to exist: one
    /// made on the spot would be connected to nothing and vanish with us.
    ///
    /// # Errors
    /// What is wrong with the tap.
    pub fn attach(files: &dyn HostFiles, name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        check_name(name)?;
        let attach = |TapQueue { file, mtu }| {
            let mut tap = Self { file, name: name.into(), mtu, offloads: Offloads::NONE };
            let candidates = [Offloads::ALL, Offloads { uso: false, ..Offloads::ALL }];
            tap.offloads = candidates.into_iter().find(|&all| tap.offload(all).is_ok()).unwrap_or_default();
            tap
        };
        (0..queues).map(|_| files.join_tap(name, queues > 1).map(attach)).collect()
    }

    /// A stand-in that keeps packets apart as a tap does, such as one end of a datagram socket pair.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn from_packets(fd: std::os::fd::OwnedFd, mtu: u16) -> Self {
        Self { file: fd.into(), name: "packets".into(), mtu, offloads: Offloads::NONE }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The largest packet in bytes behind the Ethernet header, as it was when the tap was attached.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// What [`Self::set_offloads`] may choose from.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Chooses what the host leaves to the readers of the frames, on all queues of the tap.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if offloads.flags() & !self.offloads.flags() != 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // A stand-in has nothing to choose.
        if self.offloads == Offloads::NONE { Ok(()) } else { self.offload(offloads) }
    }

    fn offload(&self, offloads: Offloads) -> io::Result<()> {
        let flags = libc::c_ulong::from(offloads.flags());
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as _, flags) })
    }

    /// Has the host hand this queue frames, or none and forget those that wait. Attached, it gets some.
    ///
    /// # Errors
    /// If it is so already, or the tap has one queue.
    pub fn set_active(&self, active: bool) -> io::Result<()> {
        let flags = if active { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = interface_request("");
        request.ifr_ifru.ifru_flags = flags as c_short;
        ioctl(self.as_fd(), libc::TUNSETQUEUE, &mut request)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A descriptor that is a queue of a tap, and the most bytes of a packet in it.
#[derive(Debug)]
pub struct TapQueue {
    pub file: File,
    pub mtu: u16,
}

/// Joins a tap by one queue, of `several`, in the network namespace of this process.
///
/// # Errors
/// What is wrong with it.
pub fn join(name: &str, several: bool) -> Result<TapQueue, TapError> {
    check_name(name)?;
    let socket = any_socket(name)?;
    match rustix::net::netdevice::name_to_index(&socket, name) {
        Ok(_) => {}
        Err(rustix::io::Errno::NODEV) => return Err(TapError::NoSuchTap(name.into())),
        Err(errno) => return Err(failed(name, "looking it up")(errno.into())),
    }
    let file = open()?;
    let fd = file.as_fd();
    let mut driver: c_uint = 0;
    ioctl(fd, libc::TUNGETFEATURES, &mut driver).map_err(failed(name, "reading the driver's features"))?;
    if driver & libc::IFF_VNET_HDR as c_uint == 0 {
        return Err(TapError::Unsupported("virtio-net headers (IFF_VNET_HDR)".into()));
    }
    until_free(|| set_interface(fd, name, several), |error| matches!(error, TapError::Busy(_)))?;
    ioctl(fd, libc::TUNSETVNETHDRSZ, &mut (HEADER_BYTES as c_int))
        .map_err(failed(name, "setting the header's size"))?;
    ioctl(fd, libc::TUNSETVNETLE, &mut 1).map_err(failed(name, "setting the header's byte order"))?;
    rustix::fs::fcntl_setfl(fd, OFlags::RDWR | OFlags::NONBLOCK)
        .map_err(|errno| failed(name, "making it non-blocking")(errno.into()))?;
    let mtu = mtu(socket.as_fd(), name).map_err(failed(name, "reading the MTU"))?;
    Ok(TapQueue { file, mtu })
}

fn open() -> Result<File, TapError> {
    File::options().read(true).write(true).open("/dev/net/tun").map_err(TapError::Open)
}

/// Makes a tap for so many queues in the network namespace of this process, and sets it up. It stays as long as the
/// namespace does.
///
/// # Errors
/// When it is there already and in use, or the host does not let us.
pub fn create(name: &str, queues: u16) -> Result<(), TapError> {
    check_name(name)?;
    let file = open()?;
    set_interface(file.as_fd(), name, queues > 1)?;
    // SAFETY: TUNSETPERSIST takes a number by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 1 as libc::c_ulong) })
        .map_err(failed(name, "keeping it"))?;
    let socket = any_socket(name)?;
    let mut request = interface_request(name);
    ioctl(socket.as_fd(), libc::SIOCGIFFLAGS as _, &mut request).map_err(failed(name, "reading its flags"))?;
    // SAFETY: SIOCGIFFLAGS has filled this member of the union, and any bits make an integer.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as c_short };
    ioctl(socket.as_fd(), libc::SIOCSIFFLAGS as _, &mut request).map_err(failed(name, "setting it up"))
}

/// Is it what the kernel would take? `%` is a pattern there.
fn check_name(name: &str) -> Result<(), TapError> {
    let valid = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'%' | b':');
    match name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(valid) {
        true => Err(TapError::Name(name.into())),
        false => Ok(()),
    }
}

/// Any socket speaks for the network namespace.
fn any_socket(name: &str) -> Result<OwnedFd, TapError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| failed(name, "opening a socket")(errno.into()))
}

/// Binds a tun descriptor to an interface: to one made for several queues if several are wanted, else to any.
fn set_interface(fd: BorrowedFd<'_>, name: &str, several: bool) -> Result<(), TapError> {
    let attach = |several: bool| {
        let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues) as c_short;
        ioctl(fd, libc::TUNSETIFF, &mut request)
    };
    match attach(several) {
        // It was made the other way, or is no tap.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => match attach(!several) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(error),
            _ if several => return Err(TapError::OneQueue(name.into())),
            second => second,
        },
        first => first,
    }
    .map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) => TapError::NotATap(name.into()),
        Some(libc::EBUSY) => TapError::Busy(name.into()),
        Some(libc::EPERM | libc::EACCES) => TapError::Permission(name.into()),
        _ => failed(name, "attaching")(source),
    })
}

fn mtu(socket: BorrowedFd<'_>, name: &str) -> io::Result<u16> {
    const SIOCGIFMTU: libc::Ioctl = 0x8921;
    let mut request = interface_request(name);
    ioctl(socket, SIOCGIFMTU, &mut request)?;
    // SAFETY: SIOCGIFMTU has filled this member of the union, and any bits make an integer.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

/// A request about the interface `name`, which is shorter than `IFNAMSIZ`.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid `ifreq`: integers, and a union that holds some.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request
}

/// An ioctl of those here that read or write one `T`.
fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the callers, all in this file, pair each request with the type it reads or writes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

fn failed(name: &str, what: &'static str) -> impl FnOnce(io::Error) -> TapError {
    let name = name.to_owned();
    move |source| TapError::Ioctl { name, what: what.into(), source }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::OpenDirectly;

    #[test]
    fn names_that_are_none_and_taps_that_are_not_there() {
        for name in ["", "sixteen-bytes-xx", "tap%d", "a/b", "a b"] {
            assert!(matches!(Tap::attach(&OpenDirectly, name, 1), Err(TapError::Name(_))), "{name:?}");
        }
        let error = Tap::attach(&OpenDirectly, "no-such-tap0", 1).unwrap_err();
        assert!(matches!(&error, TapError::NoSuchTap(name) if name == "no-such-tap0"), "{error:?}");
        assert!(error.hint().unwrap().contains("ip tuntap add dev no-such-tap0 mode tap"));
    }

    #[test]
    fn offloads_that_make_no_sense_are_left_out() {
        assert_eq!(Offloads { tso4: true, tso6: true, ..Offloads::default() }.flags(), 0);
        assert_eq!(Offloads { checksum: true, ecn: true, ..Offloads::default() }.flags(), libc::TUN_F_CSUM);
        assert_eq!(Offloads { uso: true, ..Offloads::default() }.flags(), 0);
        assert_eq!(Offloads::ALL.flags(), 0x6f);
    }
}
