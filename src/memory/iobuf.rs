//! Guest buffers as the kernel wants them: vectors of host addresses, checked once against guest RAM.

#![expect(unsafe_code, reason = "system calls and copies on guest memory the guest may change meanwhile")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Ram, RamRegions};

#[derive(Debug, Error, PartialEq, Eq)]
pub enum IoBufError {
    #[error("a buffer of {len} bytes at {addr:#x} is not in guest memory")]
    OutsideRam { addr: u64, len: u64 },
    #[error("a buffer list longer than 4 GiB")]
    TooLong,
}

/// A list of guest buffers, in order. It is filled for one request, emptied and used again, so that a request
/// allocates nothing.
pub struct IoBuf {
    /// Keeps the mappings behind `vecs` alive.
    ram: Ram,
    vecs: Vec<libc::iovec>,
    /// The guest address of each vector: what a write has to mark dirty.
    addrs: Vec<u64>,
    len: usize,
}

// SAFETY: the raw pointers in `vecs` point into mappings that `ram` keeps alive and that any thread may use.
unsafe impl Send for IoBuf {}

impl IoBuf {
    #[must_use]
    pub fn new(ram: Ram) -> Self {
        Self { ram, vecs: Vec::new(), addrs: Vec::new(), len: 0 }
    }

    /// An empty list for buffers of the same RAM.
    #[must_use]
    pub fn another(&self) -> Self {
        Self::new(self.ram.clone())
    }

    pub fn clear(&mut self) {
        self.vecs.clear();
        self.addrs.clear();
        self.len = 0;
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many host vectors the buffers take.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.vecs.len()
    }

