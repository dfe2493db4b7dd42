//! Why a VM does not get another size.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::gpt::GptError;
use crate::backend::disk::DiskError;
use crate::backend::disk::tools::ToolError;
use crate::config::MemorySize;
use crate::store::DefinitionError;

#[derive(Debug, Error)]
pub enum ResizeError {
    #[error("the VM has no disk '{id}'{}", list(.known))]
    NoSuchDisk { id: String, known: Vec<String> },
    #[error("'{0}' is the root disk: it stays")]
    RootDisk(String),
    #[error("the disk '{0}' is read-only: nothing of it changes, nor its size")]
    ReadOnly(String),
    #[error("{0} is no size for a disk: it has to be a multiple of 512 bytes")]
    Size(MemorySize),
    #[error("{} is a running VM's: only raw disks get another size then, and become larger", .0.display())]
    Live(PathBuf),
    #[error("{} is a block device, whose size is not ours to change", .0.display())]
    BlockDevice(PathBuf),
    #[error("the qcow2 image {} cannot be made smaller", .0.display())]
    ShrinkQcow2(PathBuf),
    #[error("{} cannot be made so small: {content} is on it, and nobody here knows how much of the disk it needs", path.display())]
    ShrinkOther { path: PathBuf, content: String },
    #[error("{} cannot be made so small: its file system needs {needed}, and would have {left}", path.display())]
    ShrinkBelowNeed { path: PathBuf, needed: MemorySize, left: MemorySize },
    #[error("{} cannot be made smaller without e2fsck and resize2fs, which this host does not have", .0.display())]
    NoTools(PathBuf),
    #[error(
        "{} cannot become so much larger: {needed} are needed at once, for its file system's own tables, and the host's has {free}",
        path.display()
    )]
    NoRoom { path: PathBuf, needed: MemorySize, free: MemorySize },
    #[error("{} cannot be divided anew", path.display())]
    Table { path: PathBuf, source: GptError },
    #[error("{tool} says no ({how}): {said}")]
    Tool { tool: &'static str, how: String, said: String },
    #[error("cannot run {}", path.display())]
    Start { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("cannot keep what {} is now", path.display())]
    Keep { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Image(#[from] ToolError),
    #[error("the VM cannot be like that")]
    Definition(#[from] DefinitionError),
}

fn list(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!(": it has {}", known.join(", ")) }
}

impl ResizeError {
    /// What the user may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Disk(error) => return error.hint(),
            Self::Image(error) => return error.hint(),
            Self::BlockDevice(_) => "give it another size with its own tools, such as lvextend".into(),
            Self::Live(_) => "leave --live out: it gets the new size by the VM's next start".into(),
            Self::ShrinkQcow2(_) => "copy what is on it to a smaller disk".into(),
            Self::ShrinkOther { .. } => "make what is on it smaller first, in the guest, and its partition".into(),
            Self::ShrinkBelowNeed { needed, .. } => format!("remove files from it, or give {needed} and a little more"),
            Self::NoRoom { .. } => "make room there".into(),
            Self::NoTools(_) => "install e2fsprogs".into(),
            Self::Table { source: GptError::NoRoom(_), .. } => return None,
            Self::Table { .. } => "'sgdisk --verify' tells more, and 'sgdisk -e' may mend it".into(),
            Self::Tool { .. } => "nothing was cut off; 'e2fsck -f' on a copy of the disk tells more".into(),
            Self::File { source, .. } | Self::Keep { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "make room there".into()
            }
            Self::Size(_) => "give a size such as 10G".into(),
            Self::NoSuchDisk { .. }
            | Self::RootDisk(_)
            | Self::ReadOnly(_)
            | Self::Start { .. }
            | Self::File { .. }
            | Self::Keep { .. }
            | Self::Definition(_) => return None,
        })
    }
}
