//! What is said of a jail: where it cannot be, or is not whole.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::nobody::Nobody;
use crate::support::{Running, guests, not_tested, tranche};

const LIMIT: Duration = Duration::from_secs(60);

fn run() -> Command {
    let mut command = tranche();
    command.arg("run").arg("--kernel").arg(guests().join("hello"));
    command
}

#[test]
fn a_guest_runs_at_each_level_and_off_is_said_loudly() {
    for (level, said) in [("strict", ""), ("compat", ""), ("off", "warning: --jail off")] {
        let ended = Running::start(run().args(["--jail", level])).wait(LIMIT).expect_code(0);
        assert!(ended.output.contains("memory="), "{level}: {ended:?}");
        assert!(ended.errors.contains(said) && ended.errors.is_empty() == said.is_empty(), "{level}: {ended:?}");
    }
}

/// It may be in other hands, and heed nothing.
#[test]
fn a_vmm_that_does_not_end_is_ended_by_the_third_signal() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let running = Running::start(run().args(["--cmdline", "end=halt", "--api-sock"]).arg(&socket));
    running.output.wait_for("\nend\n", LIMIT);
    let vmm = rustix::process::Pid::from_raw(running.vmm().cast_signed()).unwrap();
    rustix::process::kill_process(vmm, Signal::STOP).unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        running.signal(signal);
    }
    let ended = running.wait(LIMIT).expect_code(5);
    assert!(ended.errors.contains("ended by a third signal"), "{ended:?}");
    assert!(rustix::process::test_kill_process(vmm).is_err(), "the VMM is gone");
}

#[test]
fn the_doctor_tells_each_layer() {
    let ended = Running::start(tranche().args(["doctor", "--jail", "--format", "json"])).wait(LIMIT).expect_code(0);
    let findings: Vec<serde_json::Value> = serde_json::from_str(&ended.output).unwrap();
    let names: Vec<_> = findings.iter().map(|finding| finding["what"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["namespaces", "empty root directory", "user", "cgroup", "limits", "profile", "Landlock", "seccomp"]
    );
    // Not every host gives groups away.
    let ok = |finding: &serde_json::Value| finding["verdict"] == "ok" || finding["what"] == "cgroup";
    assert!(findings.iter().all(ok), "{}", ended.output);
}

/// In a changed root directory, Linux makes no user namespaces.
#[test]
fn where_there_are_no_user_namespaces_strict_refuses_and_compat_says_what_is_missing() {
    if !rustix::process::geteuid().is_root() {
        return not_tested("a host without user namespaces: only root can make one");
    }
    let nobody = Nobody::new();
    let ended = Running::start(&mut nobody.run_without_user_namespaces("strict")).wait(LIMIT).expect_code(15);
    assert!(ended.errors.contains("the VMM cannot be jailed"), "{ended:?}");
    assert!(ended.errors.contains("kernel.unprivileged_userns_clone") && ended.output.is_empty(), "{ended:?}");
    let ended = Running::start(&mut nobody.run_without_user_namespaces("compat")).wait(LIMIT).expect_code(0);
    assert!(ended.errors.contains("the jail is incomplete: no namespaces"), "{ended:?}");
    assert!(ended.output.contains("memory="), "{ended:?}");
}

#[test]
fn limits_of_cpu_time_and_memory_are_never_left_out() {
    for limit in ["--cpu-limit=0.5", "--cpu-weight=10", "--memory-limit=1G"] {
        let ended = Running::start(run().args(["--jail", "off", limit])).wait(LIMIT).expect_code(15);
        assert!(ended.errors.contains("take a jail") && ended.output.is_empty(), "{ended:?}");
    }
    if !rustix::process::geteuid().is_root() {
        return not_tested("an ordinary user without a cgroup: only root can play one");
    }
    // To whom nobody gives a group.
    let nobody = Nobody::new();
    for level in ["strict", "compat"] {
        let mut command = nobody.run(&[]);
        command.args(["--jail", level, "--cpu-limit", "0.5"]);
        let ended = Running::start(&mut command).wait(LIMIT).expect_code(15);
        assert!(ended.errors.contains("cgroup") && ended.errors.contains("hint:"), "{ended:?}");
        assert!(ended.output.is_empty(), "{ended:?}");
    }
    for limit in ["--io-limit=1M,ops=9", "--net-limit=ops=9"] {
        let ended = Running::start(nobody.run(&[]).arg(limit)).wait(LIMIT).expect_code(0);
        assert!(ended.output.contains("memory="), "{ended:?}");
    }
}

/// Called firecracker, there is no parent, and files are opened; but no more than that.
#[test]
fn under_firecrackers_name_there_are_filters_unless_they_are_not_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("firecracker");
    std::os::unix::fs::symlink(tranche().get_program(), &program).unwrap();
    let config = dir.path().join("config.json");
    let kernel = guests().join("hello");
    let text = serde_json::json!({"boot-source": {"kernel_image_path": kernel, "boot_args": "end=off"}, "drives": []});
    std::fs::write(&config, text.to_string()).unwrap();
    let run = |attack: &str, more: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["--no-api", "--config-file"]).arg(&config).args(more);
        Running::start(command.env("TRANCHE_ATTACK", attack)).wait(LIMIT)
    };
    for kind in ["main", "vcpu"] {
        for (attempt, number) in [("exec", "059"), ("ptrace", "101"), ("mount", "165"), ("map-code", "009")] {
            let ended = run(&format!("{kind}:{attempt}"), &[]).expect_code(148);
            let told = format!("Shutting down VM after intercepting a bad syscall ({number})");
            assert!(ended.errors.contains(&told), "{kind}: {ended:?}");
        }
    }
    let ended = run("vcpu:open-shadow", &[]).expect_code(148);
    assert!(ended.errors.contains("bad syscall (257)"), "{ended:?}");
    run("vcpu:exec", &["--no-seccomp"]).expect_code(0);
    run("", &[]).expect_code(0);
}
