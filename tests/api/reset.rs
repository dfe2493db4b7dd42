//! The reset button: a VM starts anew in its process, with its devices and clients.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use tranche::api::client::Client;

use crate::support::{Running, Transcript, disk_with, guests, not_tested, tranche};
use crate::vm::{LIMIT, Vm, drive, firecracker, vmm};

const RESET: &str = r#"{"power":"reset"}"#;

fn reset(vm: &Vm) {
    vm.put("/v2/vm/power", RESET);
}

/// What each boot of a guest has said.
fn boots(output: &Transcript) -> Vec<String> {
    let text = output.text();
    text.split("hello\n").skip(1).map(str::to_owned).collect()
}

/// Waits for the last word of boot number `count`.
#[track_caller]
fn wait_for_boot(running: &Running, count: usize) {
    let deadline = std::time::Instant::now() + LIMIT;
    while boots(&running.output).get(count - 1).is_none_or(|said| !said.contains("\nend\n")) {
        assert!(std::time::Instant::now() < deadline, "no boot {count} in:\n{}", running.output.text());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(boots(&running.output).len(), count);
}

/// Every boot finds the same machine: registers, memory map, command line, and memory that nobody has written to.
#[test]
fn each_life_is_like_the_first() {
    for command in [firecracker(), vmm()] {
        let vm = Vm::start(command);
        vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
        vm.boot_hello("end=echo stain=1");
        for count in 2..6 {
            reset(&vm);
            wait_for_boot(&vm.running, count);
        }
        let said = boots(&vm.running.output);
        assert!(said[0].contains("\nstain=0\n"), "{}", said[0]);
        said.iter().for_each(|boot| assert_eq!(*boot, said[0]));
        assert_eq!(vm.get("/")["state"], "Running");
    }
}

/// The serial port, the events of the API and the end of the VM are those of the new life.
#[test]
fn keys_events_and_the_end_reach_the_life_of_now() {
    let mut vm = Vm::start(vmm());
    vm.boot_hello("end=echo");
    vm.running.send("ab");
    vm.running.output.wait_for("ab", LIMIT);
    let mut events = Client::connect(&vm.socket).unwrap().stream("GET", "/v2/events", None).unwrap();
    let mut next = || {
        let line = events.next_line().unwrap().expect("a line");
        let event: serde_json::Value = serde_json::from_slice(&line).unwrap();
        format!("{}>{}", event["from"].as_str().unwrap_or_default(), event["to"].as_str().unwrap())
    };
    assert_eq!(next(), ">running");
    reset(&vm);
    assert_eq!([next(), next()], ["running>starting", "starting>running"]);
    wait_for_boot(&vm.running, 2);
    // One that is paused has begun anew, and not taken a step, until it is resumed.
    vm.patch("/vm", r#"{"state":"Paused"}"#);
    assert_eq!(next(), "running>paused");
    for _ in 0..3 {
        reset(&vm);
        assert_eq!([next(), next()], ["paused>starting", "starting>paused"]);
        assert_eq!(vm.get("/")["state"], "Paused");
    }
    assert_eq!(boots(&vm.running.output).len(), 2);
    vm.patch("/vm", r#"{"state":"Resumed"}"#);
    wait_for_boot(&vm.running, 3);
    assert_eq!(next(), "paused>running");
    vm.running.send("xyq");
    assert_eq!(next(), "running>ended");
    assert!(vm.running.wait(LIMIT).expect_code(0).output.ends_with("\nend\nxyq"));
}

/// Devices are as the clients have left them, and work.
#[test]
fn devices_are_those_of_before() {
    let vm = Vm::start(vmm());
    let make = |name: &str, fill: u8| disk_with(vm.dir.path(), name, &vec![fill; 1 << 20]);
    let [first, second, third] = [make("first", 1), make("second", 2), make("third", 3)];
    vm.put("/drives/a", &drive("a", false, &first));
    vm.boot_hello("end=halt");
    vm.put("/drives/b", &drive("b", false, &second));
    vm.put("/drives/c", &drive("c", false, &third));
    vm.patch("/drives/b", r#"{"drive_id":"b","rate_limiter":{"ops":{"size":9,"refill_time":100}}}"#);
    vm.change("DELETE", "/drives/c", "");
    vm.patch("/drives/a", &format!(r#"{{"drive_id":"a","path_on_host":{:?}}}"#, make("fourth", 4)));
    // A path that is no more does not matter: the file is open.
    fs::rename(&second, second.with_extension("moved")).unwrap();
    reset(&vm);
    wait_for_boot(&vm.running, 2);
    let devices = json!([
        {"kind": "disk", "id": "a", "state": "present", "driver": false},
        {"kind": "disk", "id": "b", "state": "present", "driver": false},
    ]);
    assert_eq!(vm.get("/v2/vm")["devices"], devices);
    let shown = vm.get("/vm/config");
    assert_eq!(shown["drives"].as_array().unwrap().len(), 2);
    assert_eq!(shown["drives"][1]["rate_limiter"]["ops"]["size"], 9);
    // What has left can come again, and what is there is locked.
    vm.put("/drives/c", &drive("c", false, &third));
    vm.fault("PUT", "/drives/d", &drive("d", false, &second.with_extension("moved")));
    vm.put("/drives/d", &drive("d", false, &first));
    for _ in 0..3 {
        reset(&vm);
    }
    assert_eq!(vm.get("/v2/vm")["devices"].as_array().unwrap().len(), 4);
    vm.kill().expect_code(5);
}

/// A guest at work at its disk is reset again and again, and does all its work in the last life.
#[test]
fn a_guest_is_reset_in_mid_flight() {
    for (command, cmdline) in [(vmm(), "rounds=40"), (firecracker(), "rounds=40 transport=mmio")] {
        let vm = Vm::start(command);
        let disk = disk_with(vm.dir.path(), "disk", &vec![7; 1 << 20]);
        vm.put("/drives/d", &drive("d", false, &disk));
        vm.put_kernel("block", cmdline);
        vm.act("InstanceStart");
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(1));
            // It may be done already, and its program be gone.
            let Ok(mut client) = Client::connect(&vm.socket) else { break };
            let Ok(answer) = client.request("PUT", "/v2/vm/power", Some(RESET.as_bytes())) else { break };
            if answer.status != 204 {
                assert_eq!(answer.status, 409, "{}", String::from_utf8_lossy(&answer.body));
                break;
            }
        }
        let ended = vm.running.wait(LIMIT).expect_code(0);
        let last = ended.output.lines().rfind(|line| line.starts_with("done: ")).unwrap_or_default();
        assert!(last.ends_with(", 0 failed"), "{}", ended.output);
    }
}

/// Secondary CPUs wait again to be started.
#[test]
fn all_cpus_are_reset() {
    let vm = Vm::start(vmm());
    vm.put("/machine-config", r#"{"vcpu_count":3,"mem_size_mib":64}"#);
    vm.put_kernel("smp", "cpus=3");
    vm.act("InstanceStart");
    for _ in 0..5 {
        // The guest may have come to its end just now.
        let reset = |mut client: Client| client.request("PUT", "/v2/vm/power", Some(RESET.as_bytes()));
        if !Client::connect(&vm.socket).and_then(reset).is_ok_and(|answer| answer.status == 204) {
            break;
        }
    }
    let ended = vm.running.wait(LIMIT).expect_code(0);
    assert!(ended.output.ends_with(" ok, 0 failed\n"), "{}", ended.output);
}

/// A VM from the command line has what its command line says, again.
#[test]
fn a_vm_of_the_command_line_is_reset() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let disk = disk_with(dir.path(), "disk", &[1; 4096]);
    let mut command = tranche();
    command.arg("run").arg("--kernel").arg(guests().join("hello")).args(["--cmdline", "end=halt root=/dev/vdx"]);
    command.args(["--cpus", "2", "--memory", "65M"]).arg("--rootfs").arg(&disk).arg("--api-sock").arg(&socket);
    let running = Running::start(&mut command);
    wait_for_boot(&running, 1);
    power(&socket);
    wait_for_boot(&running, 2);
    let said = boots(&running.output);
    assert!(said[0].contains("root=/dev/vda rw end=halt root=/dev/vdx\n"), "{}", said[0]);
    assert_eq!(said[0], said[1]);
}

#[track_caller]
fn power(socket: &Path) {
    let reset = tranche().arg("power").arg(socket).arg("reset").output().unwrap();
    assert!(reset.status.success(), "{}", String::from_utf8_lossy(&reset.stderr));
}

/// What a process holds: descriptors, threads, and KiB of memory of its own.
fn holdings(pid: u32) -> (usize, usize, u64) {
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    (count("fd"), count("task"), anonymous.trim().trim_end_matches(" kB").parse().unwrap())
}

/// Many resets leave nothing behind in the process; a tap is joined again each time.
#[test]
fn nothing_leaks() {
    let vm = Vm::start(vmm());
    let disk = disk_with(vm.dir.path(), "disk", &[1; 1 << 16]);
    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
    vm.put("/drives/a", &drive("a", false, &disk));
    vm.put(
        "/drives/b",
        &drive("b", false, &disk_with(vm.dir.path(), "b", &[1; 512])).replace('}', r#","io_engine":"Async"}"#),
    );
    vm.put("/entropy", "{}");
    let tap = Tap::new();
    if let Some(Tap(name)) = &tap {
        vm.put("/network-interfaces/n", &format!(r#"{{"iface_id":"n","host_dev_name":"{name}"}}"#));
    }
    vm.boot_hello("end=halt");
    let again = |times| {
        for _ in 0..times {
            reset(&vm);
        }
        let count = boots(&vm.running.output).len();
        reset(&vm);
        // The serial port may still say what the life before has written.
        let deadline = std::time::Instant::now() + LIMIT;
        while boots(&vm.running.output).len() <= count || !vm.running.output.text().ends_with("\nend\n") {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        holdings(vm.running.vmm())
    };
    let before = again(10);
    let mut after = again(100);
    // Threads of the life before may be about to end.
    let deadline = std::time::Instant::now() + LIMIT;
    while after.0 > before.0 || after.1 > before.1 {
        assert!(std::time::Instant::now() < deadline, "descriptors and threads: {before:?}, then {after:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
        after = holdings(vm.running.vmm());
    }
    assert!(after.2 < before.2 + 512, "{} KiB, then {}", before.2, after.2);
    vm.kill().expect_code(5);
}

/// A tap of this test's own; gone with it.
struct Tap(String);

impl Tap {
    fn new() -> Option<Self> {
        let name = format!("trr{}", std::process::id());
        let made = Command::new("ip").args(["tuntap", "add", &name, "mode", "tap"]).output();
        if !made.is_ok_and(|made| made.status.success()) {
            not_tested("the reset of a VM with a tap: none can be made");
            return None;
        }
        Some(Self(name))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).output();
    }
}

/// What keeps the VM from being reset leaves it as it is.
#[test]
fn a_reset_that_cannot_be_changes_nothing() {
    let vm = Vm::start(vmm());
    let fault = |status: u16, what: &str| {
        let answer = vm.ask("PUT", "/v2/vm/power", Some(RESET));
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(answer.status == status && text.contains(what), "{}: {text}", answer.status);
    };
    fault(409, "before starting");
    let kernel = vm.path("kernel");
    fs::copy(guests().join("hello"), &kernel).unwrap();
    vm.put("/boot-source", &format!(r#"{{"kernel_image_path":{kernel:?},"boot_args":"end=halt"}}"#));
    vm.act("InstanceStart");
    wait_for_boot(&vm.running, 1);
    fs::rename(&kernel, vm.path("away")).unwrap();
    fault(400, "kernel");
    assert_eq!(vm.get("/v2/vm")["state"], "running");
    fs::rename(vm.path("away"), &kernel).unwrap();
    reset(&vm);
    wait_for_boot(&vm.running, 2);
    vm.kill().expect_code(5);
}
