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
fn a_pipe_that_nobody_reads_is_not_waited_for() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let serial = format!("file={}", path.display());
    expect_mistake(run().args(["--serial", &serial]), 50, &["fifo", "No such device or address"]);
    // Linux opens both ends of a FIFO at once.
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    Running::start(run().args(["--serial", &serial])).wait(LIMIT).expect_code(0);
    let mut first = [0; 5];
    std::io::Read::read_exact(&mut reader, &mut first).unwrap();
    assert_eq!(&first, b"hello");
}

#[test]
fn a_limit_on_the_size_of_files_is_not_the_end() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("console");
    let tranche = run();
    let mut limited = std::process::Command::new("sh");
    limited.arg("-c").arg("ulimit -f 0; exec \"$0\" \"$@\"").arg(tranche.get_program()).args(tranche.get_args());
    limited.arg("--serial").arg(format!("file={}", path.display()));
    Running::start(&mut limited).wait(LIMIT).expect_code(0);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "nothing could be written");
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
