//! The API from the command line.

use crate::support::{Ended, Running, guests, tranche};
use crate::vm::{LIMIT, Vm, vmm};

fn run(args: &[&str]) -> Ended {
    Running::start(tranche().args(args)).wait(LIMIT)
}

#[test]
fn verbs_drive_a_vm() {
    let vm = Vm::start(vmm());
    let socket = vm.socket.to_str().unwrap();
    let ask = |args: &[&str]| run(&[&["api", "--socket", socket], args].concat());
    assert!(ask(&["get", "/version"]).expect_code(0).output.contains("firecracker_version"));
    let refused = ask(&["PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":1}"#]).expect_code(70);
    assert!(refused.errors.contains("fault_message"), "{}", refused.errors);
    let body = vm.path("boot.json");
    let kernel = guests().join("hello");
    std::fs::write(&body, format!(r#"{{"kernel_image_path":{kernel:?},"boot_args":"end=button"}}"#)).unwrap();
    assert_eq!(ask(&["PUT", "/boot-source", &format!("@{}", body.display())]).expect_code(0).output, "");
    run(&["power", socket, "off"]).expect_code(70);
    run(&["power", socket, "on"]).expect_code(0);
    vm.running.output.wait_for("\nend\n", LIMIT);
    run(&["pause", socket]).expect_code(0);
    assert_eq!(vm.get("/v2/vm")["state"], "paused");
    run(&["resume", socket]).expect_code(0);
    run(&["power", socket, "off"]).expect_code(0);
    vm.running.wait(LIMIT).expect_code(0);
}

#[test]
fn a_vm_that_is_not_there_is_told_of() {
    let ended = run(&["pause", "/nowhere/api.sock"]).expect_code(71);
    assert!(ended.errors.contains("cannot connect to /nowhere/api.sock"), "{}", ended.errors);
    run(&["api", "--socket", "/nowhere", "FLY", "/"]).expect_code(2);
    run(&["api", "--socket", "/nowhere", "PUT", "/", "@/nowhere/body"]).expect_code(2);
}

#[test]
fn run_serves_the_api_too() {
    let mut command = tranche();
    command.arg("run").arg("--kernel").arg(guests().join("hello")).args(["--cmdline", "end=halt", "--memory", "64M"]);
    let vm = Vm::start(command);
    vm.running.output.wait_for("\nend\n", LIMIT);
    assert_eq!(vm.get("/")["state"], "Running");
    let shown = vm.get("/vm/config");
    assert_eq!(shown["machine-config"]["mem_size_mib"], 64);
    assert!(shown["boot-source"]["boot_args"].as_str().unwrap().ends_with("end=halt"), "{shown}");
    vm.kill().expect_code(5);
}

#[test]
fn a_description_starts_a_vm() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    let kernel = guests().join("hello");
    std::fs::write(&file, format!(r#"{{"boot-source":{{"kernel_image_path":{kernel:?},"boot_args":"end=halt"}}}}"#))
        .unwrap();
    let mut command = vmm();
    command.arg("--config").arg(&file);
    let vm = Vm::start(command);
    vm.running.output.wait_for("\nend\n", LIMIT);
    vm.kill().expect_code(5);
    std::fs::write(&file, "{").unwrap();
    let mut command = vmm();
    command.arg("--config").arg(&file).arg("--api-sock").arg(dir.path().join("s"));
    let ended = Running::start(&mut command).wait(LIMIT).expect_code(73);
    assert!(ended.errors.contains("cannot read the description"), "{}", ended.errors);
    assert!(!dir.path().join("s").exists());
}
