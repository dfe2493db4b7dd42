//! The console on a terminal: raw while the VM runs, and as it was on every way out.

use std::os::unix::process::ExitStatusExt;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::guest::{LIMIT, expect_error, guest};
use crate::pty::Pty;
use crate::support::Running;

/// A guest on a terminal that has said all it will say by itself.
fn on_terminal(cmdline: &str) -> (Pty, Running) {
    let pty = Pty::new();
    let running = pty.start(guest("hello", cmdline).args(["--log-level", "debug"]));
    running.output.wait_for("\nend\n", LIMIT);
    pty.expect_raw();
    (pty, running)
}

#[test]
fn a_power_off_restores_it() {
    let (pty, running) = on_terminal("end=echo");
    // None of these is for the terminal any more: Ctrl-C, Ctrl-Z, Ctrl-D, Ctrl-\, Ctrl-S, and a carriage return.
    pty.type_keys(b"\x03\x1a\x04\x1c\x13\r<q");
    let raw = running.output.clone();
    running.wait(LIMIT).expect_code(0);
    raw.wait_for("\nend\n\x03\x1a\x04\x1c\x13\r<q", LIMIT);
    pty.expect_as_before();
}

#[test]
fn the_quit_key_ends_the_vm() {
    let (pty, running) = on_terminal("end=echo");
    pty.type_keys(b"\x01");
    pty.type_keys(b"x");
    expect_error(running.wait(LIMIT), 5, "ended from outside");
    pty.expect_as_before();
}

#[test]
fn the_help_key_helps_and_the_escape_key_can_be_typed() {
    let (pty, running) = on_terminal("end=echo");
    pty.type_keys(b"\x01h");
    running.errors.wait_for("Ctrl-A x ", LIMIT);
    pty.type_keys(b"a\x01\x01b\x01zq");
    let raw = running.output.clone();
    let ended = running.wait(LIMIT).expect_code(0);
    raw.wait_for("\nend\na\x01b\x01zq", LIMIT);
    assert!(!ended.output.contains("Ctrl-A"), "help is no console output:\n{}", ended.output);
    pty.expect_as_before();
}

#[test]
fn two_signals_restore_it() {
    let (pty, running) = on_terminal("end=halt");
    running.signal(Signal::TERM);
    running.errors.wait_for("running -> stopping", LIMIT);
    running.signal(Signal::TERM);
    expect_error(running.wait(LIMIT), 5, "ended from outside");
    pty.expect_as_before();
}

#[test]
fn a_guest_that_fails_restores_it() {
    for (end, code) in [("reset", 3), ("panic", 4)] {
        let pty = Pty::new();
        pty.start(&mut guest("hello", &format!("end={end}"))).wait(LIMIT).expect_code(code);
        pty.expect_as_before();
    }
}

#[test]
fn a_crash_restores_it() {
    // No core file of the program under test is wanted.
    let limit = getrlimit(Resource::Core);
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: limit.maximum }).unwrap();
    for signal in [Signal::ABORT, Signal::SEGV, Signal::BUS, Signal::ILL, Signal::FPE] {
        let (pty, running) = on_terminal("end=halt");
        running.signal(signal);
        let ended = running.wait(LIMIT);
        assert_eq!(ended.status.signal(), Some(signal.as_raw()), "it dies of the signal nevertheless");
        pty.expect_as_before();
    }
}

#[test]
fn an_error_before_the_start_leaves_it_alone() {
    let pty = Pty::new();
    let mut command = guest("hello", "x");
    pty.start(command.args(["--disk", "/no/such/disk"])).wait(LIMIT).expect_code(30);
    pty.expect_as_before();
}

#[test]
fn a_console_elsewhere_leaves_it_alone() {
    let pty = Pty::new();
    let running = pty.start(guest("hello", "end=button").args(["--serial", "null", "--log-level", "debug"]));
    running.errors.wait_for("built -> running", LIMIT);
    pty.expect_as_before();
    running.signal(Signal::TERM);
    running.wait(LIMIT).expect_code(0);
    pty.expect_as_before();
}
