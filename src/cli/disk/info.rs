//! `tranche disk info`: what can be told of a disk.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::Args;

use super::DiskArg;
use crate::backend::disk::tools::{DiskInfo, ToolError, Use, info};
use crate::config::{DiskFormat, MemorySize};

/// Tell a disk's size, what it takes on the host, and who has it; also while it is in use
#[derive(Debug, Args)]
pub struct InfoArgs {
    #[command(flatten)]
    disk: DiskArg,

    /// As JSON, sizes in bytes
    #[arg(long)]
    json: bool,
}

pub fn run(args: &InfoArgs) -> Result<(), ToolError> {
    let info = info(&args.disk.path, args.disk.format)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&info).expect("numbers and strings are JSON") + "\n",
        false => describe(&info, args.disk.format),
    };
    // Whoever closed standard output has seen enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

fn describe(info: &DiskInfo, format: DiskFormat) -> String {
    let mut text = format!("format:     {}", info.format);
    if let Some(image) = &info.qcow2 {
        let _ = write!(text, ", version {}, clusters of {}", image.version, MemorySize(image.cluster_size));
    } else if info.looks_like_qcow2 && format == DiskFormat::Raw {
        text.push_str(" (but it looks like qcow2: see --format)");
    }
    let _ = writeln!(text, "\nsize:       {} ({} bytes)", MemorySize(info.size), info.size);
    let _ = writeln!(text, "allocated:  {} bytes", info.allocated);
    if let Some(image) = &info.qcow2 {
        if let Some(name) = &image.backing {
            let format = image.backing_format.as_deref().unwrap_or("not said");
            let _ = writeln!(text, "backing:    '{}', format {}", name.escape_debug(), format.escape_debug());
        }
        if image.snapshots > 0 {
            let _ = writeln!(text, "snapshots:  {}", image.snapshots);
        }
        if image.dirty && info.in_use != Use::Writing {
            text.push_str("state:      not closed cleanly; it is put in order when it is next written to\n");
        }
    }
    let _ = writeln!(
        text,
        "in use:     {}",
        match info.in_use {
            Use::No => "no",
            Use::Reading => "for reading",
            Use::Writing => "for writing",
        }
    );
    text
}
