//! The files that a disk's bytes lie in.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::qcow2::header::set_dirty;
use super::{Disk, Format};
use crate::config::DiskFormat;

/// One of a disk's files; what is not in it is in those behind it.
#[derive(Debug)]
pub struct Layer {
    pub path: PathBuf,
    pub format: DiskFormat,
    /// The same open file that the disk has: its lock goes with it.
    pub file: File,
}

impl Layer {
    pub(super) fn new(path: PathBuf, format: DiskFormat, file: &File) -> io::Result<Self> {
        Ok(Self { path, format, file: file.try_clone()? })
    }

    /// Says of a copy, made while the disk was flushed and at rest, that it is in order.
    ///
    /// # Errors
    /// The host's.
    pub fn mark_copy_as_closed(&self, copy: &File) -> io::Result<()> {
        match self.format {
            DiskFormat::Raw => Ok(()),
            DiskFormat::Qcow2 => set_dirty(copy, false),
        }
    }
}

impl Disk {
    /// The files, the one that is written to first.
    ///
    /// # Errors
    /// When this process has too many files open.
    pub fn layers(&self) -> io::Result<Vec<Layer>> {
        match &self.format {
            Format::Raw(raw) => {
                let file = File::from(raw.file().try_clone_to_owned()?);
                Ok(vec![Layer { path: self.path.clone(), format: DiskFormat::Raw, file }])
            }
            Format::Qcow2(image) => {
                let behind = image.behind.iter().map(|layer| Layer::new(layer.path.clone(), layer.format, &layer.file));
                std::iter::once(image.top(&self.path)).chain(behind).collect()
            }
        }
    }
}
