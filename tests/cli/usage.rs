//! Command lines that make no sense: exit code 2.

use std::process::Command;

use tempfile::tempdir;

use crate::mistake::{LIMIT, expect_mistake, names, run};
use crate::support::{Running, tranche};

/// A mistake that the parser of the command line finds. Its text has blank lines and a line on usage.
#[track_caller]
fn expect_usage(command: &mut Command, words: &[&str]) {
    let ended = Running::start(command).wait(LIMIT).expect_code(2);
    assert_eq!(ended.output, "");
    assert!(ended.errors.starts_with("error: ") && ended.errors.contains("try '--help'"), "{}", ended.errors);
    let lines = ended.errors.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= 4, "short: {command:?}\n{}", ended.errors);
    for word in words {
        assert!(ended.errors.contains(word), "no '{word}' for {command:?} in:\n{}", ended.errors);
    }
}

#[test]
fn texts_that_are_no_options() {
    expect_usage(tranche().arg("run"), &["--kernel <PATH|NAME>"]);
    expect_usage(tranche().arg("walk"), &["walk"]);
    for (option, value, words) in [
        ("--memory", "12x", "is not a size"),
        ("--memory", "-1", "'-1'"),
        ("--memory", "1.5G", "is not a size"),
        ("--memory", "99999999999G", "is not a size"),
        ("--memory", "", "--memory"),
        ("--cpus", "x", "1 to 64"),
        ("--cpus", "300", "1 to 64"),
        ("--cpus", "-1", "-1"),
        ("--frobnicate", "1", "--frobnicate"),
        ("--disk", ",ro", "a path is missing"),
        ("--disk", "a,ro=maybe", "on or off"),
        ("--disk", "a,ro,ro", "given twice"),
        ("--disk", "a,size=1", "ro, id, cache, queues, engine, bandwidth and ops"),
        ("--disk", "a,id=123456789012345678901", "1 to 20 characters"),
        ("--disk", "a,cache=none", "writeback or unsafe"),
        ("--disk", "a,ops=0", "'ops' cannot be '0': it takes N[/MS][+BURST]"),
        ("--disk", "a,bandwidth=1M/0", "BYTES[/MS][+BURST], such as 100M"),
        ("--rootfs", "a,frob", "frob"),
        ("--net", "t0", "unknown option 't0'"),
        ("--net", "mtu=1500", "tap=NAME"),
        ("--net", "tap=t0,mac=1:2:3", "is not a MAC address"),
        ("--net", "tap=t0,mac=01:00:00:00:00:01", "multicast"),
        ("--net", "tap=t0,mtu=67", "68 to 65535"),
        ("--net", "tap=t0,ops=1", "{rx,tx}-{bandwidth,ops}"),
        ("--net", "user,tx-bandwidth=fast", "'tx-bandwidth' cannot be 'fast'"),
        ("--serial", "tty", "stdio, null, file=PATH or socket=PATH"),
        ("--serial", "file=", "a path is missing"),
        ("--log-level", "loud", "possible values"),
    ] {
        expect_usage(run().arg(option).arg(value), &[words]);
    }
    expect_usage(run().args(["--memory", "64M", "--memory", "64M"]), &["--memory"]);
}

#[test]
fn options_that_do_not_go_together() {
    for (args, words) in [
        (&["--cpus", "0"][..], "1 to 64"),
        (&["--cpus", "65"], "1 to 64"),
        (&["--memory", "0"], "32M at least"),
        (&["--memory", "33550336"], "32M at least"),
        (&["--memory", "67108865"], "multiple of 4 KiB"),
        (&["--disk", "a,id=x", "--disk", "b,id=x"], "two disks have the id 'x'"),
        (&["--net", "tap=t0", "--net", "tap=t0"], "'t0' is given to two network cards"),
        (&["--net", "tap=t0,vhost=on,rx-ops=1"], "'t0' has limits, which only hold without vhost"),
        (&["--net", "tap=t0,mac=02:0:0:0:0:1", "--net", "tap=t1,mac=02:0:0:0:0:1"], "02:00:00:00:00:01"),
    ] {
        expect_mistake(run().args(args), 2, &["configuration", words, "tranche help run"]);
    }
}

#[test]
fn as_many_devices_as_there_are_slots_and_no_more() {
    let dir = tempdir().unwrap();
    let with_disks = |count: usize| {
        let mut command = run();
        for i in 0..count {
            let path = dir.path().join(i.to_string());
            std::fs::File::create(&path).unwrap().set_len(4096).unwrap();
            command.arg("--disk").arg(path);
        }
        command
    };
    // The entropy device has the thirty-first slot.
    Running::start(&mut with_disks(30)).wait(LIMIT).expect_code(0);
    expect_mistake(&mut with_disks(31), 2, &["32 devices are too many: 31 at most"]);
}

#[test]
fn no_host_has_this_much_memory() {
    for size in ["200T", "100000T", "16777215T"] {
        expect_mistake(run().args(["--memory", size]), 1, &["guest memory", "give less --memory"]);
    }
}

#[test]
fn a_mistake_leaves_nothing_behind() {
    // Everything that can be made before the error is found: a console file or socket, a locked disk.
    let dir = tempdir().unwrap();
    let disk = crate::support::disk_with(dir.path(), "disk", &[1; 4096]);
    let socket = format!("socket={}", dir.path().join("socket").display());
    for wrong in [["--disk", "/no/such/disk"], ["--initrd", "/no/such/initrd"], ["--net", "tap=no-such-tap0"]] {
        let mut command = run();
        let command = command.args(["--serial", &socket, "--disk"]).arg(&disk).args(wrong);
        let ended = Running::start(command).wait(LIMIT);
        assert!(matches!(ended.status.code(), Some(24 | 30 | 40)), "{ended:?}");
        assert_eq!(names(dir.path()), ["disk"], "{wrong:?}");
    }
    // And the disk is free again.
    Running::start(run().arg("--disk").arg(&disk)).wait(LIMIT).expect_code(0);
    assert_eq!(std::fs::read(&disk).unwrap(), [1; 4096]);
}
