//! The `tranche` program.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    tranche::cli::main(Instant::now())
}
