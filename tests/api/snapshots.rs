//! VMs that are saved, and go on: in the same process, in another, many times.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::support::worker::Worker;
use crate::support::{Ended, Running, disk_with, not_tested, tranche};
use crate::vm::{LIMIT, Vm, drive, firecracker, vmm};

/// A VM whose guest gives back what is typed.
fn echoing(command: Command) -> Vm {
    let vm = Vm::start(command);
    vm.boot_hello("end=echo");
    vm
}

/// Types a text that the guest has not said by itself, and waits for its echo.
fn type_in(running: &mut Running, text: &str) {
    running.send(text);
    running.output.wait_for(text, LIMIT);
}

fn snapshot(vm: &Vm, path: &Path, stop: bool) -> Value {
    save(vm, &json!({ "path": path, "stop": stop }))
}

fn save(vm: &Vm, request: &Value) -> Value {
    let body = request.to_string();
    let answer = vm.ask("PUT", "/v2/vm/snapshot", Some(&body));
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert_eq!(answer.status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn refusal(vm: &Vm, status: u16, path: &str, body: &Value) -> String {
    let answer = vm.ask("PUT", path, Some(&body.to_string()));
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert_eq!((answer.status, answer.content_type.as_deref()), (status, Some("application/problem+json")), "{text}");
    text
}

fn restore(dir: &Path) -> Command {
    let mut command = tranche();
    command.arg("restore").arg(dir);
    command
}

/// Has a restored guest echo something, and end.
fn goes_on(mut running: Running) {
    type_in(&mut running, "again");
    running.send("q");
    let ended = running.wait(LIMIT).expect_code(0);
    assert_eq!((ended.output.as_str(), ended.errors.as_str()), ("againq", ""));
}

fn cli(arguments: &[&str]) -> Ended {
    Running::start(tranche().args(arguments)).wait(LIMIT)
}

#[test]
fn a_saved_vm_goes_on_and_so_does_each_that_is_restored() {
    let mut vm = echoing(vmm());
    type_in(&mut vm.running, "#before#");
    let dir = vm.path("snap");
    let times = snapshot(&vm, &dir, false);
    assert!(times["pause_us"].as_u64().unwrap() > 0, "{times}");
    assert!(times["durable_us"].as_u64() >= times["pause_us"].as_u64(), "{times}");
    assert_eq!(vm.get("/")["state"], "Running");
    type_in(&mut vm.running, "#after#");

    let running: Vec<_> = (0..3).map(|_| Running::start(&mut restore(&dir))).collect();
    running.into_iter().for_each(goes_on);
    type_in(&mut vm.running, "#still#");

    let ended = cli(&["snapshot", "verify", dir.to_str().unwrap()]).expect_code(0);
    assert!(ended.output.contains("3 parts are as they were written"), "{}", ended.output);
    let ended = cli(&["snapshot", "inspect", dir.to_str().unwrap()]).expect_code(0);
    assert!(ended.output.contains("vCPUs         1 of ") && ended.output.contains("memory        128M, of which"));
    let ended = cli(&["snapshot", "inspect", "--json", dir.to_str().unwrap()]).expect_code(0);
    let shown: Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!((&shown["config"]["memory"], &shown["manifest"]["version"]), (&json!("128M"), &json!(1)));

    // Nothing is there that was not asked for, and nothing is replaced.
    let there = refusal(&vm, 409, "/v2/vm/snapshot", &json!({ "path": dir }));
    assert!(there.contains("is there already"), "{there}");
    let nowhere = refusal(&vm, 500, "/v2/vm/snapshot", &json!({ "path": "/nowhere/snap" }));
    assert!(nowhere.contains("/nowhere/snap"), "{nowhere}");
    type_in(&mut vm.running, "#and#");
    vm.kill().expect_code(5);
}

#[test]
fn a_vm_that_is_stopped_by_its_snapshot_has_not_run_since() {
    let mut vm = echoing(vmm());
    type_in(&mut vm.running, "#x#");
    let dir = vm.path("snap");
    cli(&["snapshot", "create", vm.socket.to_str().unwrap(), dir.to_str().unwrap(), "--stop"]).expect_code(0);
    vm.running.wait(LIMIT).expect_code(5);

    // Paused, and saved again before it goes on.
    let mut command = restore(&dir);
    command.args(["--paused", "--id", "second"]);
    let mut second = Vm::start(command);
    assert_eq!(second.get("/")["state"], "Paused");
    assert_eq!(second.get("/")["id"], "second");
    assert_eq!(second.get("/vm/config")["boot-source"]["boot_args"], "end=echo");
    let again = second.path("again");
    snapshot(&second, &again, false);
    assert_eq!(second.get("/")["state"], "Paused");
    second.patch("/vm", r#"{"state":"Resumed"}"#);
    type_in(&mut second.running, "#y#");
    // Of a VM whose memory is a snapshot's.
    let third = second.path("third");
    snapshot(&second, &third, true);
    second.running.wait(LIMIT).expect_code(5);
    for dir in [&again, &third, &dir] {
        goes_on(Running::start(&mut restore(dir)));
    }
}

#[test]
fn firecrackers_clients_save_and_load_in_two_files() {
    let mut vm = echoing(firecracker());
    type_in(&mut vm.running, "#x#");
    let files = tempdir().unwrap();
    let (state, memory) = (files.path().join("state"), files.path().join("memory"));
    let create = json!({ "snapshot_path": state, "mem_file_path": memory }).to_string();
    vm.expect_fault("PUT", "/snapshot/create", &create, "PATCH /vm first");
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    vm.put("/snapshot/create", &create);
    let nowhere = json!({ "snapshot_path": "/nowhere/s", "mem_file_path": memory }).to_string();
    vm.expect_fault("PUT", "/snapshot/create", &nowhere, "/nowhere/s");
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    type_in(&mut vm.running, "#y#");

    let load = |resume: bool| {
        let backend = json!({ "backend_type": "File", "backend_path": memory });
        json!({ "snapshot_path": state, "mem_backend": backend, "resume_vm": resume }).to_string()
    };
    let second = Vm::start(firecracker());
    second.put("/snapshot/load", &load(true));
    assert_eq!(second.get("/")["state"], "Running");
    assert_eq!(second.get("/machine-config"), vm.get("/machine-config"));
    goes_on(second.running);

    let third = Vm::start(firecracker());
    let deprecated = json!({ "snapshot_path": state, "mem_file_path": memory }).to_string();
    third.put("/snapshot/load", &deprecated);
    assert_eq!(third.get("/")["state"], "Paused");
    third.patch("/vm", r#"{"state":"Resumed"}"#);
    goes_on(third.running);

    let late = Vm::start(firecracker());
    late.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#);
    late.expect_fault("PUT", "/snapshot/load", &load(true), "not allowed after configuring boot-specific resources");
    assert_eq!(late.get("/")["state"], "Not started");

    // A load that fails is the end.
    std::fs::File::options().write(true).open(&memory).unwrap().set_len(4096).unwrap();
    let fourth = Vm::start(firecracker());
    fourth.expect_fault("PUT", "/snapshot/load", &load(true), "4096 bytes where the VM has 134217728");
    fourth.running.wait(LIMIT).expect_code(1);

    let mut describe = firecracker();
    let described = Running::start(describe.arg("--describe-snapshot").arg(&state)).wait(LIMIT).expect_code(0);
    assert_eq!(described.output, "v1.0.0\n");
    assert_eq!(Running::start(firecracker().arg("--snapshot-version")).wait(LIMIT).expect_code(0).output, "v1.0.0\n");
    let mut describe = firecracker();
    Running::start(describe.arg("--describe-snapshot").arg(&memory)).wait(LIMIT).expect_code(1);
    vm.kill().expect_code(0);
}

#[test]
fn a_disk_that_is_gone_is_named_with_what_overrides_it() {
    let vm = Vm::start(vmm());
    let disk = disk_with(vm.dir.path(), "disk", &vec![7; 1 << 20]);
    vm.put("/drives/data", &drive("data", false, &disk));
    vm.boot_hello("end=echo");
    let dir = vm.path("snap");
    save(&vm, &json!({ "path": dir, "disks": false }));

    // The first VM has it still.
    let ended = Running::start(&mut restore(&dir)).wait(LIMIT).expect_code(31);
    assert!(ended.errors.contains("saved VM's disk.data"), "{}", ended.errors);
    assert!(ended.errors.contains("hint: put it back, or give another with --override disk.data=PATH"));
    let copy = vm.path("copy");
    std::fs::copy(&disk, &copy).unwrap();
    let mut other = restore(&dir);
    goes_on(Running::start(other.arg(format!("--override=disk.data={}", copy.display()))));

    let mut wrong = restore(&dir);
    let ended = Running::start(wrong.arg("--override=disk.root=/x")).wait(LIMIT).expect_code(2);
    assert!(ended.errors.contains("no disk 'root': it has data"), "{}", ended.errors);

    // Another disk under that name is another machine.
    let small = disk_with(vm.dir.path(), "small", &[7; 4096]);
    let mut other = restore(&dir);
    let ended =
        Running::start(other.arg(format!("--override=disk.data={}", small.display()))).wait(LIMIT).expect_code(81);
    assert!(ended.errors.contains("disk 'data'"), "{}", ended.errors);
    vm.kill().expect_code(5);
}

/// A VMM in its jail is not where its user was.
#[test]
fn a_disk_that_was_named_from_where_one_was_is_found_from_elsewhere() {
    let dir = tempdir().unwrap();
    disk_with(dir.path(), "disk", &vec![7; 1 << 20]);
    let mut command = vmm();
    command.current_dir(dir.path());
    let vm = Vm::start_in(dir, command);
    vm.put("/drives/data", &json!({ "drive_id": "data", "is_root_device": false, "path_on_host": "disk" }).to_string());
    vm.boot_hello("end=echo");
    let snap = vm.path("snap");
    save(&vm, &json!({ "path": snap, "disks": false }));
    let files = [vm.path("state"), vm.path("memory")];
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    vm.put("/snapshot/create", &json!({ "snapshot_path": files[0], "mem_file_path": files[1] }).to_string());
    let config: Value = serde_json::from_slice(&std::fs::read(snap.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["disks"][0]["config"]["path"], json!(vm.path("disk")));
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    // After a reset it is still where it was.
    vm.put("/v2/vm/power", r#"{"power":"reset"}"#);
    vm.put("/v2/vm/resize", r#"{"disks":{"data":2097152}}"#);
    assert_eq!(std::fs::metadata(vm.path("disk")).unwrap().len(), 2 << 20);
    vm.patch("/drives/data", r#"{"drive_id":"data","path_on_host":"disk"}"#);
    let Vm { running, dir: _dir, .. } = vm;
    drop(running);
    goes_on(Running::start(&mut restore(&snap)));
}

#[test]
fn a_full_disk_costs_the_snapshot_and_not_the_vm() {
    if !rustix::process::geteuid().is_root() {
        return not_tested("a snapshot on a full disk: only root can");
    }
    let vmm = vmm();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt && exec \"$@\"", "sh"]);
    command.arg(vmm.get_program()).args(vmm.get_args());
    let mut vm = echoing(command);
    let full = refusal(&vm, 500, "/v2/vm/snapshot", &json!({ "path": "/mnt/snap", "stop": true }));
    assert!(full.contains("No space left on device"), "{full}");
    type_in(&mut vm.running, "#on#");
    // Nothing of it takes the room that there is: it fails for the same reason again, and not for what is left.
    let again = refusal(&vm, 500, "/v2/vm/snapshot", &json!({ "path": "/mnt/snap" }));
    assert!(again.contains("No space left on device"), "{again}");
    vm.kill().expect_code(5);
}

/// Kills a VM while it is saved, at every moment that time allows. `TRANCHE_KILL_ROUNDS` (30) says how many of them.
#[test]
fn a_killed_save_leaves_what_was_there_and_nothing_else() {
    let files = tempdir().unwrap();
    let earlier = files.path().join("earlier");
    let (first, mut saved) = (echoing(vmm()), 0);
    snapshot(&first, &earlier, false);
    first.kill().expect_code(5);
    let new: PathBuf = files.path().join("new");
    let rounds = std::env::var("TRANCHE_KILL_ROUNDS").map_or(30, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        // The last ones have all the time they need.
        let in_time = round + 2 >= rounds;
        let moment = match in_time {
            true => Duration::from_secs(1),
            false => Duration::from_micros(5600) * round / rounds,
        };
        let vm = echoing(vmm());
        let body = json!({ "path": new, "stop": false }).to_string();
        let mut client = tranche::api::client::Client::connect(&vm.socket).unwrap();
        let asked = std::thread::spawn(move || client.request("PUT", "/v2/vm/snapshot", Some(body.as_bytes())).is_ok());
        let begun = Instant::now();
        while begun.elapsed() < moment && !(in_time && asked.is_finished()) {
            std::thread::yield_now();
        }
        vm.running.signal(rustix::process::Signal::KILL);
        let done = asked.join().unwrap();
        drop(vm);
        if new.exists() {
            cli(&["snapshot", "verify", new.to_str().unwrap()]).expect_code(0);
            goes_on(Running::start(&mut restore(&new)));
            std::fs::remove_dir_all(&new).unwrap();
            saved += 1;
        } else {
            assert!(!done, "an answer came for a snapshot that is not there");
        }
    }
    assert!(saved > 0, "none of them was in time");
    let vm = echoing(vmm());
    snapshot(&vm, &new, false);
    let mut names: Vec<_> = std::fs::read_dir(files.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["earlier", "new"]);
    cli(&["snapshot", "verify", earlier.to_str().unwrap()]).expect_code(0);
    vm.kill().expect_code(5);
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    for arguments in [&["restore", path][..], &["snapshot", "verify", path], &["snapshot", "inspect", "/nowhere"]] {
        let ended = cli(arguments).expect_code(80);
        assert!(ended.errors.contains("is no snapshot: it has no manifest.json"), "{}", ended.errors);
    }
    let ended = cli(&["restore", path, "--override", "x"]).expect_code(2);
    assert!(ended.errors.contains("overrides nothing"), "{}", ended.errors);
    let vm = Vm::start(vmm());
    let none = refusal(&vm, 400, "/v2/vm/restore", &json!({ "path": path }));
    assert!(none.contains("is no snapshot"), "{none}");
    assert_eq!(vm.get("/")["state"], "Not started");
    let early = refusal(&vm, 409, "/v2/vm/snapshot", &json!({ "path": path }));
    assert!(early.contains("before starting"), "{early}");
}

#[test]
fn a_snapshot_goes_on_in_a_process_that_waits_for_it() {
    let mut first = echoing(vmm());
    type_in(&mut first.running, "#x#");
    let dir = first.path("snap");
    snapshot(&first, &dir, true);
    let second = Vm::start(vmm());
    second.put("/v2/vm/restore", &json!({ "path": dir, "clock": "advance" }).to_string());
    assert_eq!(second.get("/")["state"], "Running");
    goes_on(second.running);
}

/// What a client asks for that keeps account of written pages.
fn create_files(vm: &Vm, state: &Path, memory: &Path, kind: &str) {
    let body = json!({ "snapshot_path": state, "mem_file_path": memory, "snapshot_type": kind });
    vm.put("/snapshot/create", &body.to_string());
}

fn load_files(state: &Path, memory: &Path, track: bool) -> String {
    let backend = json!({ "backend_type": "File", "backend_path": memory });
    let load = json!({ "snapshot_path": state, "mem_backend": backend, "track_dirty_pages": track, "resume_vm": true });
    load.to_string()
}

/// Lays the pages of one memory file over those of another.
fn merge(base: &Path, diff: &Path) {
    let (from, to) = (std::fs::File::open(diff).unwrap(), std::fs::File::options().write(true).open(base).unwrap());
    assert_eq!(from.metadata().unwrap().len(), to.metadata().unwrap().len());
    let len = from.metadata().unwrap().len();
    tranche::memory::saved::copy_data(&from, &to, 0..len).unwrap();
}

fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// A guest that writes, and has a disk write, into 4 MiB of memory.
fn working(files: &Path, track: bool) -> (Vm, Worker) {
    let vm = Vm::start(firecracker());
    let disk = disk_with(files, "disk", &Worker::disk(1 << 20));
    vm.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": track }).to_string());
    vm.put("/drives/data", &drive("data", false, &disk));
    vm.put_kernel("worker", "kib=4096 disk=1 transport=mmio");
    vm.act("InstanceStart");
    vm.running.output.wait_for("ready\n", LIMIT);
    (vm, Worker::new(4096, Worker::disk(1 << 20)))
}

const PAUSED: &str = r#"{"state":"Paused"}"#;
const RESUMED: &str = r#"{"state":"Resumed"}"#;

#[test]
fn differences_over_a_base_are_all_of_memory() {
    for track in [true, false] {
        let files = tempdir().unwrap();
        let path = |name: &str| files.path().join(name);
        let (mut vm, mut worker) = working(files.path(), track);
        assert_eq!(vm.get("/machine-config")["track_dirty_pages"], track);
        worker.tell(&mut vm.running, "wdz");
        worker.check(&mut vm.running);
        vm.patch("/vm", PAUSED);
        let (base, full, diff) = (path("base"), path("full"), path("diff"));
        create_files(&vm, &path("state"), &base, "Full");
        for (round, letters) in ["w", "zzd", "ddddwz", ""].into_iter().enumerate() {
            vm.patch("/vm", RESUMED);
            worker.tell(&mut vm.running, letters);
            worker.check(&mut vm.running);
            vm.patch("/vm", PAUSED);
            if round == 2 {
                // What fails takes nothing away from the next.
                let body =
                    json!({ "snapshot_path": "/nowhere/s", "mem_file_path": path("lost"), "snapshot_type": "Diff" });
                vm.expect_fault("PUT", "/snapshot/create", &body.to_string(), "/nowhere/s");
                assert!(!path("lost").exists());
            }
            create_files(&vm, &path("state"), &diff, "Diff");
            // Not what is a base for those that come, as it is made apart from them.
            snapshot(&vm, &full, false);
            if track {
                assert!(blocks(&diff) < 1 << 20, "{} bytes", blocks(&diff));
            }
            merge(&base, &diff);
            assert!(std::fs::read(&base).unwrap() == std::fs::read(full.join("memory")).unwrap(), "{track}, {round}");
            std::fs::remove_dir_all(&full).unwrap();
            std::fs::remove_file(&diff).unwrap();
        }
        drop(vm.kill());

        let mut second = Vm::start(firecracker());
        second.put("/snapshot/load", &load_files(&path("state"), &base, track));
        assert_eq!(second.get("/machine-config")["track_dirty_pages"], track);
        worker.check(&mut second.running);
        worker.tell(&mut second.running, "wzd");
        worker.check(&mut second.running);
        second.patch("/vm", PAUSED);
        // Over the file that it runs on: merged, and in the place of it.
        create_files(&second, &path("state"), &base, "Diff");
        snapshot(&second, &full, false);
        assert!(std::fs::read(&base).unwrap() == std::fs::read(full.join("memory")).unwrap(), "{track}");
        let mut twin = worker.clone();
        second.patch("/vm", RESUMED);
        worker.tell(&mut second.running, "dwz");
        worker.check(&mut second.running);
        drop(second.kill());

        let mut third = Vm::start(firecracker());
        third.put("/snapshot/load", &load_files(&path("state"), &base, false));
        twin.tell(&mut third.running, "dw");
        twin.check(&mut third.running);
        third.kill().expect_code(0);
    }
}
