//! A qcow2 disk, read and written through imago.
//!
//! imago takes slices of ordinary memory, and guest memory is none: the guest may write to it at any time. So
//! data passes through a buffer of ours. One lock guards the image, so that queues take turns.
//!
//! The image's reference counts in the file lag behind while it is written to. Its dirty bit, set before the
//! first write and cleared by [`Qcow2::close`], tells whoever opens it next whether they can be trusted.

pub mod header;
mod repair;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use imago::format::PreallocateMode;
pub use imago::qcow2::Qcow2 as ImagoQcow2;
use imago::raw::Raw as ImagoRaw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use super::file::DiskFile;
use super::{DiskError, Layer, SECTOR};
use crate::backend::host::HostFiles;
use crate::config::{Backing, DiskFormat};
use crate::memory::IoBuf;

use self::header::{Header, ImageError, set_dirty};

pub type Access = FormatAccess<imago::file::File>;

/// Bytes that pass from or to the guest at once: four clusters of the usual size.
const CHUNK: usize = 256 << 10;

/// An open image and those behind it.
#[derive(Debug)]
pub struct Qcow2 {
    state: Mutex<State>,
    pub header: Header,
    /// The files behind it, the next one first.
    pub behind: Vec<Layer>,
}

#[derive(Debug)]
struct State {
    /// None once it is closed.
    image: Option<Access>,
    /// The image's file once more, for its dirty bit.
    file: File,
    dirty: bool,
    /// Empty until it is needed.
    chunk: Vec<u8>,
}

impl Qcow2 {
    /// Opens and locks the image at `path`, and the chain of its backing files, each read-only and shared.
    ///
    /// # Errors
    /// Also where the chain is not as long as the images say.
    pub fn open(
        files: &dyn HostFiles,
        path: &Path,
        read_only: bool,
        backing: &[Backing],
    ) -> Result<(Self, u64), DiskError> {
        let (header, file, block_size) = open_file(files, path, read_only)?;
        let again = file.try_clone().map_err(|source| DiskError::Open { path: path.to_owned(), source })?;
        let mut behind = Vec::new();
        let image = access(files, path, file, &header, !read_only, backing, &mut behind)?;
        let state = State { image: Some(image), file: again, dirty: false, chunk: Vec::new() };
        let block_size = block_size.max(header.cluster_size());
        Ok((Self { state: Mutex::new(state), header, behind }, block_size))
    }

    /// The image's own file.
    pub fn top(&self, path: &Path) -> io::Result<Layer> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Layer::new(path.to_owned(), DiskFormat::Qcow2, &state.file)
    }

    pub fn read(&self, buf: &mut IoBuf, mut offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        if let Some(call) = before_wait {
            call();
        }
        self.with(|image, chunk| {
            while !buf.is_empty() {
                let part = part_of(chunk, buf.len());
                image.read(&mut *part, offset)?;
                buf.copy_from(part);
                buf.trim_front(part.len());
                offset += part.len() as u64;
            }
            Ok(())
        })
    }

    pub fn write(&self, buf: &mut IoBuf, mut offset: u64, before_wait: Option<&mut dyn FnMut()>) -> io::Result<()> {
        if let Some(call) = before_wait {
            call();
        }
        self.change(|image, chunk| {
            while !buf.is_empty() {
                let part = part_of(chunk, buf.len());
                buf.copy_to(part);
                image.write(&*part, offset)?;
                buf.trim_front(part.len());
                offset += part.len() as u64;
            }
            Ok(())
        })
    }

    /// Reads into memory of ours.
    pub fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|image, _| image.read(bytes, offset))
    }

    pub fn flush(&self) -> io::Result<()> {
        self.with(|image, _| {
            image.flush()?;
            image.sync()
        })
    }

    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_less_than_a_cluster() {
            return self.write_zero_bytes(offset, len);
        }
        self.change(|image, _| image.discard_to_zero(offset, len))
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if self.is_less_than_a_cluster() {
            return self.write_zero_bytes(offset, len);
        }
        self.change(|image, _| match may_unmap {
            true => image.discard_to_zero(offset, len),
            false => image.write_zeroes(offset, len),
        })
    }

    /// imago 0.2.6 takes a cluster from the disk's end to find the last whole one, and stops if there is none.
    fn is_less_than_a_cluster(&self) -> bool {
        self.header.size < self.header.cluster_size()
    }

    fn write_zero_bytes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        self.change(|image, chunk| {
            while offset < end {
                let part = part_of(chunk, (end - offset) as usize);
                part.fill(0);
                image.write(&*part, offset)?;
                offset += part.len() as u64;
            }
            Ok(())
        })
    }

    /// Makes the disk larger; what is new reads as zeroes, whatever is behind it.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        let mode = if self.header.backing.is_some() { PreallocateMode::Zero } else { PreallocateMode::None };
        self.change(|image, _| image.resize_grow(bytes, mode))
    }

    /// Brings an image in order that was not closed cleanly. Returns whether it was in order already.
    pub fn repair(files: &dyn HostFiles, path: &Path) -> Result<bool, DiskError> {
        let (header, ..) = open_file(files, path, false)?;
        Ok(!header.dirty)
    }

    /// How many bytes from `offset` on are all data, or all known to be zeroes; and which.
    pub fn extent(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        self.with(|image, _| {
            let (mapping, len) = image.get_mapping(offset, len)?;
            Ok((!matches!(mapping, imago::Mapping::Zero { .. } | imago::Mapping::Eof { .. }), len))
        })
    }

    /// Brings the image to rest: all of it on stable storage, and marked as closed cleanly. It is of no use
    /// afterwards.
    pub fn close(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = state.image.take() else { return Ok(()) };
        if !state.dirty {
            return Ok(());
        }
        image.flush()?;
        image.sync()?;
        drop(image);
        set_dirty(&state.file, false)
    }

    fn with<T>(&self, call: impl FnOnce(&mut Access, &mut Vec<u8>) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { image, chunk, .. } = &mut *state;
        let image = image.as_mut().ok_or_else(|| io::Error::other("the image is closed"))?;
        call(image, chunk).map_err(|error| match error.kind() {
            // What raw disks say to it.
            io::ErrorKind::Unsupported => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
            _ => error,
        })
    }

    /// As [`Self::with`], for what changes the image.
    fn change<T>(&self, call: impl FnOnce(&mut Access, &mut Vec<u8>) -> io::Result<T>) -> io::Result<T> {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.dirty && state.image.is_some() {
                set_dirty(&state.file, true)?;
                state.dirty = true;
            }
        }
        self.with(call)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("a qcow2 image could not be closed: {error}");
        }
    }
}

