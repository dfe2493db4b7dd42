//! Places the serial console cannot go: exit code 50.

use std::os::unix::net::UnixListener;

use tempfile::tempdir;

use crate::mistake::{LIMIT, expect_mistake, names, run};
use crate::support::Running;

#[test]
fn a_place_that_cannot_be_written() {
    let hint = "a directory that exists";
    expect_mistake(run().args(["--serial", "file=/no/such/dir/x"]), 50, &["/no/such/dir/x", "No such file", hint]);
    expect_mistake(run().args(["--serial", "file=/"]), 50, &["output /", "Is a directory"]);
    expect_mistake(run().args(["--serial", "socket=/no/such/dir/x"]), 50, &["/no/such/dir/x", "No such file", hint]);
    let long = format!("socket=/tmp/{}", "x".repeat(200));
    expect_mistake(run().args(["--serial", &long]), 50, &["xxx"]);
}

#[test]
fn a_socket_in_use_is_not_taken_over_and_a_stale_one_is() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("socket");
    let serial = format!("socket={}", path.display());
    let listener = UnixListener::bind(&path).unwrap();
    let words = ["socket", "in use", "give another path"];
    expect_mistake(run().args(["--serial", &serial]), 50, &words);
    // The one who listens does so still.
    std::os::unix::net::UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(path.exists(), "a stale socket");
    Running::start(run().args(["--serial", &serial])).wait(LIMIT).expect_code(0);
    assert!(names(dir.path()).is_empty());
    std::fs::write(&path, "precious").unwrap();
    expect_mistake(run().args(["--serial", &serial]), 50, &words);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn the_socket_of_a_running_vm_stays_its_own() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("socket");
    let serial = format!("socket={}", path.display());
    let mut command = run();
    let first = Running::start(command.args(["--cmdline", "end=button", "--serial", &serial, "--log-level", "debug"]));
    first.errors.wait_for("built -> running", LIMIT);
    expect_mistake(run().args(["--serial", &serial]), 50, &["in use"]);
    assert!(path.exists());
    first.signal(rustix::process::Signal::TERM);
    first.wait(LIMIT).expect_code(0);
    assert!(!path.exists());
}
