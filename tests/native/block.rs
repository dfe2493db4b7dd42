//! Virtio-blk, driven by a guest through a real ring, seen from the file behind it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::SeekFrom;
use rustix::process::Signal;
use tempfile::{TempDir, tempdir_in};

use crate::guest::{expect_checks, guest};
use crate::support::not_tested;

const SECTOR: usize = 512;
const BYTES: usize = 1 << 20;
/// All checks of the block guest: once with direct descriptors, once with indirect ones and the event index.
const CHECKS: usize = 54;

/// Not in /tmp, which may be a file system without holes.
fn dir() -> TempDir {
    tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn disk(dir: &TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, vec![0xa5; BYTES]).unwrap();
    path
}

/// What the guest leaves of a disk full of 0xa5: its second pattern in sectors 8 to 71, of which 8 to 15 were
/// overwritten with zeroes and 24 to 31 discarded.
fn expected() -> Vec<u8> {
    let mut bytes = vec![0xa5; BYTES];
    for (i, byte) in bytes[8 * SECTOR..72 * SECTOR].iter_mut().enumerate() {
        *byte = (101 + i * 7 + i / SECTOR) as u8;
    }
    bytes[8 * SECTOR..16 * SECTOR].fill(0);
    bytes[24 * SECTOR..32 * SECTOR].fill(0);
    bytes
}

#[track_caller]
fn expect_bytes(path: &Path, expected: &[u8]) {
    let found = std::fs::read(path).unwrap();
    assert_eq!(found.len(), expected.len());
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        panic!("{}: byte {at} is {:#x}, not {:#x}", path.display(), found[at], expected[at]);
    }
}

fn with_disks(name: &str, cmdline: &str, disks: &[String]) -> Command {
    let mut command = guest(name, cmdline);
    for disk in disks {
        command.arg("--disk").arg(disk);
    }
    command
}

#[test]
fn what_the_guest_writes_is_in_the_file() {
    for (name, options) in
        [("block", ",engine=sync"), ("block", ",engine=auto,queues=4"), ("block-pvh", ""), ("block-pvh", ",queues=2")]
    {
        let dir = dir();
        let path = disk(&dir, "disk");
        let mut command = with_disks(name, "x", &[format!("{},id=a-name.of_20-letters{options}", path.display())]);
        let output = expect_checks(&mut command, CHECKS);
        assert!(output.contains("\nid=a-name.of_20-letters\n"), "{output}");
        assert!(output.contains(" capacity=2048\n"), "{output}");
        assert!(output.contains("\nindirect=1 event-index=1\n"), "both kinds of ring were driven:\n{output}");
        expect_bytes(&path, &expected());
        // The discarded 4 KiB are a hole again.
        let hole = rustix::fs::seek(File::open(&path).unwrap(), SeekFrom::Hole(16 * SECTOR as u64)).unwrap();
        assert_eq!(hole, 24 * SECTOR as u64, "the first hole behind the zeroes");
    }
}

#[test]
fn a_limited_disk_does_the_same() {
    for options in [",bandwidth=64K/2,ops=4/2", ",bandwidth=64K/2,ops=4/2,engine=io_uring,queues=2"] {
        let dir = dir();
        let path = disk(&dir, "disk");
        let disks = [format!("{}{options}", path.display())];
        expect_checks(&mut with_disks("block", "x", &disks), CHECKS);
        expect_bytes(&path, &expected());
    }
}

#[test]
fn over_its_limit_a_disk_does_nothing_and_the_vm_can_be_ended() {
    let dir = dir();
    let path = disk(&dir, "disk");
    // Two requests now, and no other today: the guest's third one times out, and all that follow.
    let disks = [format!("{},ops=1/86400000+1", path.display())];
    let mut command = with_disks("block", "x", &disks);
    let running = crate::guest::started(command.args(["--log-level", "debug"]), "FAIL read-pieces");
    running.signal(Signal::TERM);
    running.errors.wait_for("running -> stopping", crate::guest::LIMIT);
    running.signal(Signal::TERM);
    let ended = running.wait(crate::guest::LIMIT).expect_code(5);
    for done in ["ok write\n", "ok read\n", "ok read-back\n"] {
        assert!(ended.output.contains(done), "{}", ended.output);
    }
}

#[test]
fn each_disk_is_its_own() {
    let dir = dir();
    let paths = ["first", "second", "third"].map(|name| disk(&dir, name));
    let disks: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    expect_checks(&mut with_disks("block", "disk=1", &disks), CHECKS);
    expect_bytes(&paths[0], &[0xa5; BYTES]);
    expect_bytes(&paths[1], &expected());
    expect_bytes(&paths[2], &[0xa5; BYTES]);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let dir = dir();
    let path = disk(&dir, "disk");
    let output = expect_checks(&mut with_disks("block", "x", &[format!("{},ro", path.display())]), 14);
    assert_eq!(output.matches("ok write-refused\n").count(), 2, "{output}");
    expect_bytes(&path, &[0xa5; BYTES]);
}

#[test]
fn an_unsafe_disk_offers_no_flush() {
    let dir = dir();
    let path = disk(&dir, "disk");
    let output = expect_checks(&mut with_disks("block", "x", &[format!("{},cache=unsafe", path.display())]), 52);
    assert_eq!(output.matches("skip flush: not offered\n").count(), 2, "{output}");
    expect_bytes(&path, &expected());
}

#[test]
fn a_size_that_is_no_whole_number_of_sectors_is_rounded_down() {
    let dir = dir();
    let path = disk(&dir, "disk");
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xa5; 100], BYTES as u64).unwrap();
    let mut command = with_disks("block", "x", &[path.display().to_string()]);
    let ended = crate::support::Running::start(&mut command).wait(crate::guest::LIMIT).expect_code(0);
    assert!(ended.errors.contains("100 bytes are not a whole sector"), "{}", ended.errors);
    assert!(ended.output.contains(" capacity=2048\n"), "{}", ended.output);
    let mut bytes = expected();
    bytes.resize(BYTES + 100, 0xa5);
    expect_bytes(&path, &bytes);
}

/// A loop device over a file; gone with the test.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Result<Self, String> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(path).output();
        match output.map_err(|error| error.to_string())? {
            output if output.status.success() => Ok(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())),
            output => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let dir = dir();
    let path = disk(&dir, "disk");
    let device = match Loop::over(&path) {
        Ok(device) => device,
        Err(why) => return not_tested(&format!("a block device as a disk, as there is no loop device: {why}")),
    };
    expect_checks(&mut with_disks("block", "x", std::slice::from_ref(&device.0)), CHECKS);
    drop(device);
    expect_bytes(&path, &expected());
}
