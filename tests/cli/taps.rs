//! Taps that cannot be used: exit codes 40 and 41.

use std::process::Command;

use crate::mistake::{LIMIT, expect_mistake, is_root, run};
use crate::support::nobody::Nobody;
use crate::support::{Running, not_tested};

/// A tap of this test's own; gone with it.
struct Tap(String);

impl Tap {
    fn new(name: &str) -> Option<Self> {
        let name = format!("{name}{}", std::process::id());
        let made = Command::new("ip").args(["tuntap", "add", &name, "mode", "tap", "user", "root"]).output().unwrap();
        if !made.status.success() {
            not_tested(&format!("a tap in use: {}", String::from_utf8_lossy(&made.stderr)));
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

fn interfaces() -> Vec<String> {
    crate::mistake::names(std::path::Path::new("/sys/class/net"))
}

fn with_tap(name: &str) -> Command {
    let mut command = run();
    command.args(["--net", &format!("tap={name}")]);
    command
}

#[test]
fn what_is_no_tap() {
    let missing = "tranche-none0";
    expect_mistake(&mut with_tap(missing), 40, &["no tap interface tranche-none0", "ip tuntap add dev tranche-none0"]);
    assert!(!interfaces().contains(&missing.to_owned()), "no tap was made on the way");
    expect_mistake(&mut with_tap("sixteen-letters-"), 41, &["sixteen-letters-", "1 to 15 bytes", "ip tuntap list"]);
    expect_mistake(&mut with_tap("tap%d"), 41, &["tap%d"]);
    if is_root("an interface that is no tap") {
        expect_mistake(&mut with_tap("lo"), 41, &["lo is not a tap", "ip -d link show lo"]);
    }
}

#[test]
fn a_tap_serves_one_vm() {
    if !is_root("a tap in use") {
        return;
    }
    let Some(tap) = Tap::new("trb") else { return };
    let holder = Running::start(with_tap(&tap.0).args(["--cmdline", "end=halt"]));
    holder.output.wait_for("\nend\n", LIMIT);
    expect_mistake(&mut with_tap(&tap.0), 41, &[&tap.0, "in use by another process", "create another"]);
    drop(holder);
    assert!(interfaces().contains(&tap.0), "the tap outlives the VM");
    Running::start(&mut with_tap(&tap.0)).wait(LIMIT).expect_code(0);
}

#[test]
fn a_tap_of_one_queue() {
    if !is_root("a tap of one queue") {
        return;
    }
    let Some(tap) = Tap::new("trq") else { return };
    let hint = format!("ip tuntap add dev {} mode tap multi_queue", tap.0);
    expect_mistake(run().args(["--net", &format!("tap={},queues=2", tap.0)]), 41, &["made for one queue", &hint]);
}

#[test]
fn no_vhost() {
    if !is_root("vhost=on without vhost-net") {
        return;
    }
    if std::path::Path::new("/dev/vhost-net").exists() {
        return not_tested("vhost=on without vhost-net: this host has it");
    }
    let Some(tap) = Tap::new("trv") else { return };
    let net = format!("tap={},vhost=on", tap.0);
    expect_mistake(run().args(["--net", &net]), 42, &["cannot open /dev/vhost-net", "modprobe vhost_net"]);
}

#[test]
fn a_tap_of_another_user() {
    if !is_root("a tap without permission") {
        return;
    }
    let Some(tap) = Tap::new("tro") else { return };
    let (nobody, net) = (Nobody::new(), format!("tap={}", tap.0));
    let mut command = nobody.run(&["/dev/net/tun"]);
    expect_mistake(command.args(["--net", &net]), 41, &["no permission to use tap", &tap.0, "its owner"]);
}
