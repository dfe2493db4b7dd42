//! Disks in a snapshot: the files that they were made of, as they were then.
//!
//! A file that nobody may write to gets one more name. Others are copied, which takes no time where the file system lets
//! files share their blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::folder::{Folder, parent};
use super::manifest::PartEntry;
use super::memory_digest::digest;
use crate::backend::disk::Layer;
use crate::backend::{Deed, HostFile, HostFiles};
use crate::config::{Backing, DiskFormat, SavedDisk};
use crate::memory::saved::copy_data;

/// The directory in a snapshot that has the files of its disks.
pub const DISKS: &str = "disks";

/// A disk's file in a snapshot that is being written.
#[derive(Debug)]
pub struct StoredFile {
    /// Its path in the snapshot.
    pub name: String,
    file: File,
    /// What another snapshot knows of the same file.
    known: Option<PartEntry>,
}

/// Puts the files of the disk of some number into a snapshot's directory, and has `disk` lie in them.
pub fn store(
    host: &dyn HostFiles,
    folder: &Path,
    number: usize,
    disk: &mut SavedDisk,
    layers: &[Layer],
) -> io::Result<Vec<StoredFile>> {
    match host.perform(&Deed::MakeDir(folder.join(DISKS))) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    let mut stored = Vec::with_capacity(layers.len());
    let mut places = Vec::with_capacity(layers.len());
    for (depth, layer) in layers.iter().enumerate() {
        let kind = match layer.format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        let name = format!("{DISKS}/{number}.{depth}.{kind}");
        let is_written_to = depth == 0 && !disk.config.read_only;
        stored.push(store_file(host, folder, name.clone(), layer, is_written_to)?);
        places.push(Backing { path: PathBuf::from(name), format: Some(layer.format) });
    }
    if !places.is_empty() {
        let Backing { path, format } = places.remove(0);
        (disk.stored, disk.config.path) = (true, path);
        (disk.config.image.format, disk.config.image.backing) = (format, places);
    }
    Ok(stored)
}

fn store_file(
    host: &dyn HostFiles,
    folder: &Path,
    name: String,
    layer: &Layer,
    is_written_to: bool,
) -> io::Result<StoredFile> {
    let (path, metadata) = (folder.join(&name), layer.file.metadata()?);
    let never_changes = metadata.is_file() && metadata.mode() & 0o222 == 0 && !is_written_to;
    if never_changes && host.link(&layer.file, &path).is_ok() {
        let file = host.open(&HostFile::Read(path))?;
        return Ok(StoredFile { file, known: known_part(host, &layer.path, &name), name });
    }
    let file = host.open(&HostFile::New(path.clone()))?;
    let bytes = crate::backend::disk::file_size(&layer.file)?;
    file.set_len(bytes)?;
    copy_data(&layer.file, &file, 0..bytes)?;
    layer.mark_copy_as_closed(&file)?;
    host.perform(&Deed::MakeReadOnly(path))?;
    Ok(StoredFile { name, file, known: None })
}

/// What the snapshot that a file lies in says of it: it need not be read once more for that.
fn known_part(host: &dyn HostFiles, path: &Path, new_name: &str) -> Option<PartEntry> {
    let (folder, name) = (parent(parent(path)), path.file_name()?.to_str()?);
    let manifest = Folder::read_manifest(folder, host).ok()?;
    let part = manifest.part(&format!("{DISKS}/{name}"))?;
    Some(PartEntry { name: new_name.to_owned(), ..part.clone() })
}

impl StoredFile {
    /// Brings it to stable storage.
    pub fn finish(self) -> io::Result<PartEntry> {
        if let Some(known) = self.known {
            return Ok(known);
        }
        self.file.sync_data()?;
        Ok(PartEntry { name: self.name, size: self.file.metadata()?.len(), sha256: digest(&self.file)? })
    }
}
