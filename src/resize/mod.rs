//! A named VM of another size: first a plan that says what it means, then the steps.
//!
//! What the next start is to be of is the definition's. Sizes of disks are their files', so those that are to change stand
//! in the definition until they have: whoever is killed at that has it done by the next start. Each step can be done again.

mod apply;
mod error;
mod ext;
pub(crate) mod gpt;
mod host;
pub(crate) mod layout;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::apply::{Done, apply, give_up_copies};
pub use self::error::ResizeError;
pub use self::ext::CONFINED;
pub use self::host::HostLeft;
use self::layout::{Content, Layout};
use crate::backend::disk::tools;
use crate::config::{DiskConfig, DiskFormat, MemorySize, NetBackend, NetConfig};
use crate::store::Definition;

/// What is to be changed.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub cpus: Option<u8>,
    pub memory: Option<MemorySize>,
    /// By id.
    pub disks: Vec<(String, MemorySize)>,
    pub add_disks: Vec<DiskConfig>,
    pub remove_disks: Vec<String>,
    /// All network cards, in place of those there are.
    pub nics: Option<Vec<NetConfig>>,
}

/// How the VM comes by its new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By its next start.
    NextStart,
    /// By a stop and a start that belong to it, with what can be kept for a way back.
    Restart,
    /// While it runs: of disks only, which become larger.
    Live,
}

/// What a change means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Change {
    pub what: String,
    pub from: String,
    pub to: String,
    pub needs_stop: bool,
    /// What the guest will see.
    pub guest: String,
    pub undo: String,
}

/// What is going to happen.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    pub vm: String,
    pub changes: Vec<Change>,
    /// What the host has left just now.
    pub host: HostLeft,
    /// What may not turn out well.
    pub warnings: Vec<String>,
    #[serde(skip)]
    way: Way,
    #[serde(skip)]
    pub target: Definition,
}

