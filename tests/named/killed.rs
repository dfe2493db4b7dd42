//! Commands that are killed at any moment leave a store that the next one understands.

use std::fs;
use std::time::{Duration, Instant};

use crate::home::{Home, LIMIT, sparse, tool};
use crate::support::{Running, guests};

/// Rounds of each; `make soak` wants more.
fn rounds() -> u32 {
    std::env::var("TRANCHE_KILL_ROUNDS").map_or(25, |rounds| rounds.parse().unwrap())
}

/// How long a command takes that nobody kills.
fn time_of(home: &Home, words: &[&str]) -> Duration {
    let start = Instant::now();
    home.done(words);
    start.elapsed()
}

/// Runs a command, and kills it, with its children, after a part of the time that it takes.
fn killed(home: &Home, words: &[&str], whole: Duration, round: u32) {
    use std::os::unix::process::CommandExt;
    let mut command = home.command(words);
    let running = Running::start(command.process_group(0));
    std::thread::sleep(whole.mul_f64(1.3) * round / rounds());
    let group = rustix::process::Pid::from_child(&running.child);
    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    let _ = running.wait(LIMIT);
}

#[test]
fn a_create_is_whole_or_not_there() {
    let home = Home::new();
    let kernel = guests().join("hello");
    let words = ["create", "a", "--kernel", kernel.to_str().unwrap(), "--memory", "32M"];
    let whole = time_of(&home, &words);
    home.done(&["rm", "a"]);
    let mut made = 0;
    for round in 0..rounds() {
        killed(&home, &words, whole, round);
        if home.names().is_empty() {
            home.done(&words);
        } else {
            made += 1;
        }
        assert_eq!(home.state("a"), "stopped");
        home.done(&["start", "a"]);
        home.done(&["wait", "a", "--timeout", "30"]);
        home.done(&["rm", "a"]);
        assert_eq!((home.names(), home.unfinished()), (vec![], vec![]), "round {round}");
    }
    println!("{made} of {} were made before they were killed", rounds());
}

#[test]
fn a_removal_is_whole_or_has_not_been() {
    let home = Home::new();
    home.create("other", "hello", "", &[]);
    home.create("a", "hello", "", &[]);
    let whole = time_of(&home, &["rm", "a"]);
    for round in 0..rounds() {
        home.create("a", "hello", "", &[]);
        killed(&home, &["rm", "a"], whole, round);
        if home.names() == ["a", "other"] {
            assert_eq!(home.state("a"), "stopped");
            home.done(&["rm", "a"]);
        }
        assert_eq!(home.names(), ["other"]);
    }
    // What the last one left goes with the next that is made.
    home.create("a", "hello", "", &[]);
    assert_eq!(home.unfinished(), [""; 0]);
}

#[test]
fn a_resize_is_done_by_the_next_start_if_not_before() {
    const MIB: u64 = 1 << 20;
    let home = Home::new();
    let disk = home.path("disk");
    let path = disk.to_str().unwrap();
    home.done(&["ls"]);
    sparse(&disk, 64 * MIB);
    home.create("a", "hello", "", &["--disk", "disk,id=d"]);
    let prepare = || {
        sparse(&disk, 0);
        sparse(&disk, 64 * MIB);
        fs::create_dir_all(home.path("tree")).unwrap();
        fs::write(home.path("tree/file"), vec![0xa5; MIB as usize]).unwrap();
        tool("mke2fs", &["-q", "-t", "ext4", "-d", home.path("tree").to_str().unwrap(), path, "64M"]);
        home.done(&["resize", "a", "--cpus", "1"]);
    };
    let words = ["resize", "a", "--cpus", "2", "--disk", "d=256M"];
    prepare();
    let whole = time_of(&home, &words);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..rounds() {
        prepare();
        killed(&home, &words, whole, round);
        let definition = home.inspect("a")["definition"].clone();
        let cpus = definition["vm"]["cpus"].as_u64().unwrap();
        let is_pending = !definition["disk-sizes"].is_null();
        seen.insert((cpus, is_pending));
        home.done(&["ls"]);
        home.done(&["start", "a"]);
        home.done(&["wait", "a", "--timeout", "30"]);
        // Nothing of it, or all of it.
        let expected = if cpus == 2 { 256 } else { 64 };
        assert_eq!(fs::metadata(&disk).unwrap().len(), expected * MIB, "round {round}: {definition}");
        assert!(home.inspect("a")["definition"]["disk-sizes"].is_null());
        tool("e2fsck", &["-f", "-n", path]);
        assert!(tool("debugfs", &["-R", "stat file", path]).contains("Size: 1048576"));
        assert_eq!(home.unfinished(), [""; 0]);
    }
    println!("CPUs, and sizes that are still to come, when they were killed: {seen:?}");
}
