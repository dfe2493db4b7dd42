//! Hosts without a KVM that can be used: exit codes 10 and 11.

use crate::mistake::{LIMIT, after_script, expect_mistake, is_root, run};
use crate::support::Running;
use crate::support::nobody::Nobody;

#[test]
fn no_kvm_at_all() {
    if !is_root("a host without KVM") {
        return;
    }
    let missing = "mount -t tmpfs none /dev";
    expect_mistake(&mut after_script(missing, &run()), 10, &["no KVM", "/dev/kvm", "No such file", "modprobe"]);
    // A node without a driver: major 240 to 254 is for experiments.
    let dead = "mount -t tmpfs none /dev\nmknod -m 666 /dev/kvm c 254 4000";
    expect_mistake(&mut after_script(dead, &run()), 10, &["no KVM", "/dev/kvm", "modprobe"]);
}

#[test]
fn something_else_in_its_place() {
    if !is_root("a /dev/kvm that is none") {
        return;
    }
    for other in ["mount --bind /dev/null /dev/kvm", "mount -t tmpfs none /dev\necho > /dev/kvm"] {
        let mut command = after_script(other, &run());
        expect_mistake(&mut command, 10, &["/dev/kvm is not the device of KVM", "Inappropriate ioctl"]);
    }
}

#[test]
fn no_permission() {
    if !is_root("a /dev/kvm without permission") {
        return;
    }
    let nobody = Nobody::new();
    let words = ["no permission to use /dev/kvm", "Permission denied", "usermod -aG kvm"];
    expect_mistake(&mut nobody.run_without_kvm(), 11, &words);
    // An ordinary user with permission needs nothing else.
    Running::start(&mut nobody.run(&[])).wait(LIMIT).expect_code(0);
}
