//! `tranche disk convert`: a copy of a disk in another format.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::super::exit;
use crate::backend::disk::tools::{Source, ToolError, convert};
use crate::config::{Backing, DiskFormat, Image};

/// Copy a disk, with all that is behind it, to a new file; what is zeroes takes no space there
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The disk to copy; nobody may be writing to it
    #[arg(value_name = "SOURCE")]
    source: PathBuf,

    /// The new file: it appears when it is whole
    #[arg(value_name = "DESTINATION")]
    destination: PathBuf,

    /// The source's format
    #[arg(long, value_name = "raw|qcow2", value_parser = DiskFormat::from_str)]
    from: DiskFormat,

    /// The copy's format
    #[arg(long, value_name = "raw|qcow2", value_parser = DiskFormat::from_str)]
    to: DiskFormat,

    /// The disk behind a qcow2 source; given again, the one behind that
    #[arg(long, value_name = "PATH[,format=raw|qcow2]")]
    backing: Vec<Backing>,

    /// Replace the destination if it is there and not in use
    #[arg(long)]
    force: bool,
}

pub fn run(args: &ConvertArgs) -> Result<(), ToolError> {
    let image = Image { format: Some(args.from), backing: args.backing.clone() };
    let source = Source { path: &args.source, image: &image };
    let terminal = std::io::stderr().is_terminal();
    let mut shown = None;
    let mut progress = |done: u64, all: u64| {
        let percent = done.saturating_mul(100) / all.max(1);
        if terminal && shown.replace(percent) != Some(percent) {
            exit::say(&format!("\r{percent:3} %"));
        }
    };
    let done = convert(&source, &args.destination, args.to, args.force, &mut progress);
    if shown.is_some() {
        exit::say("\r     \r");
    }
    done
}
