//! What can be told of a disk without changing it, even while it is in use.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use super::ToolError;
use crate::backend::OpenDirectly;
use crate::backend::disk::DiskError;
use crate::backend::disk::file::{DiskFile, Use as FileUse};
use crate::backend::disk::qcow2::header::{Header, looks_like_qcow2};
use crate::config::DiskFormat;

pub use crate::backend::disk::file::Use;

/// Sizes are in bytes.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct DiskInfo {
    pub format: &'static str,
    /// Its first bytes are a qcow2 image's. Only the user can know what it is.
    pub looks_like_qcow2: bool,
    /// The disk's size, as a guest sees it.
    pub size: u64,
    /// The file's size, and how much storage it takes.
    pub file_size: u64,
    pub allocated: u64,
    pub in_use: Use,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2Info>,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct Qcow2Info {
    pub version: u32,
    pub cluster_size: u64,
    /// What the image calls the file behind it, and that file's format. Nobody follows this.
    pub backing: Option<String>,
    pub backing_format: Option<String>,
    pub snapshots: u32,
    /// Written to now, or not closed cleanly.
    pub dirty: bool,
}

/// Looks at the disk at `path`, as one of that format.
///
/// # Errors
/// Where it cannot be read, or is not of that format.
pub fn info(path: &Path, format: DiskFormat) -> Result<DiskInfo, ToolError> {
    let read = |source| ToolError::Read { path: path.to_owned(), source };
    let (DiskFile { file, size, .. }, in_use): (_, FileUse) = DiskFile::look(&OpenDirectly, path)?;
    let metadata = file.metadata().map_err(read)?;
    let mut info = DiskInfo {
        format: "raw",
        looks_like_qcow2: looks_like_qcow2(&file).map_err(read)?,
        size,
        file_size: size,
        allocated: metadata.blocks() * 512,
        in_use,
        qcow2: None,
    };
    if format == DiskFormat::Qcow2 {
        let header = Header::read(&file, size);
        let header = header.map_err(|source| DiskError::Image { path: path.to_owned(), source })?;
        info.format = "qcow2";
        info.size = header.size;
        info.qcow2 = Some(Qcow2Info {
            version: header.version,
            cluster_size: header.cluster_size(),
            backing: header.backing,
            backing_format: header.backing_format,
            snapshots: header.snapshots,
            dirty: header.dirty,
        });
    }
    Ok(info)
}
