//! `tranche disk resize`: a larger disk, or a smaller one.

use clap::Args;

use super::DiskArg;
use crate::backend::disk::tools::{ToolError, resize};
use crate::config::{Backing, MemorySize};

/// Make a disk larger, or a raw one smaller; its partitions and file systems stay as they are
#[derive(Debug, Args)]
pub struct ResizeArgs {
    #[command(flatten)]
    disk: DiskArg,

    /// The new size
    #[arg(value_name = "SIZE")]
    size: MemorySize,

    /// The disk behind a qcow2 image; given again, the one behind that
    #[arg(long, value_name = "PATH[,format=raw|qcow2]")]
    backing: Vec<Backing>,

    /// Cut off the end, and what is there, if the new size is smaller
    #[arg(long)]
    shrink: bool,
}

pub fn run(args: &ResizeArgs) -> Result<(), ToolError> {
    let DiskArg { path, format } = &args.disk;
    resize(path, args.size.0, *format, &args.backing, args.shrink).map(drop)
}
