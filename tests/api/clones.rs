//! Many VMs of one snapshot.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::json;
use tempfile::tempdir;
use tranche::api::client::Client;

use crate::support::worker::Worker;
use crate::support::{Running, disk_with, not_tested, tranche};
use crate::vm::{LIMIT, Vm, drive, vmm};

const KIB: usize = 64;
const DISK: usize = 256 << 10;

/// A snapshot of a guest that works on memory and a disk, and what it has done.
fn snapshot(dir: &Path, tap: Option<&str>) -> (PathBuf, Worker) {
    let mut vm = Vm::start(vmm());
    let disk = disk_with(dir, "disk", &Worker::disk(DISK));
    vm.put("/drives/data", &drive("data", false, &disk));
    if let Some(tap) = tap {
        vm.put("/network-interfaces/net0", &json!({ "iface_id": "net0", "host_dev_name": tap }).to_string());
    }
    vm.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#);
    vm.put_kernel("worker", &format!("kib={KIB} disk=1 transport=pci"));
    vm.act("InstanceStart");
    vm.running.output.wait_for("ready\n", LIMIT);
    let mut worker = Worker::new(KIB, Worker::disk(DISK));
    worker.tell(&mut vm.running, "wdb");
    worker.check(&mut vm.running);
    let snap = dir.join("snap");
    let ended = Running::start(tranche().args(["snapshot", "create", "--stop"]).arg(&vm.socket).arg(&snap)).wait(LIMIT);
    ended.expect_code(0);
    vm.running.wait(LIMIT).expect_code(5);
    fs::remove_file(disk).unwrap();
    (snap, worker)
}

fn clone(snap: &Path, number: u32, run_dir: &Path) -> Command {
    let mut command = tranche();
    command.arg("clone").arg(snap).arg("-n").arg(number.to_string()).arg("--run-dir").arg(run_dir);
    command
}

/// Waits until so many have started; their numbers and processes.
fn started(running: &Running, number: u32) -> BTreeMap<u32, Pid> {
    running.output.wait_for(&format!("/{number}.sock\n"), LIMIT);
    let text = running.output.text();
    let lines = text.lines().map(|line| {
        let mut words = line.split(' ');
        let mut next = || words.next().unwrap().parse::<i32>().unwrap();
        (next() as u32, Pid::from_raw(next()).unwrap())
    });
    lines.collect()
}

fn wish(socket: &Path, state: &str) {
    let body = json!({ "state": state }).to_string();
    let answer = Client::connect(socket).unwrap().request("PATCH", "/vm", Some(body.as_bytes())).unwrap();
    assert_eq!(answer.status, 204, "{}", String::from_utf8_lossy(&answer.body));
}

/// Has the guest behind a console do some work, and compares what comes of it.
fn works(console: &Path, worker: &mut Worker, letters: &str) {
    let mut stream = UnixStream::connect(console).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    worker.recall(letters);
    worker.recall("s");
    stream.write_all(format!("{letters}s").as_bytes()).unwrap();
    let (wanted, mut said) = (worker.says(), String::new());
    let mut stream = BufReader::new(stream);
    while !said.ends_with(&wanted) {
        let read = stream.read_line(&mut said);
        if !matches!(read, Ok(1..)) {
            // What has ended it is written down after its console is gone.
            std::thread::sleep(Duration::from_secs(2));
            let log = fs::read_to_string(console.with_extension("log"));
            panic!("{wanted:?} wanted of {}, got {said:?}, then {read:?}; its log: {log:?}", console.display());
        }
    }
}

#[test]
fn a_hundred_at_once_and_each_is_alone() {
    let files = tempdir().unwrap();
    let (snap, worker) = snapshot(files.path(), None);
    let run_dir = files.path().join("run");
    let running = Running::start(clone(&snap, 100, &run_dir).arg("--paused"));
    assert_eq!(started(&running, 100).len(), 100, "{}", running.output.text());
    let mut workers: Vec<_> = (0..100).map(|_| worker.clone()).collect();
    let letters = ["wdb", "bdb", "ddbw", "zb", "bbbd"];
    for round in 0..2 {
        for (number, worker) in (1..).zip(&mut workers) {
            // These guests look for input without end: of a hundred, each would have a fiftieth of a CPU.
            let socket = run_dir.join(format!("{number}.sock"));
            wish(&socket, "Resumed");
            works(&run_dir.join(format!("{number}.console")), worker, letters[(number + round) % letters.len()]);
            wish(&socket, "Paused");
        }
    }
    // A clone of a clone.
    let again = files.path().join("again");
    let mut save = tranche();
    save.args(["snapshot", "create"]).arg(run_dir.join("7.sock")).arg(&again);
    Running::start(&mut save).wait(LIMIT).expect_code(0);
    wish(&run_dir.join("7.sock"), "Resumed");
    let second = files.path().join("second");
    let clones = Running::start(&mut clone(&again, 3, &second));
    started(&clones, 3);
    for number in 1..=3 {
        works(&second.join(format!("{number}.console")), &mut workers[6].clone(), ["dbdd", "wdb", "bd"][number - 1]);
    }
    works(&run_dir.join("7.console"), &mut workers[6], "ddd");
    for running in [running, clones] {
        // They are asked to end by themselves, which this guest does not hear; then once more.
        running.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(200));
        running.signal(Signal::TERM);
        let ended = running.wait(LIMIT).expect_code(5);
        assert!(ended.errors.contains("clone 3 has ended: exit status: 5"), "{}", ended.errors);
    }
    assert!(!run_dir.join("1.sock").exists());
}

