//! `tranche disk repair`: an image whose VM was killed, put in order.

use std::path::PathBuf;

use clap::Args;

use super::super::exit;
use crate::backend::disk::tools::{ToolError, repair};

/// Put a qcow2 image in order whose VM was killed; writing to it does that too
#[derive(Debug, Args)]
pub struct RepairArgs {
    /// The image
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

pub fn run(args: &RepairArgs) -> Result<(), ToolError> {
    if repair(&args.path)? {
        exit::say("it was closed cleanly: nothing to do\n");
    }
    Ok(())
}
