//! `tranche disk`: makes disks, looks at them, resizes, mends and copies them, while no VM has them.

mod convert;
mod create;
mod info;
mod repair;
mod resize;

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, Subcommand};

use super::exit::{self, Exit};
use crate::backend::disk::tools::ToolError;
use crate::config::DiskFormat;
use crate::observe::init_log;

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct DiskArgs {
    #[command(subcommand)]
    verb: Verb,
}

const HELP: &str = "\
No format is ever guessed, and no backing file opened that is not named here.
Exit status: 0 done; 1 an internal error, 2 wrong usage, 30 the disk cannot be read, 31 it is in use,
32 it is no disk, 33 its image is damaged or unsupported, 34 its backing file is not (rightly) named,
35 the file cannot be written or resized, or is there already. See docs/exit-codes.md.";

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::CreateArgs),
    Info(info::InfoArgs),
    Resize(resize::ResizeArgs),
    Repair(repair::RepairArgs),
    Convert(convert::ConvertArgs),
}

pub fn run(args: DiskArgs) -> ExitCode {
    init_log(Some(tracing::Level::WARN));
    let done = match args.verb {
        Verb::Create(args) => create::run(&args),
        Verb::Info(args) => info::run(&args),
        Verb::Resize(args) => resize::run(&args),
        Verb::Repair(args) => repair::run(&args),
        Verb::Convert(args) => convert::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(exit::report_with(&error, judge(&error), error.hint()) as u8),
    }
}

fn judge(error: &ToolError) -> Exit {
    match error {
        ToolError::Disk(error) => exit::judge_disk(error),
        ToolError::Read { .. } => Exit::DiskUnreadable,
        ToolError::Size { .. } => Exit::Usage,
        _ => Exit::DiskUnwritable,
    }
}

/// The disk that most verbs are about.
#[derive(Debug, Args)]
struct DiskArg {
    /// The disk's file
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// Its format
    #[arg(long, value_name = "raw|qcow2", default_value = "raw", value_parser = DiskFormat::from_str)]
    format: DiskFormat,
}
