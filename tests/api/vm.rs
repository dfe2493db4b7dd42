//! A VM under test and its API.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tranche::api::client::{Answer, Client};

use crate::support::{Ended, Running, guests, tranche};

/// Generous: an answer takes milliseconds, a busy machine seconds.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Vm {
    pub running: Running,
    pub socket: PathBuf,
    pub dir: TempDir,
}

/// The program under the name `firecracker`, with no messages between what its guest says.
pub fn firecracker() -> Command {
    let mut command = logging_firecracker();
    command.args(["--level", "Off"]);
    command
}

/// The program under the name `firecracker`, which logs to standard output if no argument says otherwise.
pub fn logging_firecracker() -> Command {
    let mut command = tranche();
    command.arg0("firecracker");
    command
}

/// `tranche vmm`
pub fn vmm() -> Command {
    let mut command = tranche();
    command.arg("vmm");
    command
}

impl Vm {
    /// Starts the program with a socket of its own, and waits until it answers.
    pub fn start(command: Command) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), command)
    }

    pub fn start_in(dir: TempDir, mut command: Command) -> Self {
        let socket = dir.path().join("api.sock");
        let running = Running::start(command.arg("--api-sock").arg(&socket));
        let deadline = Instant::now() + LIMIT;
        while Client::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "no API; errors:\n{}", running.errors.text());
            std::thread::sleep(Duration::from_millis(2));
        }
        Self { running, socket, dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        let mut client = Client::connect(&self.socket).unwrap();
        client.request(method, path, body.map(str::as_bytes)).unwrap_or_else(|error| {
            // It has ended, and says why in a moment.
            std::thread::sleep(Duration::from_millis(100));
            panic!("{method} {path}: {error:?}; errors:\n{}", self.running.errors.text())
        })
    }

    /// What a GET shows.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let answer = self.ask("GET", path, None);
        assert_eq!(answer.status, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// A change that is done.
    #[track_caller]
    pub fn change(&self, method: &str, path: &str, body: &str) {
        let answer = self.ask(method, path, Some(body).filter(|body| !body.is_empty()));
        assert_eq!(answer.status, 204, "{method} {path}: {}", String::from_utf8_lossy(&answer.body));
        assert!(answer.body.is_empty() && answer.content_type.is_none());
    }

    #[track_caller]
    pub fn put(&self, path: &str, body: &str) {
        self.change("PUT", path, body);
    }

    #[track_caller]
    pub fn patch(&self, path: &str, body: &str) {
        self.change("PATCH", path, body);
    }

    /// The message of a request that is refused as Firecracker refuses.
    #[track_caller]
    pub fn fault(&self, method: &str, path: &str, body: &str) -> String {
        let answer = self.ask(method, path, Some(body).filter(|body| !body.is_empty()));
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!((answer.status, answer.content_type.as_deref()), (400, Some("application/json")), "{path}: {text}");
        let fault: Value = serde_json::from_str(&text).unwrap();
        fault["fault_message"].as_str().expect(&text).to_owned()
    }

    #[track_caller]
    pub fn expect_fault(&self, method: &str, path: &str, body: &str, what: &str) {
        let fault = self.fault(method, path, body);
        assert!(fault.contains(what), "no '{what}' in: {fault}");
    }

    pub fn put_kernel(&self, guest: &str, args: &str) {
        let kernel = guests().join(guest);
        self.put("/boot-source", &format!(r#"{{"kernel_image_path":{kernel:?},"boot_args":{args:?}}}"#));
    }

    pub fn act(&self, action: &str) {
        self.put("/actions", &format!(r#"{{"action_type":"{action}"}}"#));
    }

    /// Starts `hello`, and waits for its last word.
    pub fn boot_hello(&self, args: &str) {
        self.put_kernel("hello", args);
        self.act("InstanceStart");
        self.running.output.wait_for("\nend\n", LIMIT);
    }

    /// Ends the VM through the API.
    pub fn kill(self) -> Ended {
        self.put("/v2/vm/power", r#"{"power":"kill"}"#);
        self.running.wait(LIMIT)
    }
}

/// A drive's body.
pub fn drive(id: &str, root: bool, path: &Path) -> String {
    format!(r#"{{"drive_id":"{id}","is_root_device":{root},"path_on_host":{path:?}}}"#)
}

pub const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
pub const AFTER: &str = "The requested operation is not supported after starting the microVM.";
