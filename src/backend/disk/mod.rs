//! A raw disk: a regular file or a block device, read and written in place.

use std::fs::File;
use std::io::{self, IoSlice, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::FallocateFlags;
use thiserror::Error;

use crate::backend::host::{HostFile, HostFiles};
use crate::memory::IoBuf;

/// The unit of a virtio disk's addresses and lengths, in bytes.
pub const SECTOR: u64 = 512;

#[derive(Debug, Error)]
pub enum DiskError {
    #[error("cannot open disk {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} is {what}, not a disk image or block device", path.display())]
    NotADisk { path: PathBuf, what: &'static str },
    #[error("disk {} is in use already", path.display())]
    Locked { path: PathBuf, read_only: bool },
    #[error("cannot lock disk {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("cannot find out the size of disk {}", path.display())]
    Size { path: PathBuf, source: io::Error },
    #[error("disk {} is smaller than one sector of {SECTOR} bytes", path.display())]
    Empty { path: PathBuf },
}

impl DiskError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open { path, source } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some(format!("if reading is enough, attach it read-only: {},ro", path.display()))
                }
                io::ErrorKind::NotFound => Some(format!("an empty disk is made by: truncate -s 1G {}", path.display())),
                _ => None,
            },
            Self::Locked { path, read_only: false } => {
                Some(format!("several VMs can share a disk only if all attach it read-only: {},ro", path.display()))
            }
            Self::Locked { read_only: true, .. } => Some("another VM holds it for writing".into()),
            Self::NotADisk { .. } => Some("give a raw disk image or a block device".into()),
            Self::Empty { path } => Some(format!("give it a size: truncate -s 1G {}", path.display())),
            _ => None,
        }
    }
}

/// An open, locked disk. Closing it gives up the lock.
///
/// The lock is an open-file-description lock on the whole file: exclusive for a writer, shared for readers. It
/// binds the VMs on this host that open the same inode; QEMU's own locks conflict with it, a file system
/// mounted from a block device does not.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    bytes: u64,
    block_size: u64,
    /// Does the file system know how to read, and to write, without waiting? True until it says no.
    try_read: AtomicBool,
    try_write: AtomicBool,
}

impl Disk {
    /// Opens and locks the disk at `path`.
    ///
    /// A size that is not a multiple of [`SECTOR`] is rounded down, with a warning: the rest is out of reach.
    pub fn open(files: &dyn HostFiles, path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let path = path.to_owned();
        let mut file = match files.open(&HostFile::Disk { path: path.clone(), read_only }) {
            Ok(file) => file,
            // What open(2) itself says about the two kinds of file that it refuses.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                return Err(DiskError::NotADisk { path, what: "a directory" });
            }
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                return Err(DiskError::NotADisk { path, what: "a socket or the node of a missing device" });
            }
            Err(source) => return Err(DiskError::Open { path, source }),
        };
        let metadata = file.metadata().map_err(|source| DiskError::Open { path: path.clone(), source })?;
        let kind = metadata.file_type();
        let what = match () {
            () if kind.is_file() || kind.is_block_device() => None,
            () if kind.is_dir() => Some("a directory"),
            () if kind.is_fifo() => Some("a named pipe"),
            () if kind.is_char_device() => Some("a character device"),
            () if kind.is_socket() => Some("a socket"),
            () => Some("a special file"),
        };
        if let Some(what) = what {
            return Err(DiskError::NotADisk { path, what });
        }
        match lock(&file, read_only) {
            Ok(()) => {}
            // POSIX allows either for a lock that another holds.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(DiskError::Locked { path, read_only });
            }
            Err(source) => return Err(DiskError::Lock { path, source }),
        }
        // The size from after the lock: whoever held it may have changed it. A block device has none in its
        // metadata, but its end can be sought.
        let size = file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Size { path: path.clone(), source })?;
        let bytes = size - size % SECTOR;
        if bytes == 0 {
            return Err(DiskError::Empty { path });
        }
        if bytes != size {
            tracing::warn!(
                "disk {}: the last {} bytes are not a whole sector and are left out",
                path.display(),
                size % SECTOR
            );
        }
        let block_size = match kind.is_block_device() {
            true => rustix::fs::ioctl_blkpbszget(&file).map_or(SECTOR, u64::from),
            false => metadata.blksize(),
        };
        Ok(Self {
            file,
            path,
            read_only,
            bytes,
            block_size,
            try_read: AtomicBool::new(true),
            try_write: AtomicBool::new(true),
        })
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

    /// Fills `buf` from byte `offset` on, using it up. `before_wait` is called if that means waiting for the
    /// disk; with `None`, nobody cares and the disk is simply read.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` where the file has become shorter than it was.
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

    /// Writes `buf` at byte `offset`, using it up; else as [`Self::read`].
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

    /// Returns once everything written is on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.file))?)
    }

    /// Gives the storage of `len` bytes at `offset` back to the host; they read as zeroes from then on.
    ///
    /// # Errors
    /// The host's; `EOPNOTSUPP` where it cannot.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    /// Makes `len` bytes at `offset` read as zeroes, by the cheapest way the host knows. Only if `may_unmap` may
    /// their storage be given up.
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

