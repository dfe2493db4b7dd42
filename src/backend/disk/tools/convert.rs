//! Copies of disks, in another format or the same, as sparse as they can be.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use rustix::fs::SeekFrom;

use super::ToolError;
use super::create::make_qcow2;
use super::new_file::NewFile;
use crate::backend::OpenDirectly;
use crate::backend::disk::qcow2::{Access, ImagoQcow2};
use crate::backend::disk::{Disk, Format};
use crate::config::{DiskFormat, Image};

/// What is copied at once, and what is looked at for zeroes.
const CHUNK: usize = 1 << 20;
const ZEROES: usize = 64 << 10;

/// A disk to copy from.
pub struct Source<'a> {
    pub path: &'a Path,
    pub image: &'a Image,
}

/// Copies a disk, with all that is behind it, to a new file. `progress` hears how many bytes of how many are done.
///
/// # Errors
/// Where the source is being written to, the new file is there already and not to be replaced (`force`), or either
/// cannot be read or written. Nothing is left of the new file then.
pub fn convert(
    source: &Source<'_>,
    to: &Path,
    format: DiskFormat,
    force: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ToolError> {
    let read = |error| ToolError::Read { path: source.path.to_owned(), source: error };
    let write = |error| ToolError::Write { path: to.to_owned(), source: error };
    let disk = Disk::open_image(&OpenDirectly, source.path, true, source.image)?;
    let new = NewFile::start(to, force)?;
    let sink = Sink::over(&new.file, disk.bytes(), format).map_err(write)?;
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < disk.bytes() {
        let (data, len) = extent(&disk, at, disk.bytes() - at).map_err(read)?;
        // A file that shrinks while we read it has no more extents.
        let len = if len == 0 { disk.bytes() - at } else { len };
        let end = at + len;
        while data && at < end {
            let part = &mut chunk[..(end - at).min(CHUNK as u64) as usize];
            read_bytes(&disk, part, at).map_err(read)?;
            for (piece, offset) in part.chunks(ZEROES).zip((at..).step_by(ZEROES)) {
                if piece.iter().any(|&byte| byte != 0) {
                    sink.write(piece, offset).map_err(write)?;
                }
            }
            at += part.len() as u64;
            progress(at, disk.bytes());
        }
        at = end;
        progress(at, disk.bytes());
    }
    sink.finish().map_err(write)?;
    new.finish()
}

/// Is what begins at `offset` data, or a hole; and how far?
fn extent(disk: &Disk, offset: u64, len: u64) -> io::Result<(bool, u64)> {
    let file = match &disk.format {
        Format::Qcow2(image) => return image.extent(offset, len),
        Format::Raw(raw) => raw.file(),
    };
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => Ok((false, (data - offset).min(len))),
        Ok(_) => {
            let hole = rustix::fs::seek(file, SeekFrom::Hole(offset))?;
            Ok((true, hole.saturating_sub(offset).min(len)))
        }
        Err(rustix::io::Errno::NXIO) => Ok((false, len)),
        // A file system, or a device, that does not know.
        Err(rustix::io::Errno::INVAL) => Ok((true, len)),
        Err(error) => Err(error.into()),
    }
}

fn read_bytes(disk: &Disk, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    match &disk.format {
        Format::Raw(raw) => raw.read_bytes(bytes, offset),
        Format::Qcow2(image) => image.read_bytes(bytes, offset),
    }
}

/// Where the copy goes. All of it reads as zeroes at first.
enum Sink<'a> {
    Raw(&'a File),
    Qcow2(Box<Access>),
}

impl<'a> Sink<'a> {
    fn over(file: &'a File, size: u64, format: DiskFormat) -> io::Result<Self> {
        if format == DiskFormat::Raw {
            file.set_len(size)?;
            return Ok(Self::Raw(file));
        }
        make_qcow2(file, size, None)?;
        let storage = imago::file::File::try_from(file.try_clone()?)?;
        let image = ImagoQcow2::<imago::file::File, Access>::builder(storage).write(true).backing(None).data_file(None);
        Ok(Self::Qcow2(Box::new(FormatAccess::new(image.open(DenyImplicitOpenGate::default())?))))
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.write_all_at(bytes, offset),
            Self::Qcow2(image) => image.write(bytes, offset),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.flush(),
        }
    }
}
