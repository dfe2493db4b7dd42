//! A disk: one front over the formats a file can have.
//!
//! Several queues may serve one disk, so all of it works through a shared reference.

mod error;
mod file;
mod layers;
pub mod qcow2;
mod raw;
pub mod tools;
pub mod uring;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::error::DiskError;
pub use self::file::size as file_size;
pub use self::layers::Layer;

use self::file::DiskFile;
use self::qcow2::Qcow2;
use self::qcow2::header::looks_like_qcow2;
use self::raw::Raw;
use crate::backend::host::{HostFile, HostFiles};
use crate::config::{DiskFormat, Image};
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
    Qcow2(Arc<Qcow2>),
}

impl Disk {
    /// Opens and locks the disk at `path`, raw bytes or a block device.
    ///
    /// A size that is not a multiple of [`SECTOR`] is rounded down, with a warning: the rest is out of reach.
    pub fn open(files: &dyn HostFiles, path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let raw = Image { format: Some(DiskFormat::Raw), ..Image::default() };
        Self::open_image(files, path, read_only, &raw)
    }

    /// Opens and locks the disk at `path`. Its format is never guessed: without a word about it the disk is raw,
    /// and refused if it begins like a qcow2 image.
    pub fn open_image(files: &dyn HostFiles, path: &Path, read_only: bool, image: &Image) -> Result<Self, DiskError> {
        let Image { format, backing } = image;
        let (size, block_size, opened) = if *format == Some(DiskFormat::Qcow2) {
            let (image, block_size) = Qcow2::open(files, path, read_only, backing)?;
            (image.header.size, block_size, Format::Qcow2(Arc::new(image)))
        } else {
            let DiskFile { file, size, block_size } = DiskFile::open(files, path, read_only)?;
            if !backing.is_empty() {
                return Err(DiskError::NoBacking { path: path.to_owned() });
            }
            let unreadable = |source| DiskError::Open { path: path.to_owned(), source };
            if format.is_none() && looks_like_qcow2(&file).map_err(unreadable)? {
                return Err(DiskError::LooksLikeQcow2 { path: path.to_owned(), option: "format" });
            }
            (size, block_size, Format::Raw(Raw::new(file)))
        };
        Self::new(path, read_only, size, block_size, opened)
    }

    fn new(path: &Path, read_only: bool, size: u64, block_size: u64, format: Format) -> Result<Self, DiskError> {
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
        Ok(Self { path: path.to_owned(), read_only, bytes, block_size, format })
    }

    /// This disk with the size that its file has now, if it is what lies at `path`; `None` if that is another file, or
    /// this one is not raw. Both share the lock.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn with_size_of_now(&self, files: &dyn HostFiles, path: &Path) -> Result<Option<Self>, DiskError> {
        let Format::Raw(raw) = &self.format else { return Ok(None) };
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        let there = files.open(&HostFile::Disk { path: path.to_owned(), read_only: self.read_only }).map_err(failed)?;
        if !is_same_file(raw.file(), there.as_fd()).map_err(failed)? {
            return Ok(None);
        }
        let file = File::from(raw.file().try_clone_to_owned().map_err(failed)?);
        let size = file::size(&file).map_err(|source| DiskError::Size { path: path.to_owned(), source })?;
        Self::new(path, self.read_only, size, self.block_size, Format::Raw(Raw::new(file))).map(Some)
    }

    /// What has to be called at the VM's end, for formats that keep something in memory.
    #[must_use]
    pub fn closer(&self) -> Option<DiskCloser> {
        match &self.format {
            Format::Raw(_) => None,
            Format::Qcow2(image) => Some(DiskCloser { path: self.path.clone(), image: image.clone() }),
        }
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
            Format::Qcow2(_) => None,
        }
    }

    /// Opens that file once more, without the lock, for those who may hold it for a moment longer than this process
    /// lives.
    ///
    /// # Errors
    /// The host's; `Unsupported` where [`Self::raw_file`] has none.
    pub fn open_again(&self, files: &dyn HostFiles) -> io::Result<File> {
        let ours = self.raw_file().ok_or(io::ErrorKind::Unsupported)?;
        files.open_again(&ours.try_clone_to_owned()?.into(), self.read_only)
    }

    /// Can the host tell which reads would have to wait? Asks it.
    pub fn tells_ready_reads(&self) -> bool {
        match &self.format {
            Format::Raw(raw) => raw.tells_ready_reads(),
            Format::Qcow2(_) => false,
        }
    }

    /// Can it tell which writes would have to wait? True until it has said no.
    pub fn tells_ready_writes(&self) -> bool {
        match &self.format {
            Format::Raw(raw) => raw.tells_ready_writes(),
            Format::Qcow2(_) => false,
        }
    }

    /// Fills as much of `buf` from byte `offset` on as takes no waiting for the disk, using it up; returns how
    /// many bytes that were. None where the host cannot tell.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_ready(&self, buf: &mut IoBuf, offset: u64) -> io::Result<u64> {
        match &self.format {
            Format::Raw(raw) => raw.read_ready(buf, offset),
            Format::Qcow2(_) => Ok(0),
        }
    }

    /// Writes as much of `buf` at byte `offset` as takes no waiting; else as [`Self::read_ready`].
    pub fn write_ready(&self, buf: &mut IoBuf, offset: u64) -> io::Result<u64> {
        match &self.format {
            Format::Raw(raw) => raw.write_ready(buf, offset),
            Format::Qcow2(_) => Ok(0),
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
            Format::Qcow2(image) => image.read(buf, offset, before_wait),
        }
    }

    /// Writes `buf` at byte `offset`, using it up; else as [`Self::read`].
    pub fn write(&self, buf: &mut IoBuf, offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.write(buf, offset, before_wait),
            Format::Qcow2(image) => image.write(buf, offset, before_wait),
        }
    }

    /// Returns once everything written is on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.flush(),
            Format::Qcow2(image) => image.flush(),
        }
    }

    /// Gives the storage of `len` bytes at `offset` back to the host; they read as zeroes from then on.
    ///
    /// # Errors
    /// The host's; `EOPNOTSUPP` where it cannot.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.discard(offset, len),
            Format::Qcow2(image) => image.discard(offset, len),
        }
    }

    /// Makes `len` bytes at `offset` read as zeroes, by the cheapest way the host knows. Only if `may_unmap` may
    /// their storage be given up.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        match &self.format {
            Format::Raw(raw) => raw.write_zeroes(offset, len, may_unmap),
            Format::Qcow2(image) => image.write_zeroes(offset, len, may_unmap),
        }
    }
}

fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino, one.st_rdev) == (other.st_dev, other.st_ino, other.st_rdev))
}

/// Brings a disk to rest while its device still has it.
#[derive(Clone)]
pub struct DiskCloser {
    path: PathBuf,
    image: Arc<Qcow2>,
}

impl DiskCloser {
    /// Waits for the request in hand; those after it fail.
    pub fn close(&self) {
        if let Err(error) = self.image.close() {
            tracing::error!("disk {} could not be closed cleanly: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
