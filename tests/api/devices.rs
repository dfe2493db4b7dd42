//! Disks and the serial port, as the API has them.

use crate::support::disk_with;
use crate::vm::{LIMIT, Vm, drive, firecracker};

#[test]
fn a_guest_reads_its_drive() {
    for pci in [false, true] {
        let mut command = firecracker();
        if pci {
            command.arg("--enable-pci");
        }
        let vm = Vm::start(command);
        let disk = disk_with(vm.dir.path(), "disk", &vec![7; 1 << 20]);
        vm.put("/drives/d", &drive("d", false, &disk));
        vm.put_kernel("block", if pci { "" } else { "transport=mmio" });
        vm.act("InstanceStart");
        vm.running.output.wait_for(" failed\n", LIMIT);
        let text = vm.running.output.text();
        assert!(text.contains(", 0 failed"), "{text}");
        vm.running.wait(LIMIT).expect_code(0);
    }
}

/// One request an hour, until the limit is taken away.
#[test]
fn limits_count_at_once_and_so_does_their_end() {
    let vm = Vm::start(firecracker());
    let disk = disk_with(vm.dir.path(), "disk", &vec![7; 1 << 20]);
    let ops = r#""rate_limiter":{"ops":{"size":1,"refill_time":3600000}}"#;
    let body = drive("d", false, &disk);
    vm.put("/drives/d", &format!("{},{ops}}}", body.trim_end_matches('}')));
    vm.put_kernel("block", "transport=mmio");
    vm.act("InstanceStart");
    vm.running.output.wait_for("capacity=", LIMIT);
    vm.patch("/drives/d", r#"{"drive_id":"d","rate_limiter":{"ops":{"size":2,"refill_time":3600000}}}"#);
    assert_eq!(vm.get("/vm/config")["drives"][0]["rate_limiter"]["ops"]["size"], 2);
    assert_eq!(vm.get("/")["state"], "Running");
    vm.patch("/drives/d", r#"{"drive_id":"d","rate_limiter":{"ops":{"size":0,"refill_time":0}}}"#);
    vm.running.output.wait_for(" failed\n", LIMIT);
    let text = vm.running.output.text();
    assert!(text.contains(", 0 failed"), "{text}");
    vm.running.wait(LIMIT).expect_code(0);
}

#[test]
fn the_serial_port_goes_to_a_file() {
    let vm = Vm::start(firecracker());
    let out = vm.path("out");
    vm.put("/serial", &format!(r#"{{"serial_out_path":{out:?}}}"#));
    vm.put_kernel("hello", "end=off");
    vm.act("InstanceStart");
    let ended = vm.running.wait(LIMIT).expect_code(0);
    assert!(!ended.output.contains("hello\n"), "{}", ended.output);
    assert!(std::fs::read_to_string(out).unwrap().starts_with("hello\n"));
}

#[test]
fn devices_come_and_go_on_pci_only() {
    let vm = Vm::start(firecracker());
    let disk = disk_with(vm.dir.path(), "disk", b"x");
    vm.boot_hello("end=halt");
    vm.expect_fault("PUT", "/drives/d", &drive("d", false, &disk), "PCI");
    vm.expect_fault("PATCH", "/drives/d", r#"{"drive_id":"d"}"#, "no drive");
    vm.kill().expect_code(0);

    let mut command = firecracker();
    command.arg("--enable-pci");
    let vm = Vm::start(command);
    let disk = disk_with(vm.dir.path(), "disk", b"x");
    vm.boot_hello("end=halt");
    vm.expect_fault("PUT", "/drives/d", &drive("d", true, &disk), "cannot be the root device");
    vm.put("/drives/d", &drive("d", false, &disk));
    assert_eq!(vm.get("/v2/vm")["devices"][0]["id"], "d");
    vm.fault("PUT", "/drives/d", &drive("d", false, &disk));
    let other = disk_with(vm.dir.path(), "other", &[1; 4096]);
    vm.patch("/drives/d", &format!(r#"{{"drive_id":"d","path_on_host":{other:?}}}"#));
    assert_eq!(vm.get("/vm/config")["drives"][0]["path_on_host"], other.to_str().unwrap());
    vm.patch("/drives/d", r#"{"drive_id":"d"}"#);
    vm.expect_fault("PATCH", "/drives/d", r#"{"drive_id":"d","path_on_host":"/nowhere"}"#, "/nowhere");
    assert_eq!(vm.get("/vm/config")["drives"][0]["path_on_host"], other.to_str().unwrap());
    vm.change("DELETE", "/drives/d", "");
    // This guest does not know of ACPI: the device stays until it lets go.
    assert_eq!(vm.get("/v2/vm")["devices"][0]["state"], "leaving");
    vm.fault("DELETE", "/drives/e", "");
    vm.kill().expect_code(0);
}
