//! Larger and smaller disks, and mended ones.

use std::fs::File;
use std::path::Path;

use super::{ToolError, check_size};
use crate::backend::OpenDirectly;
use crate::backend::disk::DiskError;
use crate::backend::disk::file::DiskFile;
use crate::backend::disk::qcow2::Qcow2;
use crate::config::{Backing, DiskFormat};

/// Makes the disk `size` bytes large, smaller only if `shrink` says so. Nobody else may have it. Returns the size
/// it had.
///
/// # Errors
/// Where that would lose data, or cannot be done.
pub fn resize(path: &Path, size: u64, format: DiskFormat, backing: &[Backing], shrink: bool) -> Result<u64, ToolError> {
    check_size(size)?;
    let write = |source| ToolError::Write { path: path.to_owned(), source };
    let smaller = |from: u64| match () {
        () if size >= from => Ok(()),
        () if format == DiskFormat::Qcow2 => Err(ToolError::ShrinkQcow2),
        () if shrink => Ok(()),
        () => Err(ToolError::Shrink { path: path.to_owned(), from, to: size }),
    };
    match format {
        DiskFormat::Raw => {
            let DiskFile { file, size: old, .. } = DiskFile::open(&OpenDirectly, path, false)?;
            if !file.metadata().map_err(write)?.is_file() {
                return Err(ToolError::BlockDevice { path: path.to_owned() });
            }
            smaller(old)?;
            file.set_len(size).and_then(|()| file.sync_all()).map_err(write)?;
            Ok(old)
        }
        DiskFormat::Qcow2 => {
            let (image, _) = Qcow2::open(&OpenDirectly, path, false, backing)?;
            smaller(image.header.size)?;
            image.grow(size).and_then(|()| image.close()).map_err(write)?;
            Ok(image.header.size)
        }
    }
}

/// Opens a disk for a look, and tells its size in bytes. It may be a running VM's.
///
/// # Errors
/// Where it is no disk.
pub fn look(path: &Path) -> Result<(File, u64), DiskError> {
    let (DiskFile { file, size, .. }, _) = DiskFile::look(&OpenDirectly, path)?;
    Ok((file, size))
}

/// Opens a disk that nobody else has, to be changed, and tells its size in bytes. Nobody else can have it meanwhile.
///
/// # Errors
/// Where it is no disk, or somebody has it.
pub fn open_alone(path: &Path) -> Result<(File, u64), DiskError> {
    let DiskFile { file, size, .. } = DiskFile::open(&OpenDirectly, path, false)?;
    Ok((file, size))
}

/// Brings a qcow2 image in order that was not closed cleanly. Returns whether it was in order already.
///
/// # Errors
/// Where it is damaged in other ways.
pub fn repair(path: &Path) -> Result<bool, ToolError> {
    Ok(Qcow2::repair(&OpenDirectly, path)?)
}