impl Plan {
    /// Makes a plan, and changes nothing.
    ///
    /// # Errors
    /// What cannot be, or would lose something.
    pub fn new(vm: &str, definition: &Definition, request: &Request, way: Way) -> Result<Self, ResizeError> {
        let mut plan = Self {
            vm: vm.to_owned(),
            changes: Vec::new(),
            host: HostLeft::look(),
            warnings: Vec::new(),
            way,
            target: definition.clone(),
        };
        plan.plan_cpus(request);
        plan.plan_memory(request);
        for id in &request.remove_disks {
            plan.remove_disk(id)?;
        }
        for disk in &request.add_disks {
            plan.add_disk(disk)?;
        }
        for (id, size) in &request.disks {
            plan.resize_disk(id, *size)?;
        }
        if let Some(nics) = &request.nics {
            plan.change_nics(nics);
        }
        plan.target.validate()?;
        Ok(plan)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    fn change(&mut self, what: &str, from: &dyn fmt::Display, to: &dyn fmt::Display, guest: String, undo: String) {
        let (what, from, to) = (what.to_owned(), from.to_string(), to.to_string());
        self.changes.push(Change { what, from, to, needs_stop: self.way != Way::Live, guest, undo });
    }

    fn plan_cpus(&mut self, request: &Request) {
        let from = self.target.vm.cpus;
        let Some(to) = request.cpus.filter(|&to| to != from) else { return };
        self.target.vm.cpus = to;
        if usize::from(to) > self.host.cpus {
            self.warnings.push(format!("the host has {} CPUs: {to} vCPUs take turns on them", self.host.cpus));
        }
        self.change("vCPUs", &from, &to, format!("{to} CPUs"), DEFINITION_GOES_BACK.into());
    }

    fn plan_memory(&mut self, request: &Request) {
        let from = self.target.vm.memory;
        let Some(to) = request.memory.filter(|&to| to != from) else { return };
        self.target.vm.memory = to;
        if to > self.host.memory_available {
            let (left, all) = (self.host.memory_available, self.host.memory_total);
            self.warnings.push(format!(
                "the host has {} of memory available, of {}: it may have to swap, or kill, when the guest uses its {to}",
                left.rounded(),
                all.rounded()
            ));
        }
        let guest = format!("about {to} of memory, less what its kernel keeps for itself");
        self.change("memory", &from, &to, guest, DEFINITION_GOES_BACK.into());
    }

    fn remove_disk(&mut self, id: &str) -> Result<(), ResizeError> {
        let index = self.position(id)?;
        if self.target.vm.disks[index].root {
            return Err(ResizeError::RootDisk(id.to_owned()));
        }
        let disk = self.target.vm.disks.remove(index);
        self.target.disk_sizes.remove(id);
        let last = self.target.vm.disks.len();
        let guest = match index {
            _ if index == last => format!("no {} any more", device(index)),
            _ => format!("no such disk any more; those behind {} move up by one letter", device(index)),
        };
        self.change(&named(id), &disk.path.display(), &"none", guest, "yes: its file stays as it is".into());
        Ok(())
    }

    fn add_disk(&mut self, disk: &DiskConfig) -> Result<(), ResizeError> {
        let mut disk = disk.clone();
        disk.path =
            std::path::absolute(&disk.path).map_err(|source| ResizeError::File { path: disk.path.clone(), source })?;
        let (_, size) = look_at(&disk.path)?;
        let index = self.target.vm.disks.len();
        self.target.vm.disks.push(disk);
        let id = match &self.target.vm.disks[index].id {
            Some(id) => id.clone(),
            None => self.target.free_disk_id(index),
        };
        let path = self.target.vm.disks[index].path.display().to_string();
        self.target.vm.disks[index].id = Some(id.clone());
        let guest = format!("{} of {}", device(index), MemorySize(size).rounded());
        self.change(&named(&id), &"none", &path, guest, "yes: its file stays as the guest leaves it".into());
        Ok(())
    }

    fn resize_disk(&mut self, id: &str, size: MemorySize) -> Result<(), ResizeError> {
        let (index, way) = (self.position(id)?, self.way);
        let disk = self.target.vm.disks[index].clone();
        if disk.read_only {
            return Err(ResizeError::ReadOnly(id.to_owned()));
        }
        if size.0 == 0 || !size.0.is_multiple_of(gpt::SECTOR) {
            return Err(ResizeError::Size(size));
        }
        let is_qcow2 = disk.image.format == Some(DiskFormat::Qcow2);
        let (from, layout) = if is_qcow2 {
            (tools::info(&disk.path, DiskFormat::Qcow2)?.size, None)
        } else {
            let (file, from) = look_at(&disk.path)?;
            if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
                return Err(ResizeError::BlockDevice(disk.path.clone()));
            }
            (
                from,
                Some(Layout::of(&file, from).map_err(|source| ResizeError::Table { path: disk.path.clone(), source })?),
            )
        };
        if size.0 == from && !self.target.disk_sizes.contains_key(id) {
            return Ok(());
        }
        if way == Way::Live && (is_qcow2 || size.0 < from) {
            return Err(ResizeError::Live(disk.path.clone()));
        }
        self.target.disk_sizes.insert(id.to_owned(), size);
        if size.0 < from {
            if is_qcow2 {
                return Err(ResizeError::ShrinkQcow2(disk.path.clone()));
            }
            layout.as_ref().map_or(Ok(()), |layout| apply::may_shrink(&disk.path, layout, size.0))?;
        } else if let Some(free) = self.host.look_at_disk(&disk.path)
            && size.0 - from > free.0
        {
            self.warnings.push(format!(
                "{} may take {} more, of which its file system has {} left: writes of the guest fail when it is full",
                disk.path.display(),
                MemorySize(size.0 - from).rounded(),
                free.rounded()
            ));
        }
        if let (Some(Layout { content: Content::Ext { bytes, .. }, .. }), false) = (&layout, way == Way::Live) {
            apply::has_room(&disk.path, size.0.saturating_sub(*bytes))?;
        }
        let guest = match &layout {
            None => format!("{} of {size}; {}", device(index), Followup::of_unknown(index)),
            Some(layout) if way == Way::Live => {
                format!("{} of {size} at once; {}", device(index), Followup::of(layout, index, true))
            }
            Some(layout) => format!("{} of {size}, {}", device(index), what_grows(layout, index)),
        };
        let undo = if way == Way::Restart && self.host.shares_blocks(&disk.path) {
            "yes: a copy that shares its blocks is kept until the guest is up"
        } else if size.0 < from {
            "no: what it is made of is moved together"
        } else {
            "no: it stays larger, with all that is on it"
        };
        self.change(&named(id), &MemorySize(from), &size, guest, undo.into());
        Ok(())
    }

