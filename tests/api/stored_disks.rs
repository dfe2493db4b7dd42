//! Disks that are part of a snapshot.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::support::worker::Worker;
use crate::support::{Ended, Running, disk_with, tranche};
use crate::vm::{LIMIT, Vm, drive, vmm};

const DISK: usize = 1 << 20;

fn cli(arguments: &[&str]) -> Ended {
    Running::start(tranche().args(arguments)).wait(LIMIT)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn save(vm: &Vm, dir: &Path, more: &[&str]) -> Ended {
    cli(&[&["snapshot", "create", text(&vm.socket), text(dir)][..], more].concat())
}

/// Sets the command up for a VM with an API.
fn restore(dir: &Path, more: &[&str]) -> Command {
    let mut command = tranche();
    command.arg("restore").arg(dir).args(more);
    command
}

/// A guest that works on 64 KiB of memory and its disk `data`, which is as `drive` says.
fn working(drive: &str) -> (Vm, Worker) {
    let vm = Vm::start(vmm());
    vm.put("/drives/data", drive);
    vm.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#);
    vm.put_kernel("worker", "kib=64 disk=1 transport=pci");
    vm.act("InstanceStart");
    vm.running.output.wait_for("ready\n", LIMIT);
    (vm, Worker::new(64, Worker::disk(DISK)))
}

fn work(vm: &mut Vm, worker: &mut Worker, letters: &str) {
    worker.tell(&mut vm.running, letters);
    worker.check(&mut vm.running);
}

fn files_of(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir.join("disks")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// What is in an image over a base, which has been closed.
fn content_of(image: &Path, base: &Path, copy: &Path) -> Vec<u8> {
    let backing = format!("--backing={}", text(base));
    cli(&["disk", "convert", "--from=qcow2", "--to=raw", &backing, text(image), text(copy)]).expect_code(0);
    fs::read(copy).unwrap()
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn each_restored_vm_has_the_disk_of_that_moment_to_itself() {
    let files = tempdir().unwrap();
    let path = |name: &str| files.path().join(name);
    let disk = disk_with(files.path(), "disk", &Worker::disk(DISK));
    let (mut vm, mut worker) = working(&drive("data", false, &disk));
    work(&mut vm, &mut worker, "bdbwb");
    save(&vm, &path("one"), &[]).expect_code(0);
    let at_save = worker.clone();
    // It goes on with its own disk, and the snapshot does not.
    work(&mut vm, &mut worker, "bbbbd");
    vm.kill().expect_code(5);
    fs::remove_file(&disk).unwrap();

    assert_eq!(files_of(&path("one")), ["0.0.raw"]);
    let verified = cli(&["snapshot", "verify", text(&path("one"))]).expect_code(0);
    assert!(verified.output.contains("4 parts are as they were"), "{}", verified.output);
    let shown = cli(&["snapshot", "inspect", text(&path("one"))]).expect_code(0).output;
    assert!(shown.contains("disk          data: part of the snapshot, disks/0.0.raw"), "{shown}");

    let start = |dir: &Path| Vm::start(restore(dir, &[]));
    let mut twins: Vec<_> = (0..2).map(|_| (start(&path("one")), at_save.clone())).collect();
    for (round, letters) in ["bdbd", "dbwdbd"].into_iter().enumerate() {
        for (vm, worker) in &mut twins {
            work(vm, worker, letters);
            work(vm, worker, if round == 0 { "b" } else { "wb" });
        }
    }
    // What is saved of a restored VM is its own: its disk's files have another name there, and what it wrote is one more.
    let (mut second, mut worker) = twins.swap_remove(0);
    save(&second, &path("two"), &["--stop"]).expect_code(0);
    second.running.wait(LIMIT).expect_code(5);
    assert_eq!(files_of(&path("two")), ["0.0.qcow2", "0.1.raw"]);
    assert_eq!(inode(&path("two/disks/0.1.raw")), inode(&path("one/disks/0.0.raw")));
    cli(&["snapshot", "verify", text(&path("two"))]).expect_code(0);
    fs::remove_dir_all(path("one")).unwrap();
    second = start(&path("two"));
    work(&mut second, &mut worker, "dddbdbdd");
    save(&second, &path("three"), &[]).expect_code(0);
    assert_eq!(files_of(&path("three")), ["0.0.qcow2", "0.1.qcow2", "0.2.raw"]);
    work(&mut second, &mut worker.clone(), "bbbb");
    second.kill().expect_code(5);
    let mut third = start(&path("three"));
    work(&mut third, &mut worker, "dddddd");
    third.kill().expect_code(5);
    let (mut other, mut worker) = twins.remove(0);
    work(&mut other, &mut worker, "dbdbd");
    other.kill().expect_code(5);
}

#[test]
fn what_is_written_is_kept_where_that_is_wanted() {
    let files = tempdir().unwrap();
    let path = |name: &str| files.path().join(name);
    let disk = disk_with(files.path(), "disk", &Worker::disk(DISK));
    let (mut vm, mut worker) = working(&drive("data", false, &disk));
    work(&mut vm, &mut worker, "b");
    save(&vm, &path("snap"), &["--stop"]).expect_code(0);
    let nowhere = Running::start(&mut restore(&path("snap"), &["--disks", "/nowhere"])).wait(LIMIT).expect_code(83);
    assert!(nowhere.errors.contains("/nowhere/data.qcow2"), "{}", nowhere.errors);

    fs::create_dir(path("kept")).unwrap();
    let keep = ["--disks", text(&path("kept"))].map(str::to_owned);
    let keep: Vec<_> = keep.iter().map(String::as_str).collect();
    let mut vm = Vm::start(restore(&path("snap"), &keep));
    work(&mut vm, &mut worker, "bbdb");
    // Also without the disks, as they have names.
    save(&vm, &path("later"), &["--stop", "--no-disks"]).expect_code(0);
    assert_eq!(config(&path("later"))["disks"][0]["stored"], false);
    vm.running.wait(LIMIT).expect_code(5);
    let mut vm = Vm::start(restore(&path("later"), &[]));
    work(&mut vm, &mut worker, "ddbd");
    vm.kill().expect_code(5);
    // The file is a disk like others.
    let overlay = path("kept/data.qcow2");
    assert!(content_of(&overlay, &path("snap/disks/0.0.raw"), &path("copy")) == worker.disk_now());

    // It is not written over, and one that was made for nothing does not stay.
    let there = Running::start(&mut restore(&path("snap"), &keep)).wait(LIMIT).expect_code(83);
    assert!(there.errors.contains("data.qcow2 is there already"), "{}", there.errors);
    fs::remove_file(&overlay).unwrap();
    fs::write(path("snap/memory"), "x").unwrap();
    let damaged = Running::start(&mut restore(&path("snap"), &keep)).wait(LIMIT).expect_code(81);
    assert!(damaged.errors.contains("memory"), "{}", damaged.errors);
    assert_eq!(fs::read_dir(path("kept")).unwrap().count(), 0);
}

#[test]
fn a_disk_without_a_name_is_not_left_behind() {
    let files = tempdir().unwrap();
    let path = |name: &str| files.path().join(name);
    let disk = disk_with(files.path(), "disk", &Worker::disk(DISK));
    let (vm, worker) = working(&drive("data", false, &disk));
    save(&vm, &path("snap"), &["--stop"]).expect_code(0);
    let mut vm = Vm::start(restore(&path("snap"), &[]));
    let refused = save(&vm, &path("bare"), &["--no-disks"]);
    assert!(refused.errors.contains("goes with this VM") && !refused.status.success(), "{}", refused.errors);
    assert!(!path("bare").exists());
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    let create = json!({ "snapshot_path": path("state"), "mem_file_path": path("memory") }).to_string();
    vm.expect_fault("PUT", "/snapshot/create", &create, "goes with this VM");
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    work(&mut vm, &mut worker.clone(), "bdb");
    vm.kill().expect_code(5);

    // Another file instead of the snapshot's, as ever.
    let other = disk_with(files.path(), "other", &Worker::disk(DISK));
    let other = format!("--override=disk.data={}", other.display());
    let mut vm = Vm::start(restore(&path("snap"), &[&other]));
    work(&mut vm, &mut worker.clone(), "bdb");
    save(&vm, &path("named"), &["--no-disks"]).expect_code(0);
    vm.kill().expect_code(5);
}

#[test]
fn a_disk_that_only_reads_is_shared_and_chains_are_kept() {
    let files = tempdir().unwrap();
    let path = |name: &str| files.path().join(name);
    let base = disk_with(files.path(), "base", &Worker::disk(DISK));
    fs::set_permissions(&base, fs::Permissions::from_mode(0o444)).unwrap();
    let (mut vm, mut worker) = working(
        &json!({
            "drive_id": "data",
            "is_root_device": false,
            "is_read_only": true,
            "path_on_host": base,
        })
        .to_string(),
    );
    work(&mut vm, &mut worker, "dd");
    save(&vm, &path("snap"), &["--stop"]).expect_code(0);
    assert_eq!(inode(&path("snap/disks/0.0.raw")), inode(&base), "nobody writes to it, so it is no copy");
    let mut vm = Vm::start(restore(&path("snap"), &[]));
    work(&mut vm, &mut worker, "dwd");
    // Nothing is written, so the snapshot's own file will do.
    save(&vm, &path("bare"), &["--no-disks"]).expect_code(0);
    let lies_in = config(&path("bare"))["disks"][0]["config"]["path"].clone();
    assert_eq!(lies_in, text(&path("snap/disks/0.0.raw").canonicalize().unwrap()));
    vm.kill().expect_code(5);
}

#[test]
fn what_is_not_of_the_snapshot_is_refused_and_named() {
    let files = tempdir().unwrap();
    let snap = files.path().join("snap");
    let disk = disk_with(files.path(), "disk", &Worker::disk(DISK));
    let (vm, _) = working(&drive("data", false, &disk));
    save(&vm, &snap, &["--stop"]).expect_code(0);
    let stored = snap.join("disks/0.0.raw");
    let before = fs::read_to_string(snap.join("config.json")).unwrap();
    for place in ["../disk", "/etc/passwd", "memory", "disks/../memory", "disks/", "disks/0.1.raw"] {
        fs::write(snap.join("config.json"), before.replace("disks/0.0.raw", place)).unwrap();
        let refused = Running::start(&mut restore(&snap, &[])).wait(LIMIT).expect_code(81);
        assert!(refused.errors.contains("no part of the snapshot"), "{place}: {}", refused.errors);
    }
    fs::write(snap.join("config.json"), &before).unwrap();
    // Longer, shorter, other, gone.
    let replace = |content: &[u8]| {
        fs::remove_file(&stored).unwrap();
        fs::write(&stored, content).unwrap();
    };
    let content = fs::read(&stored).unwrap();
    replace(&content[..4096]);
    let short = Running::start(&mut restore(&snap, &[])).wait(LIMIT).expect_code(81);
    assert!(short.errors.contains("0.0.raw is damaged: it has 4096 bytes where it had 1048576"), "{}", short.errors);
    let mut other = content.clone();
    other[77] ^= 1;
    replace(&other);
    let other = cli(&["snapshot", "verify", text(&snap)]).expect_code(81);
    assert!(other.errors.contains("0.0.raw is damaged: its checksum"), "{}", other.errors);
    fs::remove_file(&stored).unwrap();
    let gone = Running::start(&mut restore(&snap, &[])).wait(LIMIT).expect_code(81);
    assert!(gone.errors.contains("0.0.raw is damaged: it is missing"), "{}", gone.errors);
}

#[test]
fn an_image_that_is_written_to_is_saved_in_order() {
    let files = tempdir().unwrap();
    let path = |name: &str| -> PathBuf { files.path().join(name) };
    let raw = disk_with(files.path(), "raw", &Worker::disk(DISK));
    cli(&["disk", "create", "--format", "qcow2", "--backing", text(&raw), text(&path("image"))]).expect_code(0);
    // The description of a drive has no word for images behind images; the command line has.
    let mut command = tranche();
    command.args(["run", "--memory", "128M", "--cmdline", "kib=64 disk=1 transport=pci"]);
    command.arg("--kernel").arg(crate::support::guests().join("worker"));
    command.arg("--disk").arg(format!("{},format=qcow2,backing={},id=data", text(&path("image")), text(&raw)));
    let mut vm = Vm::start(command);
    vm.running.output.wait_for("ready\n", LIMIT);
    let mut worker = Worker::new(64, Worker::disk(DISK));
    work(&mut vm, &mut worker, "bbdbbdw");
    save(&vm, &path("snap"), &[]).expect_code(0);
    work(&mut vm, &mut worker.clone(), "bb");
    vm.kill().expect_code(5);
    assert_eq!(files_of(&path("snap")), ["0.0.qcow2", "0.1.raw"]);
    let (image, base) = (path("snap/disks/0.0.qcow2"), path("snap/disks/0.1.raw"));
    assert!(content_of(&image, &base, &path("copy")) == worker.disk_now());
    let mut vm = Vm::start(restore(&path("snap"), &[]));
    work(&mut vm, &mut worker, "ddddbd");
    vm.kill().expect_code(5);
}