    /// Appends `len` bytes at guest address `addr`. A range over adjacent regions becomes several vectors.
    pub fn push(&mut self, addr: u64, len: u32) -> Result<(), IoBufError> {
        let outside = IoBufError::OutsideRam { addr, len: len.into() };
        // What readv and writev can return is bounded by i32::MAX rounded to pages; virtio bounds a chain by 4 GiB.
        if self.len + len as usize > u32::MAX as usize {
            return Err(IoBufError::TooLong);
        }
        let (mut at, mut left) = (addr, u64::from(len));
        while left > 0 {
            let Some(region) = self.ram.find_region(GuestAddress(at)) else { return Err(outside) };
            let offset = at - region.start_addr().0;
            let chunk = left.min(region.len() - offset);
            // SAFETY: `offset` lies inside the region's mapping, as `find_region` found it there.
            let base = unsafe { region.as_ptr().add(offset as usize) };
            self.vecs.push(libc::iovec { iov_base: base.cast(), iov_len: chunk as usize });
            self.addrs.push(at);
            left -= chunk;
            at = match at.checked_add(chunk) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(outside),
            };
        }
        self.len += len as usize;
        Ok(())
    }

    /// Appends all of `other`'s buffers.
    ///
    /// # Panics
    /// If they belong to another RAM, which `self` does not keep alive.
    pub fn append(&mut self, other: &IoBuf) {
        assert!(std::sync::Arc::ptr_eq(&self.ram, &other.ram), "buffers of another RAM");
        self.vecs.extend_from_slice(&other.vecs);
        self.addrs.extend_from_slice(&other.addrs);
        self.len += other.len;
    }

    /// Drops the first `n` bytes (all of them if there are fewer).
    pub fn trim_front(&mut self, n: usize) {
        let mut left = n.min(self.len);
        self.len -= left;
        let mut gone = 0;
        for (vec, addr) in self.vecs.iter_mut().zip(&mut self.addrs) {
            if vec.iov_len > left {
                // SAFETY: the pointer stays inside the vector it came from.
                vec.iov_base = unsafe { vec.iov_base.cast::<u8>().add(left).cast() };
                vec.iov_len -= left;
                *addr += left as u64;
                break;
            }
            left -= vec.iov_len;
            gone += 1;
        }
        self.vecs.drain(..gone);
        self.addrs.drain(..gone);
    }

    /// Keeps only the first `n` bytes.
    pub fn truncate(&mut self, n: usize) {
        let mut excess = self.len.saturating_sub(n);
        self.len -= excess;
        while excess > 0 {
            let last = self.vecs.last_mut().expect("`len` counts the bytes of `vecs`");
            if last.iov_len > excess {
                last.iov_len -= excess;
                break;
            }
            excess -= last.iov_len;
            self.vecs.pop();
            self.addrs.pop();
        }
    }

    /// Copies bytes out of the start of the buffers; returns how many there were.
    pub fn copy_to(&self, mut out: &mut [u8]) -> usize {
        let wanted = out.len();
        for vec in &self.vecs {
            let n = vec.iov_len.min(out.len());
            // SAFETY: `iov_base..+iov_len` is mapped guest memory and `out` is ours; they cannot overlap. The
            // guest may write meanwhile: the bytes are then any mix, which callers treat as hostile anyway.
            unsafe { std::ptr::copy_nonoverlapping(vec.iov_base.cast::<u8>(), out.as_mut_ptr(), n) };
            out = &mut out[n..];
            if out.is_empty() {
                break;
            }
        }
        wanted - out.len()
    }

    /// Copies bytes into the start of the buffers and marks them dirty; returns how many fitted.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        self.copy_from_at(0, bytes)
    }

    /// Copies bytes into the buffers, `skip` bytes after their start, and marks them dirty; returns how many
    /// fitted.
    pub fn copy_from_at(&self, mut skip: usize, mut bytes: &[u8]) -> usize {
        let wanted = bytes.len();
        for (vec, &addr) in self.vecs.iter().zip(&self.addrs) {
            if bytes.is_empty() {
                break;
            }
            if skip >= vec.iov_len {
                skip -= vec.iov_len;
                continue;
            }
            let n = (vec.iov_len - skip).min(bytes.len());
            // SAFETY: as in `copy_to`, the other way round; `skip + n` is at most the vector's length.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), vec.iov_base.cast::<u8>().add(skip), n) };
            mark(&self.ram, addr + skip as u64, n);
            bytes = &bytes[n..];
            skip = 0;
        }
        wanted - bytes.len()
    }

    /// The guest address of the last byte, if there is one.
    #[must_use]
    pub fn last_byte(&self) -> Option<u64> {
        let (vec, addr) = (self.vecs.last()?, self.addrs.last()?);
        Some(addr + (vec.iov_len as u64 - 1))
    }

    /// Fills the first `n` bytes with zeroes and marks them dirty.
    pub fn fill_zero(&self, n: usize) {
        let mut left = n.min(self.len);
        for vec in &self.vecs {
            let chunk = vec.iov_len.min(left);
            // SAFETY: the range is mapped guest memory.
            unsafe { std::ptr::write_bytes(vec.iov_base.cast::<u8>(), 0, chunk) };
            left -= chunk;
        }
        self.mark_dirty(n);
    }

    /// Marks the first `n` bytes as written by the host.
    pub fn mark_dirty(&self, n: usize) {
        let mut left = n.min(self.len);
        for (vec, &addr) in self.vecs.iter().zip(&self.addrs) {
            if left == 0 {
                break;
            }
            let chunk = vec.iov_len.min(left);
            mark(&self.ram, addr, chunk);
            left -= chunk;
        }
    }

    /// `preadv` of all buffers; what was read is marked dirty. At most `IOV_MAX` vectors are used.
    pub fn read_at(&self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: every vector is mapped guest memory that `self.ram` keeps alive during the call.
        let n = cvt(|| unsafe { libc::preadv64(fd, self.vecs.as_ptr(), self.count(), to_off(offset)) })?;
        self.mark_dirty(n);
        Ok(n)
    }

    /// `pwritev` of all buffers. At most `IOV_MAX` vectors are used.
    pub fn write_at(&self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `read_at`; the kernel only reads.
        cvt(|| unsafe { libc::pwritev64(fd, self.vecs.as_ptr(), self.count(), to_off(offset)) })
    }

    /// As [`Self::read_at`], but fails with `WouldBlock` (or, on file systems that cannot tell, `Unsupported`)
    /// where that would have to wait for the disk.
    pub fn try_read_at(&self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `read_at`.
        let n = cvt(|| unsafe {
            libc::preadv64v2(fd, self.vecs.as_ptr(), self.count(), to_off(offset), libc::RWF_NOWAIT)
        })?;
        self.mark_dirty(n);
        Ok(n)
    }

    /// As [`Self::write_at`], under the conditions of [`Self::try_read_at`].
    pub fn try_write_at(&self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `write_at`.
        cvt(|| unsafe { libc::pwritev64v2(fd, self.vecs.as_ptr(), self.count(), to_off(offset), libc::RWF_NOWAIT) })
    }

    /// `readv` of one packet; what was read is marked dirty. A result larger than [`Self::len`] means that the
    /// packet did not fit: its end is lost. (`IOV_MAX` vectors and more hide that.)
    pub fn read_packet(&mut self, fd: impl AsFd) -> io::Result<usize> {
        // A packet's excess vanishes without a word, unless there is room for its first byte.
        let mut excess = 0u8;
        self.vecs.push(libc::iovec { iov_base: (&raw mut excess).cast(), iov_len: 1 });
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `read_at`; the last vector is `excess`, which outlives the call.
        let result = cvt(|| unsafe { libc::readv(fd, self.vecs.as_ptr(), self.count()) });
        self.vecs.pop();
        let n = result?;
        self.mark_dirty(n);
        Ok(n)
    }

    /// `readv` of all buffers; what was read is marked dirty.
    pub fn read_from(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `read_at`.
        let n = cvt(|| unsafe { libc::readv(fd, self.vecs.as_ptr(), self.count()) })?;
        self.mark_dirty(n);
        Ok(n)
    }

    /// `writev` of all buffers.
    pub fn write_to(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `write_at`.
        cvt(|| unsafe { libc::writev(fd, self.vecs.as_ptr(), self.count()) })
    }

    /// `writev` of `before` and then all buffers.
    pub fn write_behind(&mut self, before: &[u8], fd: impl AsFd) -> io::Result<usize> {
        self.vecs.insert(0, libc::iovec { iov_base: before.as_ptr().cast_mut().cast(), iov_len: before.len() });
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `write_at`; the first vector is `before`, which outlives the call and is only read.
        let result = cvt(|| unsafe { libc::writev(fd, self.vecs.as_ptr(), self.count()) });
        self.vecs.remove(0);
        result
    }

    /// The vectors and their number, `IOV_MAX` at most, for a system call that outlasts this one: whoever makes it
    /// keeps the list as it is meanwhile.
    #[must_use]
    pub fn vectors(&self) -> (*const libc::iovec, u32) {
        (self.vecs.as_ptr(), self.count() as u32)
    }

    fn count(&self) -> libc::c_int {
        self.vecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int
    }
}

