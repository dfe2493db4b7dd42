//! A full disk loses what would have gone there, not the VM.

use tempfile::tempdir;

use crate::boot_files::packed_guest;
use crate::mistake::{LIMIT, after_script, is_root, names, run, run_kernel};
use crate::support::{Running, guests};

/// A file system of one page, which is taken.
const FULL: &str = "mount -t tmpfs -o size=4k none /mnt\nhead -c 4096 /dev/zero > /mnt/filler\n! echo x > /mnt/probe";

#[test]
fn the_console_on_a_full_disk() {
    if !is_root("a full disk") {
        return;
    }
    let mut command = run();
    command.args(["--cmdline", "end=reset", "--serial", "file=/mnt/console"]);
    let ended = Running::start(&mut after_script(FULL, &command)).wait(LIMIT).expect_code(3);
    assert!(ended.errors.contains("reset itself"), "{}", ended.errors);
}

#[test]
fn the_kernel_cache_on_a_full_disk() {
    if !is_root("a full disk") {
        return;
    }
    let dir = tempdir().unwrap();
    let kernel = dir.path().join("vmlinuz");
    std::fs::write(&kernel, packed_guest("hello")).unwrap();
    let mut command = run_kernel(&kernel);
    command.env("XDG_CACHE_HOME", "/mnt");
    let ended = Running::start(&mut after_script(FULL, &command)).wait(LIMIT).expect_code(0);
    assert!(ended.output.ends_with("\nend\n"), "{}", ended.output);

    // Where there is room, it is used, and what is there is entered again.
    let cache = dir.path().join("cache");
    for _ in 0..2 {
        let mut command = run_kernel(&kernel);
        Running::start(command.env("XDG_CACHE_HOME", &cache)).wait(LIMIT).expect_code(0);
        let kept = names(&cache.join("tranche/kernels"));
        assert_eq!(kept.iter().filter(|name| !name.starts_with("seen-")).count(), 1, "{kept:?}");
    }
}

#[test]
fn the_file_of_a_disk_on_a_full_disk() {
    if !is_root("a full disk") {
        return;
    }
    for engine in ["sync", "auto"] {
        let mut command = run_kernel(guests().join("block"));
        command.arg("--disk").arg(format!("/mnt/disk,engine={engine}"));
        let script = "mount -t tmpfs -o size=4k none /mnt\ntruncate -s 1M /mnt/disk";
        let ended = Running::start(&mut after_script(script, &command)).wait(LIMIT).expect_code(0);
        // The guest is told, and so is the log; what needs no room goes on.
        assert!(ended.output.contains("FAIL write: status 1, not 0\n"), "{engine}:\n{}", ended.output);
        assert!(ended.output.contains("ok alive\n") && ended.output.contains("ok healthy\n"), "{}", ended.output);
        assert!(ended.errors.contains("/mnt/disk: No space left on device"), "{engine}:\n{}", ended.errors);
    }
}