    fn change_nics(&mut self, nics: &[NetConfig]) {
        let before = &self.target.vm.nics;
        let mut after = nics.to_vec();
        // The same place, the same card: the guest knows it by its address.
        for (nic, old) in after.iter_mut().zip(before) {
            nic.mac = nic.mac.or(old.mac);
        }
        if after == *before {
            return;
        }
        let list = |nics: &[NetConfig]| match nics.iter().map(network).collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => "none".to_owned(),
            list => list,
        };
        let (from, to) = (list(before), list(&after));
        let guest = format!("{} network cards", after.len());
        self.target.vm.nics = after;
        self.change("network cards", &from, &to, guest, DEFINITION_GOES_BACK.into());
    }

    fn position(&self, id: &str) -> Result<usize, ResizeError> {
        let disks = &self.target.vm.disks;
        disks.iter().position(|disk| disk.id.as_deref() == Some(id)).ok_or_else(|| ResizeError::NoSuchDisk {
            id: id.to_owned(),
            known: disks.iter().filter_map(|disk| disk.id.clone()).collect(),
        })
    }
}

const DEFINITION_GOES_BACK: &str = "yes: the definition goes back";

fn named(id: &str) -> String {
    format!("disk '{id}'")
}

fn network(nic: &NetConfig) -> String {
    match &nic.backend {
        NetBackend::Tap(tap) => format!("tap {}", tap.name),
        NetBackend::User(_) => "user network".into(),
    }
}

/// Opens a disk without a lock: it may be a running VM's.
fn look_at(path: &Path) -> Result<(std::fs::File, u64), ResizeError> {
    Ok(tools::look(path)?)
}

/// What a guest calls its disks.
fn device(index: usize) -> String {
    match u8::try_from(index) {
        Ok(index @ 0..26) => format!("/dev/vd{}", char::from(b'a' + index)),
        // As Linux goes on: vdaa and so on.
        _ => format!("its disk {}", index + 1),
    }
}

fn what_grows(layout: &Layout, index: usize) -> String {
    let part = layout.partition.map(|part| format!("partition {}", part.number));
    let ext_is_ours = ext::Tools::find().is_some();
    match (&layout.content, part) {
        (Content::Ext { .. }, None) if ext_is_ours => "and its ext4 file system with it".into(),
        (Content::Ext { .. }, Some(part)) if ext_is_ours => format!("and {part} and its ext4 file system with it"),
        (_, part) => {
            let grows = part.map(|part| format!("and {part} with it; ")).unwrap_or_default();
            format!("{grows}{}", Followup::of(layout, index, false))
        }
    }
}

/// What is left for the guest's owner to do, in the guest.
struct Followup<'a> {
    content: &'a Content,
    index: usize,
    partition: Option<usize>,
    /// Does the partition have to be made larger there too?
    grows_partition: bool,
}

impl<'a> Followup<'a> {
    fn of(layout: &'a Layout, index: usize, grows_partition: bool) -> Self {
        let partition = layout.partition.map(|part| part.number);
        Self { content: &layout.content, index, partition, grows_partition }
    }

    fn of_unknown(index: usize) -> Self {
        Self { content: &Content::Unknown, index, partition: None, grows_partition: false }
    }
}

impl fmt::Display for Followup<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let disk = device(self.index);
        let device = self.partition.map_or(disk.clone(), |number| format!("{disk}{number}"));
        f.write_str("then, in the guest: ")?;
        if let (true, Some(number)) = (self.grows_partition, self.partition) {
            write!(f, "growpart {disk} {number}, and ")?;
        }
        match self.content {
            Content::Ext { .. } => write!(f, "resize2fs {device}"),
            Content::Other("XFS") => write!(f, "xfs_growfs of where it is mounted"),
            Content::Other("btrfs") => write!(f, "btrfs filesystem resize max, of where it is mounted"),
            Content::Other("an LVM volume") => write!(f, "pvresize {device}"),
            Content::Other("a DOS partition table") => {
                write!(f, "growpart {disk} and the number of its last partition, and its file system")
            }
            Content::Other(name) => write!(f, "what {name} needs to fill {device}"),
            Content::Unknown => write!(f, "what its partitions and file systems need to fill it"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for change in &self.changes {
            writeln!(f, "{}: {} -> {}", change.what, change.from, change.to)?;
            writeln!(f, "  the guest sees  {}", change.guest)?;
            writeln!(f, "  needs a stop    {}", if change.needs_stop { "yes" } else { "no" })?;
            writeln!(f, "  can be undone   {}", change.undo)?;
        }
        write!(f, "{}", self.host)?;
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

/// Where what a disk was is kept until it is known that its VM is well.
fn copy_of(path: &Path) -> PathBuf {
    let mut copy = path.as_os_str().to_owned();
    copy.push(".before-resize");
    copy.into()
}

#[cfg(test)]
pub(crate) mod tests;
