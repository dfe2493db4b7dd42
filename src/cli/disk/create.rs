//! `tranche disk create`: an empty disk, or an image over another disk.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use crate::backend::disk::tools::{ToolError, create};
use crate::config::{Backing, DiskFormat, MemorySize};

/// Make an empty disk; with --backing, one that shows another disk and keeps what is changed
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The new file
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// The disk's size, such as 10G; over a backing file, that one's if absent
    #[arg(value_name = "SIZE", required_unless_present = "backing")]
    size: Option<MemorySize>,

    /// Its format: raw, or qcow2, which takes only the space that is written
    #[arg(long, value_name = "raw|qcow2", default_value = "raw", value_parser = DiskFormat::from_str)]
    format: DiskFormat,

    /// The disk behind a qcow2 image, from which is read what the image does not have
    #[arg(long, value_name = "PATH[,format=raw|qcow2]")]
    backing: Option<Backing>,

    /// Replace the file if it is there and not in use
    #[arg(long)]
    force: bool,
}

pub fn run(args: &CreateArgs) -> Result<(), ToolError> {
    create(&args.path, args.size.map(|size| size.0), args.format, args.backing.as_ref(), args.force)
}