#[test]
fn one_that_cannot_start_takes_the_others_along() {
    let files = tempdir().unwrap();
    let (snap, _) = snapshot(files.path(), None);
    let run_dir = files.path().join("run");
    for number in [1, 2] {
        disk_with(files.path(), &format!("copy{number}"), &Worker::disk(DISK));
    }
    let mut command = clone(&snap, 3, &run_dir);
    command.arg(format!("--override=disk.data={}/copy{{}}", files.path().display()));
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(30);
    assert!(ended.errors.contains("clone 3 does not start"), "{}", ended.errors);
    assert!(ended.errors.contains("saved VM's disk.data") && ended.errors.contains("copy3"), "{}", ended.errors);
    assert!(Client::connect(&run_dir.join("1.sock")).is_err());

    // What is wrong with all is told once, and nothing is made.
    let nowhere = files.path().join("nowhere");
    let ended = Running::start(&mut clone(&nowhere, 3, &nowhere)).wait(LIMIT).expect_code(80);
    assert!(ended.errors.contains("is no snapshot") && !nowhere.exists(), "{}", ended.errors);
    for wrong in [&["-n", "0"][..], &["-n", "1001"], &["--override", "x"], &["--netns", ""], &["--detach"]] {
        Running::start(tranche().arg("clone").arg(&snap).args(wrong)).wait(LIMIT).expect_code(2);
    }
}

#[test]
fn disks_are_kept_where_that_is_wanted_and_clones_outlive_who_made_them() {
    let files = tempdir().unwrap();
    let (snap, worker) = snapshot(files.path(), None);
    let (run_dir, disks) = (files.path().join("run"), files.path().join("disks"));
    let mut command = clone(&snap, 2, &run_dir);
    let running = Running::start(command.arg("--detach").arg("--disks").arg(&disks));
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!(ended.output.lines().count(), 2);
    for number in 1..=2 {
        works(&run_dir.join(format!("{number}.console")), &mut worker.clone(), "bdb");
        assert!(disks.join(format!("{number}/data.qcow2")).exists());
        let socket = run_dir.join(format!("{number}.sock"));
        let kill = Running::start(tranche().arg("power").arg(&socket).arg("kill")).wait(LIMIT);
        kill.expect_code(0);
        until(|| Client::connect(&socket).is_err());
    }
}

fn until_gone(clones: &BTreeMap<u32, Pid>) {
    until(|| clones.values().all(|pid| !Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists()));
}

fn until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn clones_end_with_who_has_started_them() {
    let files = tempdir().unwrap();
    let (snap, _) = snapshot(files.path(), None);
    let running = Running::start(&mut clone(&snap, 3, &files.path().join("run")));
    let clones = started(&running, 3);
    running.signal(Signal::KILL);
    drop(running);
    until_gone(&clones);
}

#[test]
fn each_has_the_tap_that_was_saved_in_a_network_of_its_own() {
    if !rustix::process::geteuid().is_root() {
        return not_tested("taps of clones: only root can make one to save a VM with");
    }
    let files = tempdir().unwrap();
    let tap = Tap::new();
    let (snap, worker) = snapshot(files.path(), Some(&tap.0));
    drop(tap);
    let run_dir = files.path().join("run");
    let running = Running::start(&mut clone(&snap, 4, &run_dir));
    let clones = started(&running, 4);
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let mut networks = vec![network("self")];
    for (number, pid) in &clones {
        let pid = pid.as_raw_nonzero().to_string();
        networks.push(network(&pid));
        let devices = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
        assert!(devices.contains("tranche-c0:"), "{devices}");
        works(&run_dir.join(format!("{number}.console")), &mut worker.clone(), "wdb");
    }
    networks.sort();
    networks.dedup();
    assert_eq!(networks.len(), 5);
    drop(running);
    until_gone(&clones);

    // In the host's, there is no such tap.
    let mut command = clone(&snap, 1, &run_dir);
    let ended = Running::start(command.args(["--netns", "host"])).wait(LIMIT).expect_code(40);
    assert!(ended.errors.contains("there is no tap interface tranche-c0"), "{}", ended.errors);
    let mut command = clone(&snap, 1, &run_dir);
    let ended = Running::start(command.args(["--netns", "no-such-{}"])).wait(LIMIT).expect_code(41);
    assert!(ended.errors.contains("/run/netns/no-such-1"), "{}", ended.errors);
}

struct Tap(String);

impl Tap {
    fn new() -> Self {
        let tap = Self("tranche-c0".into());
        let made = Command::new("ip").args(["tuntap", "add", &tap.0, "mode", "tap"]).status();
        assert!(made.unwrap().success());
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).status();
    }
}