fn mark(ram: &RamRegions, addr: u64, len: usize) {
    if let Some(region) = ram.find_region(GuestAddress(addr)) {
        region.bitmap().mark_dirty((addr - region.start_addr().0) as usize, len);
    }
}

/// Offsets beyond `i64::MAX` become ones the kernel refuses with EINVAL.
fn to_off(offset: u64) -> i64 {
    i64::try_from(offset).unwrap_or(-1)
}

fn cvt(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(n) = usize::try_from(call()) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    fn ram() -> Ram {
        // Two regions that touch, and one apart.
        anonymous(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000), (GuestAddress(0x1_0000), 0x4000)])
            .unwrap()
    }

    #[test]
    fn buffers_outside_ram_are_refused() {
        let mut buf = IoBuf::new(ram());
        for (addr, len) in [(0x8000, 1), (0x7fff, 2), (u64::MAX, 1), (u64::MAX - 1, 4), (0x1_3fff, 2), (0, u32::MAX)] {
            buf.clear();
            assert_eq!(
                buf.push(addr, len),
                Err(IoBufError::OutsideRam { addr, len: len.into() }),
                "{addr:#x}+{len:#x}"
            );
        }
        assert_eq!(buf.push(0x3ffe, 4), Ok(()));
    }

    #[test]
    fn a_file_is_read_into_place_and_marked_dirty() {
        let ram = ram();
        let mut buf = IoBuf::new(ram.clone());
        buf.push(0x1000, 3).unwrap();
        buf.push(0x3ffe, 4).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"0123456789").unwrap();
        assert_eq!(buf.read_at(&file, 1).unwrap(), 7);
        let mut got = [0; 4];
        ram.read_slice(&mut got, GuestAddress(0x3ffe)).unwrap();
        assert_eq!(&got, b"4567");
        let dirty: Vec<u64> = (0..8)
            .filter(|p| {
                let region = ram.find_region(GuestAddress(p * 4096)).unwrap();
                region.bitmap().dirty_at((p * 4096 - region.start_addr().0) as usize)
            })
            .collect();
        assert_eq!(dirty, [1, 3, 4]);
    }

    #[test]
    fn a_packet_that_does_not_fit_is_noticed() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::empty(), None).unwrap();
        let mut buf = IoBuf::new(ram());
        buf.push(0x3ffe, 4).unwrap();
        for (sent, got) in [(3, 3), (4, 4), (5, 5), (9, 5)] {
            rustix::io::write(&b, &[7; 16][..sent]).unwrap();
            assert_eq!((buf.read_packet(&a).unwrap(), buf.len(), buf.segments()), (got, 4, 2));
        }
    }

    #[test]
    #[should_panic(expected = "another RAM")]
    fn buffers_of_another_ram_are_not_taken() {
        IoBuf::new(ram()).append(&IoBuf::new(ram()));
    }

    #[test]
    fn bytes_go_where_they_are_put() {
        let ram = ram();
        let mut buf = IoBuf::new(ram.clone());
        assert_eq!(buf.last_byte(), None);
        buf.push(0x1000, 3).unwrap();
        buf.push(0x2000, 3).unwrap();
        assert_eq!((buf.copy_from_at(2, b"ab"), buf.copy_from_at(5, b"cd"), buf.copy_from_at(9, b"ef")), (2, 1, 0));
        let mut out = [0; 6];
        buf.copy_to(&mut out);
        assert_eq!(&out, b"\0\0ab\0c");
        assert_eq!(buf.last_byte(), Some(0x2002));
    }

    proptest! {
        #[test]
        fn trimming_is_slicing(
            pieces in proptest::collection::vec((0u64..0x7000, 0u32..0x800), 1..6),
            front in 0usize..0x2000,
            keep in 0usize..0x2000,
        ) {
            let ram = ram();
            let pattern: Vec<u8> = (0..0x8000u32).map(|i| (i * 7 + i / 256) as u8).collect();
            ram.write_slice(&pattern, GuestAddress(0)).unwrap();
            let mut buf = IoBuf::new(ram);
            let mut model = Vec::new();
            for (addr, len) in pieces {
                buf.push(addr, len).unwrap();
                model.extend_from_slice(&pattern[addr as usize..addr as usize + len as usize]);
            }
            buf.trim_front(front);
            model.drain(..front.min(model.len()));
            buf.truncate(keep);
            model.truncate(keep);
            let mut out = vec![0; model.len() + 1];
            prop_assert_eq!(buf.copy_to(&mut out), model.len());
            prop_assert_eq!(buf.len(), model.len());
            prop_assert_eq!(&out[..model.len()], &model[..]);
        }
    }
}
