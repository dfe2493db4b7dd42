//! The `tranche` program.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    if tranche::guest_init::is_wanted(std::env::args_os().next().as_deref()) {
        return tranche::guest_init::main();
    }
    tranche::cli::main(Instant::now())
}
