//! A raw disk: the file's bytes are the disk's, read and written in place.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::FallocateFlags;

use crate::memory::IoBuf;

/// The operations are those of [`super::Disk`].
#[derive(Debug)]
pub struct Raw {
    file: File,
    /// Does the file system know how to read, and to write, without waiting? True until it says no.
    try_read: AtomicBool,
    try_write: AtomicBool,
}

impl Raw {
    pub fn new(file: File) -> Self {
        Self { file, try_read: AtomicBool::new(true), try_write: AtomicBool::new(true) }
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn tells_ready_reads(&self) -> bool {
        let mut byte = [0];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        let tried = rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(&mut byte)], 0, flags);
        if unsupported(&tried.map_err(io::Error::from)) {
            self.try_read.store(false, Relaxed);
        }
        self.try_read.load(Relaxed)
    }

    pub fn tells_ready_writes(&self) -> bool {
        self.try_write.load(Relaxed)
    }

    pub fn read_ready(&self, buf: &mut IoBuf, offset: u64) -> io::Result<u64> {
        let file = self.file.as_fd();
        transfer_ready(buf, offset, &self.try_read, |buf, at| buf.try_read_at(file, at))
    }

    pub fn write_ready(&self, buf: &mut IoBuf, offset: u64) -> io::Result<u64> {
        let file = self.file.as_fd();
        transfer_ready(buf, offset, &self.try_write, |buf, at| buf.try_write_at(file, at))
    }

    pub fn read(&self, buf: &mut IoBuf, offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        let file = self.file.as_fd();
        transfer(
            buf,
            offset,
            &self.try_read,
            before_wait,
            |buf, at| buf.try_read_at(file, at),
            |buf, at| buf.read_at(file, at),
        )
    }

    pub fn write(&self, buf: &mut IoBuf, offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        let file = self.file.as_fd();
        transfer(
            buf,
            offset,
            &self.try_write,
            before_wait,
            |buf, at| buf.try_write_at(file, at),
            |buf, at| buf.write_at(file, at),
        )
    }

    /// Reads into memory of ours.
    pub fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.file))?)
    }

    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            let punched = self.discard(offset, len);
            if !unsupported(&punched) {
                return punched;
            }
        }
        let zeroed = self.allocate(FallocateFlags::ZERO_RANGE, offset, len);
        if unsupported(&zeroed) { self.write_zero_bytes(offset, len) } else { zeroed }
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let flags = how | FallocateFlags::KEEP_SIZE;
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len))?)
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROES: [u8; 4096] = [0; 4096];
        while len > 0 {
            // 1 MiB per call, all of it from one page.
            let whole = [IoSlice::new(&ZEROES); 256];
            let n = if len >= ZEROES.len() as u64 {
                let slices = (len / ZEROES.len() as u64).min(whole.len() as u64) as usize;
                rustix::io::retry_on_intr(|| rustix::io::pwritev(&self.file, &whole[..slices], offset))?
            } else {
                rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.file, &ZEROES[..len as usize], offset))?
            };
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += n as u64;
            len -= n as u64;
        }
        Ok(())
    }
}

/// Moves all of `buf`, going on after short transfers.
fn transfer(
    buf: &mut IoBuf,
    mut offset: u64,
    may_try: &AtomicBool,
    mut before_wait: Option<&mut dyn FnMut()>,
    attempt: impl Fn(&IoBuf, u64) -> io::Result<usize>,
    complete: impl Fn(&IoBuf, u64) -> io::Result<usize>,
) -> io::Result<()> {
    while !buf.is_empty() {
        let n = match &mut before_wait {
            Some(call) if may_try.load(Relaxed) => match attempt(buf, offset) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    call();
                    before_wait = None;
                    continue;
                }
                refused if unsupported(&refused) => {
                    may_try.store(false, Relaxed);
                    continue;
                }
                done => done?,
            },
            Some(call) => {
                call();
                before_wait = None;
                continue;
            }
            None => complete(buf, offset)?,
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.trim_front(n);
        offset += n as u64;
    }
    Ok(())
}

/// Moves what can be moved without waiting.
fn transfer_ready(
    buf: &mut IoBuf,
    offset: u64,
    may_try: &AtomicBool,
    attempt: impl Fn(&IoBuf, u64) -> io::Result<usize>,
) -> io::Result<u64> {
    let mut done = 0;
    while !buf.is_empty() && may_try.load(Relaxed) {
        match attempt(buf, offset + done) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            refused if unsupported(&refused) => may_try.store(false, Relaxed),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                let n = n?;
                buf.trim_front(n);
                done += n as u64;
            }
        }
    }
    Ok(done)
}

/// Did the host say that it has no such operation?
fn unsupported<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeroes_and_holes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = |contents: &[u8]| {
            std::fs::write(file.path(), contents).unwrap();
            Raw::new(File::options().read(true).write(true).open(file.path()).unwrap())
        };
        let full = vec![0xaa; 3 << 20];
        let expect = |from: usize, to: usize| {
            let got = std::fs::read(file.path()).unwrap();
            assert!(got.iter().enumerate().all(|(i, b)| *b == if (from..to).contains(&i) { 0 } else { 0xaa }));
        };
        for unmap in [false, true] {
            disk(&full).write_zeroes(512, 2 << 20, unmap).unwrap();
            expect(512, 512 + (2 << 20));
        }
        disk(&full).write_zero_bytes(4096 + 512, (2 << 20) + 1024).unwrap();
        expect(4096 + 512, 4096 + 512 + (2 << 20) + 1024);
        let before = disk(&full).file.metadata().unwrap().blocks();
        let punched = disk(&full);
        punched.discard(1 << 20, 1 << 20).unwrap();
        expect(1 << 20, 2 << 20);
        assert!(punched.file.metadata().unwrap().blocks() <= before - 2048);
    }
}
