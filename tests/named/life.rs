//! From `create` to `rm`, and what goes wrong in between.

use std::fs;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::home::{Home, LIMIT, sparse};
use crate::support::{Running, guests, not_tested};

#[test]
fn a_vm_lives_and_is_seen_to() {
    let home = Home::new();
    assert_eq!(home.names(), [""; 0]);
    let disk = home.path("data,disk.img");
    sparse(&disk, 1 << 20);
    let words = ["--disk", "data,,disk.img", "--cpus", "2", "--net", "user,forward=tcp:0:80"];
    let refused = home.run(&[&["create", "web", "--kernel", "k"][..], &words].concat());
    assert_eq!(refused.status.code(), Some(2), "{}", refused.errors);
    home.create("web", "hello", "end=button", &words[..4]);
    assert_eq!((home.names(), home.state("web")), (vec!["web".into()], "stopped".into()));
    home.done(&["start", "web"]);
    assert_eq!(home.state("web"), "running");
    home.done(&["wait", "web", "--for", "running", "--timeout", "10"]);

    let listed: Value = serde_json::from_str(&home.done(&["ls", "--format", "json"])).unwrap();
    let row = &listed[0];
    assert_eq!((&row["name"], &row["state"], &row["cpus"]), (&"web".into(), &"running".into(), &2.into()));
    assert_eq!((&row["memory_bytes"], &row["pending"]), (&(32 << 20).into(), &false.into()));
    assert_eq!(row["disks"][0].as_str(), disk.canonicalize().unwrap().to_str(), "wherever the next start is");
    assert!(row["uptime_seconds"].as_u64().unwrap() < 60);
    let table = home.done(&["ls"]);
    assert!(table.lines().nth(1).unwrap().starts_with("web   running  2     32M     data,disk.img"), "{table}");

    // Verbs that take a socket take its name.
    home.done(&["pause", "web"]);
    assert!(home.done(&["api", "--socket", "web", "GET", "/v2/vm"]).contains(r#""state":"paused""#));
    home.done(&["resume", "web"]);
    home.done(&["snapshot", "create", "web", home.path("saved").to_str().unwrap()]);
    assert!(home.path("saved/manifest.json").exists());

    home.refused(&["start", "web"], 92, "the VM 'web' runs");
    home.refused(&["rm", "web"], 92, "'tranche stop web' stops it");
    home.refused(&["rename", "web", "other"], 92, "runs");
    home.done(&["stop", "web"]);
    assert_eq!(home.state("web"), "stopped");
    assert!(!home.path("run/tranche/web").exists(), "nothing of its start is left");
    assert_eq!(home.inspect("web")["last-start"]["ended"]["reason"], "the guest powered off");
    home.refused(&["stop", "web"], 93, "'tranche start web' starts it");
    home.refused(&["pause", "web"], 93, "does not run");

    home.done(&["rename", "web", "shop"]);
    home.refused(&["start", "web"], 90, "there is no VM 'web'");
    home.done(&["start", "shop"]);
    home.done(&["rm", "--force", "shop"]);
    assert_eq!((home.names(), disk.exists()), (vec![], true), "its disks are its owner's");
    assert_eq!(fs::read_dir(home.path("run/tranche")).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_is_not_made() {
    let home = Home::new();
    let kernel = guests().join("hello");
    let kernel = kernel.to_str().unwrap();
    let config = |name: &str, text: &str| {
        let path = home.path(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let unknown = config("unknown", r#"{"version":1,"vm":{"kernel":"/k","colour":1}}"#);
    let later = config("later", r#"{"version":9,"vm":{}}"#);
    let theirs = config("theirs", r#"{"boot-source":{"kernel_image_path":"/k"}}"#);
    for (words, code, what) in [
        (&["create", "a/b", "--kernel", kernel][..], 2, "cannot be called 'a/b'"),
        (&["create", "a"], 2, "--kernel"),
        (&["create", "a", "--kernel", "missing"], 60, "no imported kernel 'missing'"),
        (&["create", "a", "--kernel", "./missing"], 20, "No such file"),
        (&["create", "a", "--kernel", kernel, "--initrd", "/missing"], 24, "No such file"),
        (&["create", "a", "--kernel", kernel, "--disk", "/missing"], 30, "No such file"),
        (&["create", "a", "--kernel", kernel, "--cpus", "65"], 2, "65 vCPUs are out of range"),
        (&["create", "a", "--config", &unknown], 73, "unknown field `colour`"),
        (&["create", "a", "--config", &later], 73, "version 9, this release knows 1"),
        (&["create", "a", "--config", &theirs], 73, "a VM for Firecracker"),
        (&["create", "a", "--config", "/missing"], 73, "No such file"),
        (&["create", "a", "--config", &later, "--cpus", "2"], 2, "cannot be used with"),
        (&["run", "--kernel", kernel, "--detach"], 2, "--name"),
        (&["run", "--kernel", kernel, "--ready", "x"], 2, "--name"),
        (&["run", "--kernel", kernel, "--name", "a", "--serial", "null"], 2, "cannot be used with"),
        (&["start", "nobody"], 90, "'tranche ls' lists"),
        (&["rm", "nobody"], 90, "no VM 'nobody'"),
        (&["attach", "nobody"], 90, "no VM 'nobody'"),
        (&["pause", "nobody"], 90, "no VM 'nobody'"),
        (&["logs", "nobody", "--since", "yesterday"], 2, "give seconds"),
        (&["wait", "nobody", "--timeout", "soon"], 2, "give seconds"),
    ] {
        home.refused(words, code, what);
    }
    assert_eq!((home.names(), home.unfinished()), (vec![], vec![]));
    home.create("a", "hello", "", &[]);
    home.refused(&["create", "a", "--kernel", kernel], 91, "there is a VM 'a' already");
    // Several are done as far as they can be.
    home.create("b", "hello", "", &[]);
    home.refused(&["rm", "a", "nobody", "b"], 90, "no VM 'nobody'");
    assert_eq!(home.names(), [""; 0]);
}

#[test]
fn a_definition_goes_from_one_vm_to_another() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &["--ready", "end", "--net", "user,mac=02:00:00:00:00:01"]);
    let file = home.path("vm.json");
    fs::write(&file, home.done(&["inspect", "--definition", "a"])).unwrap();
    home.done(&["create", "b", "--config", "vm.json"]);
    assert_eq!(home.inspect("a")["definition"], home.inspect("b")["definition"]);
    // Paths in a file begin at its directory.
    fs::copy(guests().join("hello"), home.path("kernel.elf")).unwrap();
    fs::write(&file, r#"{"version":1,"vm":{"kernel":"./kernel.elf","memory":"32M"}}"#).unwrap();
    let file = file.to_str().unwrap().to_owned();
    let mut elsewhere = home.command(&["run", "--config", &file]);
    let ended = Running::start(elsewhere.current_dir("/")).wait(LIMIT).expect_code(0);
    assert!(ended.output.contains("memory="), "{}", ended.output);
}

#[test]
fn one_start_of_two_wins() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &[]);
    for _ in 0..5 {
        let starts: Vec<_> = (0..3).map(|_| Running::start(&mut home.command(&["start", "a"]))).collect();
        let mut codes: Vec<_> = starts.into_iter().map(|start| start.wait(LIMIT).status.code().unwrap()).collect();
        codes.sort_unstable();
        assert_eq!(codes, [0, 92, 92]);
        assert_eq!(home.state("a"), "running");
        home.done(&["kill", "a"]);
    }
}

#[test]
fn how_it_ended_is_remembered() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &[]);
    home.done(&["start", "a"]);
    kill_process(Pid::from_raw(home.pid("a")).unwrap(), Signal::KILL).unwrap();
    home.done(&["wait", "a", "--timeout", "10"]);
    let dead = home.inspect("a");
    assert_eq!((&dead["state"], &dead["why"]), (&"dead".into(), &"its process was killed".into()));
    assert!(home.done(&["ls"]).contains("dead (its process was killed)"));
    // What it has left is in nobody's way.
    home.done(&["start", "a"]);
    home.done(&["kill", "a"]);
    assert_eq!(home.run(&["wait", "a"]).status.code(), Some(5));

    home.create("panics", "hello", "end=panic", &[]);
    home.done(&["start", "panics"]);
    assert_eq!(home.run(&["wait", "panics"]).status.code(), Some(4));
    assert_eq!(home.inspect("panics")["why"], "the guest's kernel panicked");

    // One that cannot start says why, at once and later.
    fs::copy(guests().join("hello"), home.path("kernel")).unwrap();
    home.done(&["create", "broken", "--kernel", "./kernel"]);
    fs::write(home.path("kernel"), "no kernel").unwrap();
    let said = home.refused(&["start", "broken"], 21, "give a bzImage");
    assert!(said.lines().count() <= 3, "{said}");
    let why = home.inspect("broken")["why"].as_str().unwrap().to_owned();
    assert!(said.contains("is not a kernel") && why.contains("is not a kernel"), "{said}{why}");
    assert_eq!(home.state("broken"), "failed");
    fs::remove_dir_all(home.vm_dir("broken")).unwrap();

    // A definition that somebody has spoilt is named, and hides no other.
    fs::write(home.vm_dir("a").join("vm.json"), "{").unwrap();
    let ended = home.run(&["ls"]).expect_code(94);
    assert!(ended.output.contains("panics") && ended.errors.contains("a/vm.json cannot be used"), "{}", ended.errors);
    home.refused(&["start", "a"], 94, "vm.json cannot be used");
    home.done(&["rm", "a"]);
}

#[test]
fn run_keeps_what_has_a_name_and_nothing_else() {
    let home = Home::new();
    let kernel = guests().join("hello");
    let kernel = kernel.to_str().unwrap();
    home.done(&["run", "--kernel", kernel, "--memory", "32M"]);
    assert!(!home.path("state").exists() && !home.path("run").exists());
    let output = home.done(&["run", "--name", "a", "--kernel", kernel, "--memory", "32M"]);
    assert!(output.contains("\nend\n") || home.done(&["logs", "a"]).contains("\nend\n"), "{output}");
    assert_eq!(home.names(), ["a"]);
    home.refused(&["run", "--name", "a", "--kernel", kernel], 91, "there is a VM 'a' already");
    assert_eq!(home.done(&["run", "--name", "b", "-d", "--kernel", kernel, "--cmdline", "end=halt"]), "b\n");
    assert_eq!(home.state("b"), "running");
    // What could not be started is not kept: whoever mends the command gives it again.
    fs::write(home.path("junk"), "no kernel").unwrap();
    home.refused(&["run", "--name", "c", "--kernel", "./junk"], 21, "bzImage");
    assert_eq!(home.names(), ["a", "b"]);
}

#[test]
fn a_guest_that_does_not_heed_its_power_button_is_told() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &[]);
    home.done(&["start", "a"]);
    home.refused(&["stop", "a", "--timeout", "0.1"], 96, "has not stopped within 0.1 s");
    assert_eq!(home.state("a"), "running");
    home.refused(&["wait", "a", "--timeout", "0.1"], 96, "has not stopped");
    let pid = home.pid("a");
    home.done(&["restart", "a", "--timeout", "0.1", "--kill"]);
    assert!(home.state("a") == "running" && home.pid("a") != pid);
    // A process that hangs is no way around it.
    kill_process(Pid::from_raw(home.pid("a")).unwrap(), Signal::STOP).unwrap();
    home.done(&["kill", "a"]);
    assert_eq!(home.state("a"), "dead");
}

#[test]
fn events_are_heard_by_name() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &[]);
    home.done(&["start", "a"]);
    let events = Running::start(&mut home.command(&["events", "a"]));
    events.output.wait_for(r#""to":"running""#, LIMIT);
    home.done(&["pause", "a"]);
    events.output.wait_for(r#""from":"running","to":"paused""#, LIMIT);
    home.done(&["kill", "a"]);
    assert!(events.wait(LIMIT).output.contains(r#""event":"state""#));

    // Of all VMs, also of those to come.
    let events = Running::start(&mut home.command(&["events"]));
    events.output.wait_for(r#""from":null,"time":"#, LIMIT);
    home.create("b", "hello", "end=halt", &[]);
    home.done(&["start", "b"]);
    events.output.wait_for(r#""to":"running","vm":"b""#, LIMIT);
    home.done(&["rm", "--force", "b"]);
    events.output.wait_for(r#""to":"removed","vm":"b""#, LIMIT);
}

#[test]
fn a_boot_is_waited_for() {
    let home = Home::new();
    home.create("a", "hello", "end=halt", &["--ready", "memory=100000+"]);
    let waiting = Running::start(&mut home.command(&["wait", "a", "--for", "boot", "--timeout", "60"]));
    std::thread::sleep(Duration::from_millis(50));
    home.done(&["start", "a"]);
    waiting.wait(LIMIT).expect_code(0);
    home.done(&["kill", "a"]);
    // What a start before has said does not count.
    home.create("b", "hello", "end=halt", &["--ready", "never"]);
    home.done(&["start", "b"]);
    home.refused(&["wait", "b", "--for", "boot", "--timeout", "0.3"], 96, "has not booted within 0.3 s");
    let waiting = Running::start(&mut home.command(&["wait", "b", "--for", "boot"]));
    std::thread::sleep(Duration::from_millis(100));
    home.done(&["kill", "b"]);
    let ended = waiting.wait(LIMIT).expect_code(93);
    assert!(ended.errors.contains("ended from outside"), "{}", ended.errors);
}

#[test]
fn forwarded_ports_are_its_address() {
    let home = Home::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    home.create("a", "hello", "end=halt", &["--net", &format!("user,forward=tcp:{port}:80")]);
    let started = home.run(&["start", "a"]);
    if started.status.code() == Some(43) {
        return not_tested(&format!("user networks of named VMs: {}", started.errors));
    }
    started.expect_code(0);
    let listed: Value = serde_json::from_str(&home.done(&["ls", "--format", "json"])).unwrap();
    assert_eq!(listed[0]["addresses"][0], format!("127.0.0.1:{port}->80/tcp"));
    let mac = home.inspect("a")["definition"]["vm"]["nics"][0]["mac"].clone();
    home.done(&["restart", "a", "--timeout", "0", "--kill"]);
    assert_eq!(home.inspect("a")["running"]["vm"]["nics"][0]["mac"], mac, "its card stays the same");
}

#[test]
fn its_jail_is_seen_from_outside_and_its_level_is_kept() {
    let home = Home::new();
    home.create("strict", "hello", "end=halt", &[]);
    home.create("off", "hello", "end=halt", &["--jail", "off"]);
    for name in ["strict", "off"] {
        home.done(&["start", name]);
    }
    let jail = &home.inspect("strict")["jail"];
    let namespaces: Vec<_> = jail["namespaces"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(namespaces.contains(&"user") && namespaces.contains(&"pid"), "{jail}");
    assert_eq!(jail["capabilities"], "0000000000000000 0000000000000000", "{jail}");
    assert!(jail["no-new-privileges"] == true && jail["dumpable"] == false, "{jail}");
    // The thread that has just begun, too: each is filtered before the guest runs.
    assert!(jail["threads"].as_u64().unwrap() > 2 && jail["threads"] == jail["filtered-threads"], "{jail}");
    let jail = &home.inspect("off")["jail"];
    assert!(jail["namespaces"].as_array().unwrap().is_empty() && jail["filtered-threads"] == 0, "{jail}");
    home.done(&["kill", "strict", "off"]);
    assert!(home.inspect("strict")["jail"].is_null());
    assert_eq!(home.inspect("off")["definition"]["jail"], "off");
}
