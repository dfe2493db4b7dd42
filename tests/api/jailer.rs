//! What the program is when it is called `jailer`.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tranche::api::client::Client;

use crate::support::{Running, guests, not_tested};
use crate::vm::LIMIT;

const USER: u32 = 12345;

/// A directory for jails, and the program under a name that a jailer takes.
struct Scene {
    dir: TempDir,
    program: PathBuf,
}

impl Scene {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            not_tested("the jailer, which takes root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("firecracker");
        std::fs::copy(env!("CARGO_BIN_EXE_tranche"), &program).unwrap();
        Some(Self { dir, program })
    }

    fn jailer(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tranche"));
        command.arg0("jailer").arg("--exec-file").arg(&self.program).arg("--chroot-base-dir").arg(self.base());
        let user = USER.to_string();
        command.args(["--uid", &user, "--gid", &user]).args(args);
        command
    }

    fn root(&self, id: &str) -> PathBuf {
        self.base().join("firecracker").join(id).join("root")
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("jails")
    }
}

fn ask(socket: &Path, method: &str, path: &str, body: &str) -> u16 {
    let deadline = Instant::now() + LIMIT;
    let mut client = loop {
        match Client::connect(socket) {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let body = Some(body.as_bytes()).filter(|body| !body.is_empty());
    client.request(method, path, body).unwrap().status
}

#[test]
fn a_vm_runs_and_is_saved_in_a_root_directory_of_its_own() {
    let Some(scene) = Scene::new() else { return };
    let running = Running::start(&mut scene.jailer(&["--id", "a-1", "--", "--api-sock", "/api.sock"]));
    let root = scene.root("a-1");
    let socket = root.join("api.sock");
    assert_eq!(ask(&socket, "GET", "/", ""), 200, "{}", running.errors.text());
    std::fs::copy(guests().join("hello"), root.join("hello")).unwrap();
    let boot = r#"{"kernel_image_path":"/hello","boot_args":"end=echo"}"#;
    assert_eq!(ask(&socket, "PUT", "/boot-source", boot), 204, "{}", running.output.text());
    assert_eq!(ask(&socket, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#), 204, "{}", running.output.text());
    running.output.wait_for("\nend\n", LIMIT);

    // Whoever watches it finds it by its file.
    let pid = running.child.id();
    assert_eq!(std::fs::read_to_string(root.join("firecracker.pid")).unwrap(), pid.to_string());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}\n")), "{status}");
    assert_eq!(std::fs::metadata(root.join("dev/kvm")).unwrap().uid(), USER);
    // It has changed its root directory, and its command line tells when it was started.
    assert_ne!(std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok(), std::fs::read_link("/proc/self/ns/mnt").ok());
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command.starts_with("/firecracker\0--id\0a-1\0--start-time-us\0"), "{command:?}");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(limits.lines().any(|line| line.starts_with("Max open files") && line.contains(" 2048 ")), "{limits}");
    assert!(std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap().is_empty());

    assert_eq!(ask(&socket, "PATCH", "/vm", r#"{"state":"Paused"}"#), 204);
    let save = r#"{"snapshot_path":"/state","mem_file_path":"/memory"}"#;
    assert_eq!(ask(&socket, "PUT", "/snapshot/create", save), 204, "{}", running.output.text());
    assert!(root.join("memory").exists() && root.join("state").exists());
    running.signal(Signal::KILL);
    running.wait(LIMIT);
}

#[test]
fn one_in_a_pid_namespace_is_found_by_its_file_and_a_second_one_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let args = [
        "--id",
        "b",
        "--new-pid-ns",
        "--daemonize",
        "--resource-limit",
        "no-file=100",
        "--",
        "--api-sock",
        "/api.sock",
    ];
    Running::start(&mut scene.jailer(&args)).wait(LIMIT).expect_code(0);
    let root = scene.root("b");
    assert_eq!(ask(&root.join("api.sock"), "GET", "/", ""), 200);
    let pid: i32 = std::fs::read_to_string(root.join("firecracker.pid")).unwrap().parse().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains(&format!("NSpid:\t{pid}\t1\n")), "{status}");
    let ended = Running::start(&mut scene.jailer(&args)).wait(LIMIT).expect_code(1);
    assert!(ended.errors.contains("Jailer error: Failed to make") && ended.errors.contains("File exists"), "{ended:?}");
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn it_is_in_cgroups_of_its_own() {
    let Some(scene) = Scene::new() else { return };
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let has_pids = |line: &str| line.contains(" cgroup ") && line.contains("pids");
    let first = mounts.lines().find(|line| has_pids(line)).and_then(|line| line.split(' ').nth(1));
    let second = "/sys/fs/cgroup";
    let has_second =
        std::fs::read_to_string(format!("{second}/cgroup.controllers")).is_ok_and(|on| on.contains("pids"));
    let (mount, version) = match first {
        Some(mount) => (mount, "1"),
        None if has_second => (second, "2"),
        None => return not_tested("the jailer's cgroups: this host has no pids controller"),
    };
    let parent = format!("tranche-test-{}", std::process::id());
    let args = ["--id", "g", "--cgroup", "pids.max=100", "--cgroup-version", version, "--parent-cgroup", &parent];
    let running = Running::start(scene.jailer(&args).args(["--", "--api-sock", "/api.sock"]));
    assert_eq!(ask(&scene.root("g").join("api.sock"), "GET", "/", ""), 200, "{}", running.errors.text());
    let dir = Path::new(mount).join(&parent).join("g");
    assert_eq!(std::fs::read_to_string(dir.join("pids.max")).unwrap(), "100\n");
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", running.child.id())).unwrap();
    assert!(
        groups.lines().any(|line| (line.contains("pids") || version == "2") && line.ends_with(&format!("/{parent}/g"))),
        "{groups}"
    );
    running.signal(Signal::KILL);
    running.wait(LIMIT);
    std::fs::remove_dir(&dir).unwrap();
    std::fs::remove_dir(dir.parent().unwrap()).unwrap();
}

/// In a group of version 1 that is new there is no CPU, and no memory.
#[test]
fn a_cpuset_has_the_rest_of_what_is_above_it() {
    let Some(scene) = Scene::new() else { return };
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let has_cpusets = |line: &&str| line.contains(" cgroup ") && line.contains("cpuset");
    let Some(mount) = mounts.lines().find(has_cpusets).and_then(|line| line.split(' ').nth(1)) else {
        return not_tested("the jailer's cpusets: this host has none of version 1");
    };
    let parent = format!("tranche-test-{}", std::process::id());
    let args = ["--id", "c", "--cgroup", "cpuset.cpus=0", "--parent-cgroup", &parent];
    let running = Running::start(scene.jailer(&args).args(["--", "--api-sock", "/api.sock"]));
    assert_eq!(ask(&scene.root("c").join("api.sock"), "GET", "/", ""), 200, "{}", running.errors.text());
    let dir = Path::new(mount).join(&parent).join("c");
    assert_eq!(std::fs::read_to_string(dir.join("cpuset.cpus")).unwrap(), "0\n");
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.child.id())).unwrap();
    assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
    running.signal(Signal::KILL);
    running.wait(LIMIT);
    std::fs::remove_dir(&dir).unwrap();
    std::fs::remove_dir(dir.parent().unwrap()).unwrap();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let refused = |command: &mut Command, what: &str| {
        let ended = Running::start(command).wait(LIMIT).expect_code(1);
        assert!(ended.errors.contains(what), "no '{what}' in {ended:?}");
    };
    refused(&mut scene.jailer(&["--id", "a_b"]), "letters");
    refused(&mut scene.jailer(&["--id", "c", "--resource-limit", "cpu=1"]), "fsize and no-file");
    refused(&mut scene.jailer(&["--id", "c", "--parent-cgroup", "../x"]), "relative path");
    refused(&mut scene.jailer(&["--id", "c", "--cgroup", "/etc/passwd=1"]), "cpu.shares");
    refused(&mut scene.jailer(&["--id", "c", "--cgroup", "nonsense.file=1"]), "no cgroup hierarchy");
    refused(&mut scene.jailer(&["--id", "d", "--netns", "/nowhere"]), "network namespace /nowhere");
    let link = scene.dir.path().join("firecracker-link");
    std::os::unix::fs::symlink(&scene.program, &link).unwrap();
    let linked = Scene { dir: tempfile::tempdir().unwrap(), program: link };
    refused(&mut linked.jailer(&["--id", "c"]), "it is a symbolic link");
    assert!(!linked.base().exists(), "nothing was made");
    let version = Running::start(Command::new(env!("CARGO_BIN_EXE_tranche")).arg0("jailer").arg("--version"));
    assert!(version.wait(LIMIT).expect_code(0).output.starts_with("Jailer v1."));
}
