//! What depends on other objects and on the host is told when it is asked for.

use std::fs::OpenOptions;

use crate::support::guests;
use crate::vm::{Vm, drive, firecracker};

#[test]
fn files_that_cannot_be_had_are_told_of_at_once() {
    let vm = Vm::start(firecracker());
    let boot = |kernel: &str, initrd: &str| format!(r#"{{"kernel_image_path":"{kernel}","initrd_path":"{initrd}"}}"#);
    let tiny = guests().join("tiny");
    let tiny = tiny.to_str().unwrap();
    vm.expect_fault("PUT", "/boot-source", &boot("/nowhere/kernel", tiny), "/nowhere/kernel");
    vm.expect_fault("PUT", "/boot-source", &boot(tiny, "/nowhere/initrd"), "/nowhere/initrd");
    vm.expect_fault("PUT", "/drives/d", &drive("d", false, "/nowhere/disk".as_ref()), "/nowhere/disk");
    let nic = r#"{"iface_id":"n","host_dev_name":"no-such-tap"}"#;
    vm.expect_fault("PUT", "/network-interfaces/n", nic, "no tap interface no-such-tap");
    vm.expect_fault("PUT", "/serial", r#"{"serial_out_path":"/nowhere/out"}"#, "/nowhere/out");
    vm.expect_fault("PUT", "/logger", r#"{"log_path":"/nowhere/log"}"#, "/nowhere/log");
    let shown = vm.get("/vm/config");
    assert!(shown["boot-source"].is_null() && shown["drives"].as_array().unwrap().is_empty(), "{shown}");
}

#[test]
fn boot_arguments_have_a_limit_with_what_is_appended() {
    let vm = Vm::start(firecracker());
    let boot = |len| {
        let args = "x".repeat(len);
        format!(r#"{{"kernel_image_path":{:?},"boot_args":"{args}"}}"#, guests().join("hello"))
    };
    // " pci=off" comes behind.
    vm.put("/boot-source", &boot(2040));
    vm.expect_fault("PUT", "/boot-source", &boot(2041), "2049 bytes");
    assert_eq!(vm.get("/vm/config")["boot-source"]["boot_args"].as_str().map(str::len), Some(2040));
}

#[test]
fn a_drive_can_be_put_again_and_there_is_one_root() {
    let vm = Vm::start(firecracker());
    let (disk, other) = (vm.path("disk"), vm.path("other"));
    for path in [&disk, &other] {
        OpenOptions::new().create(true).truncate(true).write(true).open(path).unwrap().set_len(1 << 20).unwrap();
    }
    vm.put("/drives/a", &drive("a", false, &disk));
    // The file is locked by the very drive that is replaced.
    vm.put("/drives/a", &drive("a", true, &disk));
    vm.expect_fault("PUT", "/drives/b", &drive("b", false, &disk), "in use already");
    vm.expect_fault("PUT", "/drives/b", &drive("b", true, &other), "\"a\" is the root device already");
    vm.put("/drives/a", &drive("a", false, &disk));
    vm.put("/drives/b", &drive("b", true, &other));
    let shown = vm.get("/vm/config");
    assert_eq!(shown["drives"].as_array().unwrap().len(), 2, "{shown}");
    vm.boot_hello("end=halt");
    let text = vm.running.output.text();
    assert!(text.contains("cmdline=end=halt pci=off root=/dev/vda rw\n"), "{text}");
    vm.kill().expect_code(0);
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    let vm = Vm::start(firecracker());
    let disk = vm.path("disk");
    std::fs::write(&disk, [0; 512]).unwrap();
    vm.put("/drives/d", &drive("d", false, &disk));
    let kernel = vm.path("kernel");
    std::fs::write(&kernel, "no kernel").unwrap();
    vm.put("/boot-source", &format!(r#"{{"kernel_image_path":{kernel:?}}}"#));
    for _ in 0..2 {
        vm.expect_fault("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, "neither");
    }
    vm.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":8}"#);
    vm.put_kernel("hello", "end=halt");
    vm.expect_fault("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, "too little");
    vm.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#);
    vm.boot_hello("end=halt");
    vm.kill().expect_code(0);
}

/// Of what KVM does not have here, the start says which.
#[test]
fn a_cpu_configuration_is_taken_by_the_start() {
    let vm = Vm::start(firecracker());
    let start = r#"{"action_type":"InstanceStart"}"#;
    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
    vm.put_kernel("hello", "end=halt");
    let leaf = |leaf: &str| {
        let registers = r#"[{"register":"eax","bitmap":"0bxx00"}]"#;
        format!(r#"{{"cpuid_modifiers":[{{"leaf":"{leaf}","subleaf":"0x0","flags":0,"modifiers":{registers}}}]}}"#)
    };
    for (body, what) in [
        (r#"{"kvm_capabilities":["1","4711"]}"#.to_owned(), "lacks capability 4711"),
        (leaf("0x12345678"), "changes CPUID leaf 0x12345678, subleaf 0x0, which KVM does not have"),
        (r#"{"msr_modifiers":[{"addr":"0x12345678","bitmap":"0b1"}]}"#.to_owned(), "changes MSR 0x12345678, which KVM"),
    ] {
        vm.put("/cpu-config", &body);
        vm.expect_fault("PUT", "/actions", start, what);
        let shown: serde_json::Value = serde_json::from_str(&body).unwrap();
        for (key, value) in shown.as_object().unwrap() {
            assert_eq!(&vm.get("/vm/config")["cpu-config"][key], value);
        }
    }
    vm.expect_fault("PUT", "/cpu-config", r#"{"kvm_capabilities":["x"]}"#, "is not the number of a KVM capability");
    // What is said last counts: a model of CPUs, which None is, or changes of them.
    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64,"cpu_template":"None"}"#);
    assert!(vm.get("/vm/config")["cpu-config"].is_null());
    vm.put("/cpu-config", &leaf("0x1"));
    assert!(vm.get("/machine-config").get("cpu_template").is_none());
    vm.boot_hello("end=halt");
    vm.kill().expect_code(0);
}

#[test]
fn huge_pages_that_the_host_has_not_reserved_are_told_of() {
    let vm = Vm::start(firecracker());
    // 16 TiB of them: no host has those.
    vm.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":16777216,"huge_pages":"2M"}"#);
    vm.put_kernel("hello", "end=halt");
    let start = r#"{"action_type":"InstanceStart"}"#;
    vm.expect_fault("PUT", "/actions", start, "8388608 are needed: 'sysctl vm.nr_hugepages=");
    vm.put("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64,"huge_pages":"Transparent","smt":true}"#);
    let shown = vm.get("/machine-config");
    assert_eq!((&shown["smt"], &shown["huge_pages"]), (&true.into(), &"Transparent".into()));
    vm.boot_hello("end=halt");
    vm.kill().expect_code(0);
}