/// Did the host say that it has no such operation?
fn unsupported<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)))
}

/// Takes the lock without waiting for it.
#[expect(unsafe_code, reason = "rustix has the locks that belong to a process, not those of a description")]
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel reads one `flock`, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::OpenDirectly;
    use crate::memory::anonymous;
    use vm_memory::{Bytes, GuestAddress};

    fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
        Disk::open(&OpenDirectly, path, read_only)
    }

    #[test]
    fn only_disks_are_disks() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, read_only, what) in [
            (dir.path(), false, "a directory"),
            (dir.path(), true, "a directory"),
            (fifo.as_path(), false, "a named pipe"),
            (fifo.as_path(), true, "a named pipe"),
            (socket.as_path(), false, "a socket"),
            (Path::new("/dev/null"), false, "a character device"),
        ] {
            let error = open(path, read_only).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
        let missing = open(&dir.path().join("missing"), false).unwrap_err();
        assert!(matches!(&missing, DiskError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound));
        let small = dir.path().join("small");
        std::fs::write(&small, [0; 511]).unwrap();
        assert!(matches!(open(&small, false).unwrap_err(), DiskError::Empty { .. }));
        std::fs::write(&small, [0; 1300]).unwrap();
        assert_eq!(open(&small, false).unwrap().bytes(), 1024);
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let writer = open(file.path(), false).unwrap();
        assert!(matches!(open(file.path(), false), Err(DiskError::Locked { read_only: false, .. })));
        assert!(matches!(open(file.path(), true), Err(DiskError::Locked { read_only: true, .. })));
        drop(writer);
        let _readers = (open(file.path(), true).unwrap(), open(file.path(), true).unwrap());
        assert!(open(file.path(), false).unwrap_err().hint().unwrap().contains(",ro"));
    }

    #[test]
    fn long_lists_of_buffers_and_files_that_shrink() {
        let ram = anonymous(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let contents: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(file.path(), &contents).unwrap();
        let disk = open(file.path(), false).unwrap();
        let mut buf = IoBuf::new(ram.clone());
        // Four bytes apiece: twice what one system call takes.
        for i in 0..2048 {
            buf.push(i * 8, 4).unwrap();
        }
        let mut waited = 0;
        disk.read(&mut buf, 0, Some(&mut || waited += 1)).unwrap();
        assert!(waited <= 1);
        for i in 0..2048 {
            let mut got = [0; 4];
            ram.read_slice(&mut got, GuestAddress(i * 8)).unwrap();
            assert_eq!(got, contents[i as usize * 4..][..4]);
        }
        file.as_file().set_len(4096).unwrap();
        buf.push(0, 8192).unwrap();
        assert_eq!(disk.read(&mut buf, 0, None).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn zeroes_and_holes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = |contents: &[u8]| {
            std::fs::write(file.path(), contents).unwrap();
            open(file.path(), false).unwrap()
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