/// The start of the chunk buffer, which has its memory from now on.
fn part_of(chunk: &mut Vec<u8>, wanted: usize) -> &mut [u8] {
    if chunk.is_empty() {
        chunk.resize(CHUNK, 0);
    }
    &mut chunk[..wanted.min(CHUNK)]
}

/// Opens an image's file, checks its header and, if it may be written, brings its reference counts in order. The
/// header is the one from before that.
fn open_file(files: &dyn HostFiles, path: &Path, read_only: bool) -> Result<(Header, File, u64), DiskError> {
    let DiskFile { file, size, block_size } = DiskFile::open(files, path, read_only)?;
    let image = |source| DiskError::Image { path: path.to_owned(), source };
    let header = Header::read(&file, size).map_err(image)?;
    if header.size < SECTOR {
        return Err(DiskError::Empty { path: path.to_owned() });
    }
    if read_only {
        return if header.dirty { Err(image(ImageError::Dirty)) } else { Ok((header, file, block_size)) };
    }
    header.check_writable().map_err(image)?;
    let sound = repair::counts_are_sound(&file, size, &header).map_err(image)?;
    if header.dirty || !sound {
        let why = if header.dirty { "it was not closed cleanly" } else { "its reference counts have gaps" };
        tracing::warn!("disk {}: {why}; its reference counts are made anew", path.display());
        repair::rebuild_refcounts(&file, size, &header).map_err(image)?;
        set_dirty(&file, false).map_err(|error| image(error.into()))?;
    }
    Ok((header, file, block_size))
}

/// Puts imago onto the file, and the chain of backing files behind it, which are added to `layers`.
fn access(
    files: &dyn HostFiles,
    path: &Path,
    file: File,
    header: &Header,
    writable: bool,
    backing: &[Backing],
    layers: &mut Vec<Layer>,
) -> Result<Access, DiskError> {
    let behind = match (&header.backing, backing) {
        (None, []) => None,
        (None, [_, ..]) => return Err(DiskError::NoBacking { path: path.to_owned() }),
        (Some(name), []) => {
            let format = header.backing_format.clone();
            return Err(DiskError::BackingNotNamed { path: path.to_owned(), name: name.clone(), format });
        }
        (Some(_), [first, rest @ ..]) => Some(layer(files, path, header, first, rest, layers)?),
    };
    let fail = |source: io::Error| DiskError::Image { path: path.to_owned(), source: source.into() };
    let storage = imago::file::File::try_from(file).map_err(fail)?;
    let image = ImagoQcow2::builder(storage).write(writable).backing(behind).data_file(None);
    Ok(FormatAccess::new(image.open(DenyImplicitOpenGate::default()).map_err(fail)?))
}

/// Opens a backing file: read-only, with a shared lock.
fn layer(
    files: &dyn HostFiles,
    above: &Path,
    header: &Header,
    backing: &Backing,
    rest: &[Backing],
    layers: &mut Vec<Layer>,
) -> Result<Access, DiskError> {
    let path = &backing.path;
    let format = match (backing.format, header.backing_format.as_deref()) {
        (Some(format), _) => format,
        (None, Some("raw") | None) => DiskFormat::Raw,
        (None, Some(format)) => {
            return Err(DiskError::BackingFormat { path: above.to_owned(), format: format.to_owned() });
        }
    };
    let fail = |source: io::Error| DiskError::Open { path: path.clone(), source };
    match format {
        DiskFormat::Qcow2 => {
            let (header, file, _) = open_file(files, path, true)?;
            layers.push(Layer::new(path.clone(), format, &file).map_err(fail)?);
            access(files, path, file, &header, false, rest, layers)
        }
        DiskFormat::Raw if !rest.is_empty() => Err(DiskError::NoBacking { path: path.clone() }),
        DiskFormat::Raw => {
            let file = DiskFile::open(files, path, true)?.file;
            if backing.format.is_none() && header::looks_like_qcow2(&file).map_err(fail)? {
                return Err(DiskError::LooksLikeQcow2 { path: path.clone(), option: "backing-format" });
            }
            layers.push(Layer::new(path.clone(), format, &file).map_err(fail)?);
            let storage = imago::file::File::try_from(file).map_err(fail)?;
            let raw = ImagoRaw::builder(storage).write(false).open(DenyImplicitOpenGate::default());
            Ok(FormatAccess::new(raw.map_err(fail)?))
        }
    }
}

#[cfg(test)]
mod tests;
