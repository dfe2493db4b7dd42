//! How the tests here start a guest and read its report.

use std::process::Command;
use std::time::Duration;

use crate::support::{Ended, Running, guests, tranche};

/// Generous: a guest takes milliseconds, a busy machine seconds.
pub const LIMIT: Duration = Duration::from_secs(60);

/// `tranche run` with a guest of `resources/guest` and its command line.
pub fn guest(name: &str, cmdline: &str) -> Command {
    let mut command = tranche();
    command.arg("run").arg("--kernel").arg(guests().join(name)).args(["--cmdline", cmdline]);
    command
}

/// Runs a guest to its power-off.
#[track_caller]
pub fn output_of(command: &mut Command) -> String {
    let ended = Running::start(command).wait(LIMIT).expect_code(0);
    assert_eq!(ended.errors, "", "a VM that ends well says nothing on standard error");
    ended.output
}

/// Runs a guest whose checks all have to pass, and of which there have to be as many as said.
#[track_caller]
pub fn expect_checks(command: &mut Command, count: usize) -> String {
    let output = output_of(command);
    assert_eq!(output.lines().last(), Some(format!("done: {count} ok, 0 failed").as_str()), "{output}");
    output
}

/// The hexadecimal number behind `key=`.
#[track_caller]
pub fn hex(output: &str, key: &str) -> u64 {
    let mut words = output.split_whitespace().filter_map(|word| word.split_once('='));
    let value = words.find(|(name, _)| *name == key).unwrap_or_else(|| panic!("no {key} in:\n{output}")).1;
    u64::from_str_radix(value, 16).unwrap_or_else(|_| panic!("{key}={value} is no number"))
}

/// Starts a guest and waits until it has said `what`.
pub fn started(command: &mut Command, what: &str) -> Running {
    let running = Running::start(command);
    running.output.wait_for(what, LIMIT);
    running
}

/// The end of a program, and whether its error text has `what`.
#[track_caller]
pub fn expect_error(ended: Ended, code: i32, what: &str) {
    let ended = ended.expect_code(code);
    assert!(ended.errors.contains(what), "no '{what}' in:\n{}", ended.errors);
}
