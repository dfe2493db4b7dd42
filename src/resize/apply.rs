//! The steps that give disks another size, each of which can be done again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::statvfs;

use super::ext::Tools;
use super::gpt::{Gpt, GptError};
use super::layout::{Content, Layout};
use super::{Followup, ResizeError, copy_of, device};
use crate::backend::disk::{DiskError, tools};
use crate::config::{DiskConfig, DiskFormat, MemorySize};
use crate::store::Definition;

/// What was done to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    pub id: String,
    pub report: String,
    /// What it was before, if that could be kept.
    pub kept: Option<Kept>,
}

/// A disk as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    path: PathBuf,
    copy: PathBuf,
}

impl Done {
    /// Puts the disk back as it was; `false` if that was not kept.
    ///
    /// # Errors
    /// The host's.
    pub fn undo(&self) -> Result<bool, ResizeError> {
        let Some(Kept { path, copy }) = &self.kept else { return Ok(false) };
        fs::rename(copy, path).map_err(|source| ResizeError::File { path: path.clone(), source })?;
        Ok(true)
    }
}

/// Removes what was kept of disks, by this resize or one that was killed.
pub fn give_up_copies(definition: &Definition) {
    for disk in &definition.vm.disks {
        let _ = fs::remove_file(copy_of(&disk.path));
    }
}

/// Gives disks the sizes that `definition` has for them, and strikes these out. `keep`: what they were is kept beside
/// them where that takes no space. Nobody else may have them. `save` is called with each step to come, so that it is known to
/// whoever goes on if we are killed.
///
/// # Errors
/// What keeps one from its size, or `save`'s. Those before have theirs, and are struck out.
pub fn apply<E: From<ResizeError>>(
    definition: &mut Definition,
    keep: bool,
    mut save: impl FnMut(&Definition) -> Result<(), E>,
) -> Result<Vec<Done>, E> {
    let mut all = Vec::new();
    while let Some((id, size)) = definition.disk_sizes.first_key_value().map(|(id, size)| (id.clone(), *size)) {
        if let Some(index) = definition.vm.disks.iter().position(|disk| disk.id.as_deref() == Some(&id)) {
            let goes_on = definition.resizing.replace(id.clone()).as_ref() == Some(&id);
            save(definition)?;
            let disk = &definition.vm.disks[index];
            let (report, kept) = resize(disk, index, size, keep, goes_on)?;
            all.push(Done { id: id.clone(), report, kept });
        }
        definition.disk_sizes.remove(&id);
        definition.resizing = None;
    }
    Ok(all)
}

fn resize(
    disk: &DiskConfig,
    index: usize,
    size: MemorySize,
    keep: bool,
    goes_on: bool,
) -> Result<(String, Option<Kept>), ResizeError> {
    if disk.image.format == Some(DiskFormat::Qcow2) {
        tools::resize(&disk.path, size.0, DiskFormat::Qcow2, &disk.image.backing, false)?;
        return Ok((format!("it has {size}; {}", Followup::of_unknown(index)), None));
    }
    let (file, old) = if goes_on { open_patiently(&disk.path) } else { tools::open_alone(&disk.path) }?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(ResizeError::BlockDevice(disk.path.clone()));
    }
    // What is half moved is not worth keeping.
    let kept = if keep && !goes_on { keep_copy(&disk.path, &file)? } else { None };
    let done = RawDisk { path: &disk.path, file: &file, old, index, goes_on }.resize(size);
    match (done, kept) {
        (Ok(report), kept) => Ok((report, kept)),
        (Err(error), kept) => {
            // It may have been grown without what is on it: as it was, it is of more use.
            if let Some(kept) = kept
                && fs::rename(&kept.copy, &kept.path).is_err()
            {
                let _ = fs::remove_file(&kept.copy);
            }
            Err(error)
        }
    }
}

/// A tool of somebody who was killed may be at it still, and comes to its end.
fn open_patiently(path: &Path) -> Result<(File, u64), DiskError> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match tools::open_alone(path) {
            Err(DiskError::Locked { .. }) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            opened => return opened,
        }
    }
}

/// A copy that shares all blocks, where the host's file system can do that.
fn keep_copy(path: &Path, file: &File) -> Result<Option<Kept>, ResizeError> {
    let copy = copy_of(path);
    let failed = |source| ResizeError::Keep { path: path.to_owned(), source };
    let metadata = file.metadata().map_err(failed)?;
    let _ = fs::remove_file(&copy);
    let target = File::create_new(&copy).map_err(failed)?;
    if rustix::fs::ioctl_ficlone(&target, file).is_err() {
        let _ = fs::remove_file(&copy);
        return Ok(None);
    }
    let owned = std::os::unix::fs::fchown(&target, Some(metadata.uid()), Some(metadata.gid()));
    owned.and_then(|()| target.set_permissions(metadata.permissions())).map_err(failed)?;
    Ok(Some(Kept { path: path.to_owned(), copy }))
}

struct RawDisk<'a> {
    path: &'a Path,
    file: &'a File,
    old: u64,
    index: usize,
    /// Was it begun by somebody who was killed?
    goes_on: bool,
}

