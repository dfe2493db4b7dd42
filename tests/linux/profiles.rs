//! The profiles of AppArmor and TOMOYO in `resources/`, enforced: a VM lives under them, and they hold where its jail had a hole.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::guest::{LIMIT, assets, turn};
use crate::support::{Ended, Running, guests, not_tested, tranche};

/// Where the profiles have the program.
const PROGRAM: &str = "/usr/bin/tranche";

fn resources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/resources"))
}

/// Loads both. What this changes of a machine is gone with the lab.
fn load() {
    fs::copy(env!("CARGO_BIN_EXE_tranche"), PROGRAM).unwrap();
    let mut parser = Command::new("apparmor_parser");
    parser.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").arg("-r").arg(resources().join("apparmor/tranche"));
    let loaded = parser.output().unwrap();
    assert!(loaded.status.success(), "{loaded:?}");
    // The kernel has this loaded when it sees init(8) for the first time.
    let script = format!(
        "#!/bin/sh\ncd {}/tomoyo\nfor file in profile exception_policy domain_policy; do\n\
         cat $file.conf > /sys/kernel/security/tomoyo/$file\ndone\n",
        resources().display()
    );
    fs::write("/sbin/tomoyo-init", script).unwrap();
    fs::set_permissions("/sbin/tomoyo-init", PermissionsExt::from_mode(0o755)).unwrap();
    let _ = Command::new("/sbin/init").arg("--version").output().unwrap();
    let policy = fs::read_to_string("/sys/kernel/security/tomoyo/domain_policy").unwrap();
    assert!(policy.contains("<kernel> /usr/bin/tranche //vmm\nuse_profile 3"), "{policy}");
}

/// What has been forbidden to the program and its VMMs so far.
fn denials() -> Vec<String> {
    let log = Command::new("dmesg").output().unwrap();
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let apparmor = log.lines().filter(|line| line.contains("DENIED") && line.contains("profile=\"tranche"));
    let tomoyo = fs::read_to_string("/sys/kernel/security/tomoyo/audit").unwrap();
    let tomoyo = tomoyo.split("\n\n").filter(|entry| entry.contains("granted=no") && entry.contains(PROGRAM));
    apparmor.chain(tomoyo).map(str::to_owned).collect()
}

/// Has a VMM without seccomp filters attempt something, and tells what came of it.
fn attempt(program: &str, name: &str) -> String {
    let mut command = Command::new(program);
    command.arg("run").arg("--kernel").arg(guests().join("hello")).args(["--cmdline", "end=halt"]);
    command.env("TRANCHE_ATTACK", format!("vcpu:{name}")).env("TRANCHE_ATTACK_UNFILTERED", "1");
    let ended = Running::start(command.env("TRANCHE_VICTIM", "nobody-listens")).wait(LIMIT);
    let told = ended.errors.lines().find_map(|line| line.strip_prefix(&format!("attack: {name}: ")));
    told.unwrap_or_else(|| panic!("{ended:?}")).to_owned()
}

#[test]
fn profiles_of_apparmor_and_tomoyo_are_enforced() {
    let modules = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if std::env::var_os("TRANCHE_LAB").is_none() || !(modules.contains("apparmor") && modules.contains("tomoyo")) {
        return not_tested("AppArmor and TOMOYO: this takes the lab, whose policy may be changed");
    }
    let _turn = turn();
    load();
    let home = TempDir::new().unwrap();
    let run = |words: &[&str]| -> Ended {
        let mut command = Command::new(PROGRAM);
        command.args(words).current_dir(home.path());
        Running::start(command.env("XDG_STATE_HOME", home.path()).env("XDG_RUNTIME_DIR", home.path())).wait(LIMIT)
    };
    let done = |words: &[&str]| run(words).expect_code(0).output;
    fs::copy(assets().join("rootfs.ext4"), home.path().join("root.img")).unwrap();
    let (kernel, initrd) = (assets().join("cloud/vmlinuz"), assets().join("cloud/initrd"));
    let [kernel, initrd] = [&kernel, &initrd].map(|path| path.to_str().unwrap());
    let words = ["create", "web", "--kernel", kernel, "--initrd", initrd, "--rootfs", "root.img", "--ready", "# "];
    done(&[&words[..], &["--cmdline", "quiet", "--net", "user"]].concat());
    done(&["start", "web"]);
    done(&["wait", "web", "--for", "boot", "--timeout", "300"]);
    let seen: serde_json::Value = serde_json::from_str(&done(&["inspect", "web"])).unwrap();
    assert_eq!(seen["jail"]["label"], "tranche//vmm (enforce)", "{seen}");
    assert_eq!(seen["jail"]["capabilities"], "0000000000000000 0000000000000000", "{seen}");
    assert!(done(&["doctor", "--jail"]).contains("AppArmor: tranche (enforce)"));
    done(&["stats", "web"]);
    done(&["snapshot", "create", "web", "saved"]);
    done(&["stop", "web", "--timeout", "300"]);
    done(&["resize", "web", "--disk", "root=128M"]);
    let mut clones = Command::new(PROGRAM);
    clones.args(["clone", "saved", "-n", "2", "--run-dir", "clones"]).current_dir(home.path());
    let clones = Running::start(&mut clones);
    clones.output.wait_for("2 ", LIMIT);
    drop(clones);
    assert_eq!(denials(), [] as [String; 0]);

    // Each of the two, where nothing else stands in the way.
    let unconfined = tranche();
    let unconfined = unconfined.get_program().to_str().unwrap();
    assert_eq!(attempt(unconfined, "internet-socket"), "done");
    assert_eq!(attempt(PROGRAM, "internet-socket"), "Permission denied (os error 13)");
    assert_eq!(attempt(unconfined, "connect-abstract"), "Connection refused (os error 111)");
    assert_eq!(attempt(PROGRAM, "connect-abstract"), "Operation not permitted (os error 1)");
    assert_eq!(denials().len(), 2, "{:?}", denials());
}
