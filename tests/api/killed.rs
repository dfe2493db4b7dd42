//! A VMM that is killed at any moment of any request leaves nothing behind that is in the way of the next.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::tempdir;
use tranche::api::client::Client;

use crate::support::{Running, disk_with, guests, not_tested, tranche};
use crate::vm::{LIMIT, Vm, drive, firecracker, vmm};

/// A session with a VM, request by request. What is saved goes to `dir`.
fn session(dir: &Path, tap: Option<&str>) -> Vec<(&'static str, &'static str, String)> {
    let file = |name: &str| dir.join(name);
    let kernel = json!({ "kernel_image_path": guests().join("hello"), "boot_args": "end=echo" });
    let files = json!({ "snapshot_path": file("state"), "mem_file_path": file("memory") });
    let nic = tap.map(|tap| {
        let card = json!({ "iface_id": "net0", "host_dev_name": tap }).to_string();
        ("PUT", "/network-interfaces/net0", card)
    });
    let begin = [
        ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":128}"#.to_owned()),
        ("PUT", "/drives/data", drive("data", false, &file("disk"))),
        ("PUT", "/boot-source", kernel.to_string()),
    ];
    let rest = [
        ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#.to_owned()),
        ("PATCH", "/drives/data", json!({ "drive_id": "data", "path_on_host": file("other") }).to_string()),
        ("PUT", "/v2/vm/snapshot", json!({ "path": file("snap") }).to_string()),
        ("PATCH", "/vm", r#"{"state":"Paused"}"#.to_owned()),
        ("PUT", "/snapshot/create", files.to_string()),
        ("PATCH", "/vm", r#"{"state":"Resumed"}"#.to_owned()),
        ("PUT", "/v2/vm/power", r#"{"power":"reset"}"#.to_owned()),
        ("GET", "/v2/vm", String::new()),
        ("PUT", "/v2/vm/power", r#"{"power":"off"}"#.to_owned()),
        ("PUT", "/v2/vm/power", r#"{"power":"kill"}"#.to_owned()),
    ];
    begin.into_iter().chain(nic).chain(rest).collect()
}

fn ask(socket: &Path, (method, path, body): &(&str, &str, String)) -> Option<u16> {
    let body = Some(body.as_bytes()).filter(|body| !body.is_empty());
    Client::connect(socket).and_then(|mut client| client.request(method, path, body)).ok().map(|answer| answer.status)
}

/// `TRANCHE_KILL_ROUNDS` (3) moments for each request, the later ones later.
#[test]
fn at_any_moment_of_any_request() {
    let rounds = std::env::var("TRANCHE_KILL_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    let files = tempdir().unwrap();
    let tap = rustix::process::geteuid().is_root().then(|| Tap::new("tranche-k0"));
    if tap.is_none() {
        not_tested("a VMM with a tap that is killed: only root can make one");
    }
    for name in ["disk", "other"] {
        disk_with(files.path(), name, &[7; 1 << 20]);
    }
    let session = session(files.path(), tap.as_ref().map(|tap| tap.0));
    let names = || {
        let names = std::fs::read_dir(files.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect::<Vec<_>>()
    };
    let socket_dir = tempdir().unwrap();
    let socket = socket_dir.path().join("api.sock");
    let start = || {
        let running = Running::start(vmm().arg("--api-sock").arg(&socket));
        let deadline = Instant::now() + LIMIT;
        while ask(&socket, &("GET", "/", String::new())).is_none() {
            assert!(Instant::now() < deadline, "no API; errors:\n{}", running.errors.text());
            std::thread::sleep(Duration::from_millis(1));
        }
        running
    };
    for (last, target) in session.iter().enumerate() {
        for round in 0..rounds {
            let moment = Duration::from_micros(4000) * round / rounds;
            let what = format!("{} {} after {moment:?}", target.0, target.1);
            // That there is a socket already, which nobody listens on, is in nobody's way.
            let running = start();
            for step in &session[..last] {
                let status = ask(&socket, step);
                assert!(matches!(status, Some(200 | 204)), "{what}: {} {}: {status:?}", step.0, step.1);
            }
            let (begun, path, step) = (Instant::now(), socket.clone(), target.clone());
            let asked = std::thread::spawn(move || ask(&path, &step));
            while begun.elapsed() < moment {
                std::thread::yield_now();
            }
            running.signal(Signal::KILL);
            let _ = asked.join().unwrap();
            let ended = running.wait(LIMIT);
            // The last request may have been in time.
            let said = ended.errors.as_str();
            let (code, quiet) = (ended.status.code(), matches!(said, "" | "tranche: the VM was ended from outside\n"));
            assert!(code == Some(5) || code.is_none() && quiet, "{what}: {ended:?}");
            // Disks, taps and names are free again, and what is saved is whole or not there.
            for name in names() {
                match name.as_str() {
                    "snap" => {
                        let mut verify = tranche();
                        verify.args(["snapshot", "verify"]).arg(files.path().join("snap"));
                        Running::start(&mut verify).wait(LIMIT).expect_code(0);
                        std::fs::remove_dir_all(files.path().join("snap")).unwrap();
                    }
                    "disk" | "other" | "state" | "memory" => {}
                    partial => assert!(partial.starts_with('.') && partial.ends_with(".partial"), "{what}: {partial}"),
                }
            }
        }
    }
    // All of it once more, to its end.
    let running = start();
    for step in &session {
        let status = ask(&socket, step);
        assert!(matches!(status, Some(200 | 204)), "{} {}: {status:?}", step.0, step.1);
    }
    running.wait(LIMIT).expect_code(5);
    let mut left = names();
    left.sort();
    assert_eq!(left, ["disk", "memory", "other", "snap", "state"]);
}

#[test]
fn under_firecrackers_name_what_is_left_of_a_killed_one_is_an_error() {
    let vm = Vm::start(firecracker());
    vm.running.signal(Signal::KILL);
    let Vm { running, socket, dir } = vm;
    drop(running.wait(LIMIT));
    let ended = Running::start(firecracker().arg("--api-sock").arg(&socket)).wait(LIMIT).expect_code(1);
    assert!(ended.errors.contains("api.sock") || ended.output.contains("api.sock"), "{ended:?}");
    drop(dir);
}

struct Tap(&'static str);

impl Tap {
    fn new(name: &'static str) -> Self {
        let made = Command::new("ip").args(["tuntap", "add", name, "mode", "tap"]).status();
        assert!(made.unwrap().success());
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", self.0]).status();
    }
}