/// How a disk is divided when it has its new size.
struct Target {
    table: Option<Gpt>,
    /// For what fills it, in bytes.
    room: u64,
}

impl Target {
    fn of(path: &Path, layout: &Layout, size: u64) -> Result<Self, ResizeError> {
        let table = layout.table.as_ref().map(|table| table.resized(size)).transpose();
        let table = table.map_err(|source| ResizeError::Table { path: path.to_owned(), source })?;
        let room = table.as_ref().and_then(Gpt::last_partition).map_or(size, |part| part.len());
        Ok(Self { table, room })
    }
}

/// Is there anything in the way of a smaller disk that can be told without touching it?
pub(super) fn may_shrink(path: &Path, layout: &Layout, size: u64) -> Result<(), ResizeError> {
    let target = Target::of(path, layout, size)?;
    let is_cut = layout.partition.is_none_or(|part| part.len() > target.room);
    match &layout.content {
        Content::Ext { .. } => Ok(()),
        _ if !is_cut => Ok(()),
        Content::Other(name) => Err(ResizeError::ShrinkOther { path: path.to_owned(), content: (*name).to_owned() }),
        Content::Unknown => {
            Err(ResizeError::ShrinkOther { path: path.to_owned(), content: "something unknown".to_owned() })
        }
    }
}

/// Has the host room for what resize2fs writes to `more` bytes of an ext file system? It must not get stuck in its midst.
pub(super) fn has_room(path: &Path, more: u64) -> Result<(), ResizeError> {
    // Inodes of 256 bytes for each 16 KiB are most of it.
    let needed = (more / 50).saturating_add(4 << 20);
    match statvfs(path).map(|space| space.f_bavail.saturating_mul(space.f_frsize)) {
        Ok(free) if free < needed => Err(ResizeError::NoRoom {
            path: path.to_owned(),
            needed: MemorySize(needed).rounded(),
            free: MemorySize(free).rounded(),
        }),
        _ => Ok(()),
    }
}

impl RawDisk<'_> {
    fn failed(&self) -> impl FnOnce(io::Error) -> ResizeError {
        let path = self.path.to_owned();
        move |source| ResizeError::File { path, source }
    }

    fn resize(&self, size: MemorySize) -> Result<String, ResizeError> {
        let table_error = |source: GptError| ResizeError::Table { path: self.path.to_owned(), source };
        let layout = Layout::of(self.file, self.old).map_err(table_error)?;
        if size.0 < self.old {
            may_shrink(self.path, &layout, size.0)?;
        }
        let target = Target::of(self.path, &layout, size.0)?;
        let offset = layout.offset();
        let tools = Tools::find();
        let ext = match (&layout.content, &tools) {
            (Content::Ext { bytes, block_size }, Some(tools)) => {
                // In whole blocks.
                Some((tools, *bytes, *block_size, target.room / block_size * block_size))
            }
            _ => None,
        };
        if let Some((tools, bytes, block_size, room)) = ext {
            has_room(self.path, room.saturating_sub(bytes))?;
            if self.goes_on {
                tools.mend(self.file, offset)?;
            } else {
                // Before anything is changed: one that is damaged is not moved.
                tools.check(self.file, offset)?;
            }
            if room < bytes {
                let needed = tools.minimum(self.file, offset, block_size)?;
                if needed > room {
                    let (needed, left) = (MemorySize(needed), MemorySize(room));
                    return Err(ResizeError::ShrinkBelowNeed { path: self.path.to_owned(), needed, left });
                }
            }
        } else if let Content::Ext { bytes, .. } = layout.content
            && target.room < bytes
        {
            return Err(ResizeError::NoTools(self.path.to_owned()));
        }

        if size.0 > self.old {
            self.file.set_len(size.0).map_err(self.failed())?;
        }
        let resize_ext = |wanted: bool| match ext {
            Some((tools, _, _, room)) if wanted => tools.resize(self.file, offset, room).inspect_err(|_| {
                // It may have got stuck on its way.
                let _ = tools.mend(self.file, offset);
            }),
            _ => Ok(()),
        };
        let shrinks = ext.is_some_and(|(_, bytes, _, room)| room < bytes);
        let grows = ext.is_some_and(|(_, bytes, _, room)| room > bytes);
        resize_ext(shrinks)?;
        if let Some(table) = target.table.as_ref().filter(|table| layout.table.as_ref() != Some(table)) {
            table.write(self.file).map_err(self.failed())?;
        }
        resize_ext(grows)?;
        if size.0 < self.old {
            self.file.set_len(size.0).map_err(self.failed())?;
        }
        self.file.sync_all().map_err(self.failed())?;
        Ok(self.report(size, &layout, ext.is_some()))
    }

    fn report(&self, size: MemorySize, layout: &Layout, with_ext: bool) -> String {
        let number = layout.partition.map(|part| part.number);
        let part = number.map(|number| format!(", its partition {number} goes to the end")).unwrap_or_default();
        let rest = if with_ext {
            ", and its ext4 file system fills it".to_owned()
        } else {
            format!("; {}", Followup::of(layout, self.index, false))
        };
        format!("{} has {size}{part}{rest}", device(self.index))
    }
}
