//! What other programs of the host have of it: service managers, shells, and who looks after the host.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, recv};
use rustix::process::Signal;
use serde_json::Value;

use crate::home::{Home, LIMIT, sparse};
use crate::manual;
use crate::pty::Pty;
use crate::support::{Running, guests, not_tested};

#[test]
fn a_service_manager_hears_when_it_runs_and_how_it_ended() {
    let home = Home::new();
    home.create("a", "hello", "end=button", &[]);
    let socket = home.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = home.command(&["start", "--foreground", "a"]);
    let service = Running::start(command.env("NOTIFY_SOCKET", &socket));
    let mut said = [0; 64];
    let (count, _) = retry_on_intr(|| recv(&manager, &mut said[..], RecvFlags::empty())).unwrap();
    assert_eq!(&said[..count], b"READY=1");
    assert_eq!(home.state("a"), "running");
    assert_eq!(home.pid("a"), i32::try_from(service.child.id()).unwrap(), "it is the VM itself");
    home.done(&["wait", "a", "--for", "boot"]);
    while !home.done(&["logs", "a"]).ends_with("end\n") {}
    service.signal(Signal::TERM);
    service.wait(LIMIT).expect_code(0);
    assert_eq!(home.state("a"), "stopped");
    // One that cannot start says so on standard error, and nobody hears that it is ready.
    home.refused(&["start", "--foreground", "nobody"], 90, "no VM 'nobody'");
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut said).is_err());
}

#[test]
fn the_unit_says_what_the_program_understands() {
    let unit =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/resources/systemd/tranche@.service")).unwrap();
    let home = Home::new();
    home.create("a", "hello", "end=button", &[]);
    let words = |key: &str| -> Vec<String> {
        let line = unit.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.strip_prefix("/usr/bin/tranche ").unwrap().replace("%i", "a").split(' ').map(str::to_owned).collect()
    };
    let (start, stop) = (words("ExecStart="), words("ExecStop="));
    let service = Running::start(home.command(&[]).args(&start));
    home.done(&["wait", "a", "--for", "running"]);
    while !home.done(&["logs", "a"]).ends_with("end\n") {}
    Running::start(home.command(&[]).args(&stop)).wait(LIMIT).expect_code(0);
    service.wait(LIMIT).expect_code(0);
}

#[test]
fn shells_take_the_completions() {
    let home = Home::new();
    let manual = home.path("manual");
    manual::write(&manual).unwrap();
    for name in ["tranche.1", "tranche-create.1", "tranche-resize.1", "tranche-doctor.1"] {
        assert!(manual.join("man1").join(name).exists(), "{name}");
    }
    assert!(!manual.join("man1/tranche-confined-tool.1").exists(), "nobody is to call that");
    for (shell, script) in [("bash", "bash/tranche"), ("zsh", "zsh/_tranche"), ("fish", "fish/tranche.fish")] {
        match Command::new(shell).arg("-n").arg(manual.join(script)).output() {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success() && said.is_empty(), "{shell}: {said}");
            }
            Err(_) => not_tested(&format!("the completions of {shell}, which this machine does not have")),
        }
    }
    let complete =
        "source \"$1\"; COMP_WORDS=(tranche res); COMP_CWORD=1; _tranche tranche res tranche; echo \"${COMPREPLY[*]}\"";
    let output = Command::new("bash").args(["-c", complete, "-"]).arg(manual.join("bash/tranche")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "resize restart resume restore");
}

#[test]
fn the_doctor_looks_at_the_host() {
    let home = Home::new();
    let ended = home.run(&["doctor", "--format", "json"]);
    let has_kvm = Path::new("/dev/kvm").exists();
    assert_eq!(ended.status.code(), Some(if has_kvm { 0 } else { 99 }), "{}", ended.output);
    let findings: Vec<Value> = serde_json::from_str(&ended.output).unwrap();
    let kvm = findings.iter().find(|finding| finding["what"] == "KVM").unwrap();
    assert_eq!(kvm["verdict"], if has_kvm { "ok" } else { "fail" });
    // What is not there comes with what to do about it.
    for finding in &findings {
        assert_eq!(finding["verdict"] == "ok", finding["advice"].is_null(), "{finding}");
    }
    assert!(findings.len() > 12);
    let table = home.run(&["doctor"]).output;
    assert!(table.starts_with("WHAT") && table.contains("Landlock"), "{table}");
}

