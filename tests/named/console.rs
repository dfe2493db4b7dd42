//! A named VM's console: attached, watched, and read later.

use std::io::Write;
use std::os::unix::net::UnixStream;

use crate::home::{Home, LIMIT};
use crate::pty::Pty;
use crate::support::Running;

#[test]
fn a_terminal_is_attached_and_let_go_of() {
    let home = Home::new();
    home.create("a", "hello", "end=echo", &[]);
    home.done(&["start", "a"]);
    let terminal = Pty::new();
    let attached = terminal.start(&mut home.command(&["attach", "a"]));
    attached.output.wait_for("end\n", LIMIT);
    let watching = Running::start(&mut home.command(&["attach", "--watch", "a"]));
    watching.output.wait_for("end\n", LIMIT);
    // A second one who would write is told that it only looks on.
    let late = Running::start(&mut home.command(&["attach", "a"]));
    late.errors.wait_for("this is to look on", LIMIT);
    terminal.type_keys(b"hello\r\x01h");
    attached.output.wait_for("hello", LIMIT);
    attached.errors.wait_for("Ctrl-A d  let go", LIMIT);
    watching.output.wait_for("hello", LIMIT);
    terminal.type_keys(b"\x01d");
    let ended = attached.wait(LIMIT).expect_code(0);
    assert!(ended.errors.contains("'tranche attach a' attaches again"), "{}", ended.errors);
    terminal.expect_as_before();
    assert_eq!(home.state("a"), "running");
    // Its place is free again; and the end of the VM is that of all who are attached.
    let terminal = Pty::new();
    let attached = terminal.start(&mut home.command(&["attach", "a"]));
    attached.output.wait_for("hello", LIMIT);
    terminal.type_keys(b"again");
    attached.output.wait_for("again", LIMIT);
    home.done(&["kill", "a"]);
    for running in [attached, watching, late] {
        let ended = running.wait(LIMIT).expect_code(5);
        assert!(ended.errors.contains("the VM was ended from outside"), "{}", ended.errors);
    }
    terminal.expect_as_before();
    home.refused(&["attach", "a"], 93, "does not run");
}

#[test]
fn logs_outlive_the_vm() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &[]);
    assert_eq!(home.done(&["logs", "a"]), "");
    home.done(&["start", "a"]);
    let follows = Running::start(&mut home.command(&["logs", "a", "--follow"]));
    follows.output.wait_for("end\n", LIMIT);
    home.done(&["kill", "a"]);
    let followed = follows.wait(LIMIT).expect_code(0).output;
    assert_eq!(home.done(&["logs", "a"]), followed);
    assert_eq!(home.done(&["logs", "a", "--tail", "1"]), "end\n");
    let timed = home.done(&["logs", "a", "--tail", "2", "--timestamps"]);
    let (time, text) = timed.lines().last().unwrap().split_once(' ').unwrap();
    assert!(time.ends_with('Z') && text == "end", "{timed}");
    assert_eq!(home.done(&["logs", "a", "--since", time]).lines().last(), Some("end"));
    assert_eq!(home.done(&["logs", "a", "--since", "2100-01-01T00:00:00Z"]), "");
    assert_eq!(home.done(&["logs", "a", "--since", "3600"]), followed);
    // Another start adds to it.
    home.done(&["start", "a"]);
    home.done(&["wait", "a", "--for", "boot"]);
    home.done(&["kill", "a"]);
    assert!(home.done(&["logs", "a"]).starts_with(&followed));
}

#[test]
fn nobody_who_is_attached_is_in_the_vms_way() {
    let home = Home::new();
    home.create("a", "hello", "end=button", &[]);
    home.done(&["start", "a"]);
    let socket = home.path("run/tranche/a/console.sock");
    // Those that say nothing, too much, or nonsense.
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket)).collect();
    let _ = UnixStream::connect(&socket).unwrap().write_all(&[b'x'; 100_000]);
    home.done(&["stop", "a", "--timeout", "30"]);
    drop(silent);
    assert_eq!(home.inspect("a")["last-start"]["ended"]["code"], 0);
}
