//! A disk: one front over the formats a file can have.
//!
//! Several queues may serve one disk, so all of it works through a shared reference.

mod error;
mod file;
mod raw;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

pub use self::error::DiskError;

use self::file::DiskFile;
use self::raw::Raw;
use crate::backend::host::HostFiles;
use crate::memory::IoBuf;

/// The unit of a virtio disk's addresses and lengths, in bytes.
pub const SECTOR: u64 = 512;

/// An open, locked disk. Closing it gives up the lock.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    read_only: bool,
    bytes: u64,
    block_size: u64,
    format: Format,
}

/// How the disk's bytes lie in its file.
#[derive(Debug)]
enum Format {
    Raw(Raw),
}

impl Disk {
    /// Opens and locks the disk at `path`.
    ///
    /// A size that is not a multiple of [`SECTOR`] is rounded down, with a warning: the rest is out of reach.
    pub fn open(files: &dyn HostFiles, path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let DiskFile { file, size, block_size } = DiskFile::open(files, path, read_only)?;
        let bytes = size - size % SECTOR;
        if bytes == 0 {
            return Err(DiskError::Empty { path: path.to_owned() });
        }
        if bytes != size {
            tracing::warn!(
                "disk {}: the last {} bytes are not a whole sector and are left out",
                path.display(),
                size % SECTOR
            );
        }
        Ok(Self { path: path.to_owned(), read_only, bytes, block_size, format: Format::Raw(Raw::new(file)) })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The size in bytes, a multiple of [`SECTOR`].
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The unit in bytes that the host reads and writes most cheaply; any number, as the host tells it.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// The file, where its bytes are the disk's one by one: for engines that read and write it by themselves.
    #[must_use]
    pub fn raw_file(&self) -> Option<BorrowedFd<'_>> {
        match &self.format {
            Format::Raw(raw) => Some(raw.file()),
        }
    }

    /// Fills `buf` from byte `offset` on, using it up. `before_wait` is called if that means waiting for the
    /// disk; with `None`, nobody cares and the disk is simply read.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` where the file has become shorter than it was.
    pub fn read(&self, buf: &mut IoBuf, offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.read(buf, offset, before_wait),
        }
    }

    /// Writes `buf` at byte `offset`, using it up; else as [`Self::read`].
    pub fn write(&self, buf: &mut IoBuf, offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.write(buf, offset, before_wait),
        }
    }

    /// Returns once everything written is on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.flush(),
        }
    }

    /// Gives the storage of `len` bytes at `offset` back to the host; they read as zeroes from then on.
    ///
    /// # Errors
    /// The host's; `EOPNOTSUPP` where it cannot.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.discard(offset, len),
        }
    }

    /// Makes `len` bytes at `offset` read as zeroes, by the cheapest way the host knows. Only if `may_unmap` may
    /// their storage be given up.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.write_zeroes(offset, len, may_unmap),
        }
    }
}

#[cfg(test)]
mod tests;
