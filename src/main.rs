//! The `tranche` program.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let name = std::env::args_os().next();
    if tranche::guest_init::is_wanted(name.as_deref()) {
        return tranche::guest_init::main();
    }
    let start = Instant::now();
    if tranche::cli::jailer::is_wanted(name.as_deref()) {
        return tranche::cli::jailer::main();
    }
    if tranche::cli::firecracker::is_wanted(name.as_deref()) {
        return tranche::cli::firecracker::main(start);
    }
    tranche::cli::main(start)
}
