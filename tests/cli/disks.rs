//! Disks that cannot be attached: exit codes 30 to 32.

use std::path::Path;

use rustix::process::Signal;
use tempfile::tempdir;

use crate::mistake::{LIMIT, expect_mistake, is_root, run};
use crate::support::Running;
use crate::support::nobody::Nobody;

#[test]
fn what_is_no_disk() {
    let dir = tempdir().unwrap();
    let with = |path: &Path| {
        let mut command = run();
        command.arg("--disk").arg(path);
        command
    };
    expect_mistake(&mut with(Path::new("/no/such/disk")), 30, &["/no/such/disk", "No such file", "truncate -s 1G"]);
    expect_mistake(&mut with(dir.path()), 32, &["is a directory", "raw disk image"]);
    expect_mistake(run().args(["--rootfs", "/,ro"]), 32, &["is a directory", "raw disk image"]);
    expect_mistake(&mut with(Path::new("/dev/null")), 32, &["/dev/null is a character device"]);
    for (bytes, works) in [(0, false), (511, false), (512, true)] {
        let path = dir.path().join("small");
        std::fs::write(&path, vec![0; bytes]).unwrap();
        if works {
            Running::start(&mut with(&path)).wait(LIMIT).expect_code(0);
        } else {
            expect_mistake(&mut with(&path), 32, &["small", "smaller than one sector", "truncate -s 1G"]);
        }
    }
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let (writable, read_only) = (path.display().to_string(), format!("{},ro", path.display()));
    let running = |disk: &str| {
        let running = Running::start(run().args(["--cmdline", "end=halt", "--disk", disk]));
        running.output.wait_for("\nend\n", LIMIT);
        running
    };
    let with = |disk: &str| {
        let mut command = run();
        command.args(["--disk", disk]);
        command
    };
    let writer = running(&writable);
    expect_mistake(&mut with(&writable), 31, &["disk", "in use already", ",ro"]);
    expect_mistake(&mut with(&read_only), 31, &["in use already", "holds it for writing"]);
    // A VM that is killed leaves no lock.
    writer.signal(Signal::KILL);
    writer.wait(LIMIT);
    let _readers = (running(&read_only), running(&read_only));
    expect_mistake(&mut with(&writable), 31, &["in use already", "if all attach it read-only"]);
    Running::start(&mut with(&read_only)).wait(LIMIT).expect_code(0);
    // The same file twice in one VM is two writers.
    let other = dir.path().join("other");
    std::fs::write(&other, [0; 4096]).unwrap();
    expect_mistake(with(other.to_str().unwrap()).arg("--disk").arg(&other), 31, &["other", "in use already"]);
}

#[test]
fn a_disk_of_another_user() {
    if !is_root("a disk that cannot be read") {
        return;
    }
    let nobody = Nobody::new();
    let path = nobody.private_file();
    expect_mistake(nobody.run(&[]).arg("--disk").arg(&path), 30, &["private", "Permission denied", ",ro"]);
}
