//! User networks that cannot be: exit code 43. And what is left of passt when a VM has ended: nothing.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::mistake::{LIMIT, expect_mistake, is_root, run};
use crate::support::nobody::Nobody;
use crate::support::{Running, not_tested};

fn has_passt() -> bool {
    let has = Command::new("passt").arg("--version").output().is_ok();
    if !has {
        not_tested("user networks: there is no passt; 'make setup' installs it");
    }
    has
}

fn with_net(net: &str) -> Command {
    let mut command = run();
    command.args(["--net", net]);
    command
}

/// A port that nobody listens on, most probably for some time to come.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits until nobody listens on the port.
#[track_caller]
fn expect_free(port: u16) {
    for _ in 0..600 {
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("passt still listens on port {port}");
}

#[test]
fn options_that_make_no_sense() {
    for (net, words) in [
        ("user,queues=2", "belongs to a tap"),
        ("user,forward=80", "tcp:HOSTPORT:GUESTPORT"),
        ("user,tap=t0", "not both"),
    ] {
        let ended = Running::start(&mut with_net(net)).wait(LIMIT).expect_code(2);
        assert!(ended.errors.contains(words), "{net}: {}", ended.errors);
    }
    let mut twice = with_net("user,forward=tcp:8080:80");
    twice.args(["--net", "user,forward=tcp:8080:81"]);
    expect_mistake(&mut twice, 2, &["tcp port 8080 is forwarded twice"]);
}

#[test]
fn no_passt() {
    let mut command = with_net("user");
    expect_mistake(command.env("PATH", "/nonexistent"), 43, &["cannot start passt", "apt-get install passt"]);
}

#[test]
fn a_passt_that_fails_is_quoted() {
    let dir = tempfile::TempDir::new().unwrap();
    let fake = |script: &str| {
        let path = dir.path().join("passt");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = with_net("user");
        command.env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()));
        command
    };
    let said = "passt gives up: Couldn't pick external interface";
    expect_mistake(&mut fake("echo \"Couldn't pick external interface\" >&2; exit 1"), 43, &[said, "ip route"]);
    let mut silent = fake("exit 3");
    let ended = Running::start(&mut silent).wait(LIMIT).expect_code(43);
    assert!(ended.errors.contains("passt gives up: it has ended without a word"), "{}", ended.errors);
    // It says more than a pipe holds, to nobody; and what it says cannot reach the terminal as it is.
    let ended = Running::start(&mut fake("yes '\u{1b}[2Jx' | head -c 1000000 >&2; exit 1")).wait(LIMIT).expect_code(43);
    assert!(ended.errors.contains("?[2J") && !ended.errors.contains('\u{1b}'), "{}", ended.errors);
}

#[test]
fn a_port_in_use() {
    if !has_passt() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    expect_mistake(
        &mut with_net(&format!("user,forward=tcp:{port}:80")),
        43,
        &["passt gives up", &port.to_string(), "ss -lntu"],
    );
}

#[test]
fn a_host_without_a_way_out() {
    if !has_passt() || !is_root("a host without interfaces") {
        return;
    }
    let command = with_net("user");
    let mut alone = Command::new("unshare");
    alone.arg("--net").arg(command.get_program()).args(command.get_args());
    alone.env("XDG_CACHE_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"));
    expect_mistake(&mut alone, 43, &["passt gives up", "interface", "ip route"]);
}

#[test]
fn an_ordinary_user_has_a_network() {
    if !has_passt() || !is_root("an ordinary user") {
        return;
    }
    let nobody = Nobody::new();
    let port = free_port();
    let net = format!("user,forward=tcp:{port}:80");
    Running::start(nobody.run(&[]).args(["--net", &net])).wait(LIMIT).expect_code(0);
    expect_free(port);
}

#[test]
fn passt_leaves_with_its_vm() {
    if !has_passt() {
        return;
    }
    for signal in [None, Some(Signal::KILL)] {
        let port = free_port();
        let mut command = with_net(&format!("user,forward=tcp:{port}:80"));
        command.args(["--cmdline", if signal.is_some() { "end=halt" } else { "" }]);
        let running = Running::start(&mut command);
        running.output.wait_for("\nend\n", LIMIT);
        if let Some(signal) = signal {
            TcpListener::bind(("127.0.0.1", port)).expect_err("passt listens");
            running.signal(signal);
        } else {
            running.wait(LIMIT).expect_code(0);
        }
        expect_free(port);
    }
}
