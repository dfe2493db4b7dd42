//! Files in memory, behind the door through which a machine asks for the host's.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::input::Input;
use crate::backend::host::Peer;
use crate::backend::{HostFile, HostFiles};

/// Bytes of the largest file that [`sparse`] makes.
const MAX_SPARSE: u32 = 16 << 20;

/// An empty file in memory.
///
/// # Panics
/// As all here, when the host is out of memory or descriptors.
pub fn empty() -> File {
    rustix::fs::memfd_create("fuzzing", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory").into()
}

pub fn file(content: &[u8]) -> File {
    let mut file = empty();
    file.write_all(content).expect("room for a file in memory");
    file
}

/// A file with holes: its size, then pieces, each an offset, a length and so many bytes.
pub fn sparse(input: &mut Input<'_>) -> Option<File> {
    let file = empty();
    let size = input.u32()? % (MAX_SPARSE + 1);
    file.set_len(size.into()).expect("room for a file in memory");
    while let (Some(offset), Some(len)) = (input.u32(), input.u16()) {
        let offset = offset % size.max(1);
        let bytes = input.up_to(usize::from(len).min((size - offset) as usize));
        file.write_all_at(bytes, offset.into()).expect("room for a file in memory");
    }
    Some(file)
}

/// Names for files.
#[derive(Default)]
pub struct MemoryFiles(Vec<(PathBuf, File)>);

impl MemoryFiles {
    pub fn with(mut self, path: &str, file: File) -> Self {
        self.0.push((path.into(), file));
        self
    }
}

impl HostFiles for MemoryFiles {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        let HostFile::Disk { path, read_only } = file else { return Err(io::ErrorKind::NotFound.into()) };
        let (_, file) = self.0.iter().find(|(name, _)| name == path).ok_or(io::ErrorKind::NotFound)?;
        // A description of its own, as locks belong to those.
        File::options().read(true).write(!read_only).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }

    fn connect(&self, _path: &Path) -> io::Result<Peer> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn listen(&self, _path: &Path) -> io::Result<UnixListener> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
