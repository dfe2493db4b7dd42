//! How a VM with an API ends, and what it leaves.

use std::os::unix::process::ExitStatusExt;

use rustix::process::Signal;

use crate::vm::{LIMIT, Vm, firecracker, logging_firecracker, vmm};

#[test]
fn the_process_ends_with_its_guest() {
    for (end, code) in [("off", 0), ("reset", 3), ("panic", 4)] {
        let vm = Vm::start(vmm());
        vm.put_kernel("hello", &format!("end={end}"));
        vm.act("InstanceStart");
        let Vm { running, socket, .. } = vm;
        running.wait(LIMIT).expect_code(code);
        assert!(!socket.exists(), "our socket goes with us");
        let vm = Vm::start(logging_firecracker());
        vm.put_kernel("hello", &format!("end={end}"));
        vm.act("InstanceStart");
        let Vm { running, socket, dir } = vm;
        let ended = running.wait(LIMIT).expect_code(0);
        assert!(ended.output.contains("Firecracker exiting successfully. exit_code=0"), "{}", ended.output);
        assert!(socket.exists(), "Firecracker's stays");
        drop(dir);
    }
}

#[test]
fn signals_before_and_after_the_start() {
    let vm = Vm::start(vmm());
    vm.running.signal(Signal::TERM);
    vm.running.wait(LIMIT).expect_code(5);

    let vm = Vm::start(vmm());
    vm.boot_hello("end=button");
    vm.running.signal(Signal::TERM);
    vm.running.wait(LIMIT).expect_code(0);

    for boot in [false, true] {
        let vm = Vm::start(firecracker());
        if boot {
            vm.boot_hello("end=halt");
        }
        vm.running.signal(Signal::TERM);
        let ended = vm.running.wait(LIMIT);
        assert_eq!(ended.status.signal(), Some(Signal::TERM.as_raw()), "{ended:?}");
        let vm = Vm::start(firecracker());
        vm.running.signal(Signal::HUP);
        vm.running.wait(LIMIT).expect_code(156);
    }
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let vm = Vm::start(vmm());
    let mut second = vmm();
    second.arg("--api-sock").arg(&vm.socket);
    let ended = crate::support::Running::start(&mut second).wait(LIMIT).expect_code(72);
    assert!(ended.errors.contains("cannot listen on the API socket"), "{}", ended.errors);
    vm.running.signal(Signal::KILL);
    let Vm { running, socket, dir } = vm;
    running.wait(LIMIT);
    assert!(socket.exists());
    let vm = Vm::start_in(dir, vmm());
    assert_eq!(vm.get("/")["state"], "Not started");
}