#[test]
fn what_vms_take_is_seen() {
    let home = Home::new();
    sparse(&home.path("disk"), 1 << 20);
    assert_eq!(home.done(&["stats", "--interval", "0", "--format", "json"]), "[]\n");
    home.create("a", "hello", "end=halt", &[]);
    home.create("b", "block", "rounds=1000000", &["--disk", "disk"]);
    home.create("c", "hello", "", &[]);
    home.done(&["start", "a"]);
    home.done(&["start", "b"]);
    let text = home.done(&["stats", "--interval", "0.5", "--format", "json"]);
    let usages: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(usages.iter().map(|usage| usage["name"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b"]);
    let busy = &usages[1];
    assert!(busy["cpu_percent"].as_f64().unwrap() > 1.0 && busy["exits"].as_u64().unwrap() > 0, "{text}");
    assert!(
        busy["disk_read_bytes"].as_u64().unwrap() > 0 && busy["disk_written_bytes"].as_u64().unwrap() > 0,
        "{text}"
    );
    let mib = |key: &str| busy[key].as_u64().unwrap() as f64 / f64::from(1 << 20);
    assert!(mib("guest_bytes") == 32.0 && mib("resident_bytes") > 0.0 && mib("resident_bytes") <= 32.0, "{text}");
    assert!((0.5..20.0).contains(&mib("overhead_bytes")), "{text}");
    assert!(home.done(&["stats", "a", "--interval", "0.1"]).contains("OVERHEAD"));
    home.refused(&["stats", "c"], 93, "does not run");
    home.refused(&["stats", "nobody"], 90, "no VM 'nobody'");
    home.refused(&["top"], 1, "'tranche stats' is for scripts");

    let terminal = Pty::new();
    let top = terminal.start(&mut home.command(&["top", "--interval", "0.1"]));
    top.output.wait_for("2 VMs run", LIMIT);
    top.output.wait_for("OVERHEAD", LIMIT);
    terminal.type_keys(b"q");
    top.wait(LIMIT).expect_code(0);
    terminal.expect_as_before();
}

#[test]
fn memory_is_as_the_policy_says() {
    let home = Home::new();
    let kernel = guests().join("hello");
    let run = |policy: &str| {
        home.run(&["run", "--kernel", kernel.to_str().unwrap(), "--memory", "32M", "--memory-policy", policy])
    };
    run("hugepages,mergeable").expect_code(2);
    run("swap").expect_code(2);
    home.create("a", "hello", "end=halt", &["--memory-policy", "prefault"]);
    assert_eq!(home.inspect("a")["definition"]["vm"]["memory-policy"]["prefault"], true);
    home.done(&["start", "a"]);
    let usages: Vec<Value> =
        serde_json::from_str(&home.done(&["stats", "a", "--interval", "0", "--format", "json"])).unwrap();
    assert!(usages[0]["resident_bytes"].as_u64().unwrap() > 30 << 20, "{usages:?}");
    // Locked memory is limited for users; the limit is named.
    let mut command =
        home.command(&["run", "--kernel", kernel.to_str().unwrap(), "--memory", "32M", "--memory-policy", "locked"]);
    use std::os::unix::process::CommandExt;
    let _ = command.process_group(0);
    let ended = Running::start(&mut command).wait(LIMIT);
    match ended.status.code() {
        Some(0) => {}
        Some(14) => assert!(ended.errors.contains("ulimit -l"), "{}", ended.errors),
        other => panic!("{other:?}: {}", ended.errors),
    }
}
