//! New, empty disks.

use std::fs::File;
use std::io;
use std::path::Path;

use imago::FormatCreateBuilder;

use super::new_file::NewFile;
use super::{ToolError, check_size};
use crate::backend::disk::file::DiskFile;
use crate::backend::disk::qcow2::header::{Header, looks_like_qcow2};
use crate::backend::disk::qcow2::{Access, ImagoQcow2};
use crate::backend::disk::{DiskError, SECTOR};
use crate::backend::{HostFiles, OpenDirectly};
use crate::config::{Backing, DiskFormat};

/// The longest name of a backing file that a qcow2 image can hold.
const MAX_NAME: usize = 1023;

/// Makes an empty disk of `size` bytes; over a backing file, it has that one's size if none is given.
///
/// # Errors
/// Where the file is there already and not to be replaced (`force`), or cannot be written.
pub fn create(
    path: &Path,
    size: Option<u64>,
    format: DiskFormat,
    backing: Option<&Backing>,
    force: bool,
) -> Result<(), ToolError> {
    let behind = backing.map(|backing| behind(path, backing, &OpenDirectly)).transpose()?;
    let size = size.or(behind.as_ref().map(|behind| behind.size.next_multiple_of(SECTOR))).unwrap_or(0);
    check_size(size)?;
    let new = NewFile::start(path, force)?;
    let made = match format {
        DiskFormat::Raw => new.file.set_len(size),
        DiskFormat::Qcow2 => make_qcow2(&new.file, size, behind),
    };
    made.map_err(|source| ToolError::Write { path: path.to_owned(), source })?;
    new.finish()
}

/// Makes an empty image in an empty file, at `path`, over a file that nobody writes to any more.
///
/// # Errors
/// Where the file behind it is no disk, or the image cannot be written.
pub fn make_overlay(file: &File, path: &Path, backing: &Backing, host: &dyn HostFiles) -> Result<(), ToolError> {
    let behind = behind(path, backing, host)?;
    // As a disk, it had no more than its whole sectors.
    let size = behind.size - behind.size % SECTOR;
    make_qcow2(file, size, Some(behind)).map_err(|source| ToolError::Write { path: path.to_owned(), source })
}

/// A backing file, as an image over it will have to know it.
pub(super) struct Behind {
    name: String,
    format: DiskFormat,
    size: u64,
}

/// Makes an empty image in an empty file.
pub(super) fn make_qcow2(file: &File, size: u64, behind: Option<Behind>) -> io::Result<()> {
    let storage = imago::file::File::try_from(file.try_clone()?)?;
    let mut builder = ImagoQcow2::<imago::file::File, Access>::create_builder(storage).size(size);
    if let Some(Behind { name, format, .. }) = behind {
        let format = match format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        builder = builder.backing(name, format.into());
    }
    builder.create()
}

fn behind(image: &Path, backing: &Backing, host: &dyn HostFiles) -> Result<Behind, ToolError> {
    let path = &backing.path;
    let read = |source| ToolError::Read { path: path.clone(), source };
    let opened = DiskFile::open(host, path, true)?;
    let size = match backing.format {
        Some(DiskFormat::Qcow2) => {
            let header = Header::read(&opened.file, opened.size);
            header.map_err(|source| DiskError::Image { path: path.clone(), source })?.size
        }
        None if looks_like_qcow2(&opened.file).map_err(read)? => {
            return Err(DiskError::LooksLikeQcow2 { path: path.clone(), option: "format" }.into());
        }
        Some(DiskFormat::Raw) | None => opened.size,
    };
    // Its name is for QEMU, and for people: we never follow it. It is relative to the image's directory.
    let whole = host.canonical(path).map_err(read)?;
    let directory = match image.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => host.canonical(parent),
        _ => host.canonical(Path::new(".")),
    };
    let directory = directory.map_err(|source| ToolError::Write { path: image.to_owned(), source })?;
    let name = match whole.file_name() {
        Some(name) if whole.parent() == Some(&directory) => Path::new(name),
        _ => &whole,
    };
    let name = name.to_str().filter(|name| name.len() <= MAX_NAME);
    let name = name.ok_or_else(|| ToolError::BackingName { path: path.clone() })?.to_owned();
    Ok(Behind { name, format: backing.format.unwrap_or(DiskFormat::Raw), size })
}
