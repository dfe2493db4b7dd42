//! `tranche confined-tool`: this program on its way to become another one, which works on what a guest has written.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Args;

use super::exit::{self, Exit};
use crate::jail::confine_to_file;

/// Become another program, confined to the file that is the standard input
#[derive(Debug, Args)]
#[command(hide = true)]
pub struct ConfinedArgs {
    program: PathBuf,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub fn run(args: &ConfinedArgs) -> ExitCode {
    if let Err(error) = confine_to_file(io::stdin().as_fd()) {
        return ExitCode::from(exit::report_with(&error, Exit::Internal, None) as u8);
    }
    let error = Command::new(&args.program).args(&args.args).exec();
    exit::say(&format!("cannot run {}: {error}\n", args.program.display()));
    ExitCode::from(Exit::Internal as u8)
}
