//! The whole way from a client's socket to an owner who is at work, and back.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Api;
use crate::api::client::{Answer, Client};
use crate::api::server::{Clients, Limits, Server, ServerHandle};
use crate::backend::host::Peer;
use crate::backend::{HostFile, HostFiles, OpenDirectly};
use crate::config::{SerialConfig, Transport};
use crate::control::{Calls, Identity, Owner, calls};
use crate::observe::Timeline;

/// A host whose /dev/kvm opens when it is let go of, and is not there then.
struct SlowHost(PipeReader);

impl HostFiles for SlowHost {
    fn open(&self, file: &HostFile) -> io::Result<File> {
        if *file == HostFile::Kvm {
            let _ = (&self.0).read(&mut [0]);
            return Err(io::ErrorKind::NotFound.into());
        }
        OpenDirectly.open(file)
    }

    fn connect(&self, path: &Path) -> io::Result<Peer> {
        OpenDirectly.connect(path)
    }

    fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        OpenDirectly.listen(path)
    }
}

struct Vm {
    dir: tempfile::TempDir,
    /// Dropped, it lets go of /dev/kvm.
    hold: Option<PipeWriter>,
    server: Option<ServerHandle>,
    end: Arc<AtomicBool>,
    owner: Option<JoinHandle<()>>,
}

impl Vm {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (reader, hold) = io::pipe().unwrap();
        let host: Arc<dyn HostFiles> = Arc::new(SlowHost(reader));
        let timeline = Arc::new(Timeline::from(Instant::now()));
        let mut owner = Owner::new(Identity::tranche(Transport::Pci), host, SerialConfig::Null, timeline);
        owner.begin_to_serve();
        let (sender, calls) = calls(owner.view()).unwrap();
        let listener = UnixListener::bind(dir.path().join("api")).unwrap();
        let server = Server::spawn(Clients::Listener(listener), "api", Limits::default(), Api::new(sender)).unwrap();
        let end = Arc::<AtomicBool>::default();
        let ended = end.clone();
        let owner = std::thread::spawn(move || serve(owner, &calls, &ended));
        let vm = Self { dir, hold: Some(hold), server: Some(server), end, owner: Some(owner) };
        std::fs::write(vm.kernel(), "no kernel").unwrap();
        vm
    }

    fn kernel(&self) -> PathBuf {
        self.dir.path().join("kernel")
    }

    fn client(&self) -> Client {
        Client::connect(&self.dir.path().join("api")).unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.hold = None;
        self.end.store(true, Ordering::Release);
        if let Some(server) = self.server.take() {
            server.stop();
        }
        let _ = self.owner.take().map(JoinHandle::join);
    }
}

/// Takes calls until it is to end.
fn serve(mut owner: Owner, calls: &Calls, end: &AtomicBool) {
    while !end.load(Ordering::Acquire) {
        while let Some(message) = calls.next() {
            owner.handle(message);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn json(answer: &Answer) -> serde_json::Value {
    serde_json::from_slice(&answer.body).unwrap()
}

#[test]
fn others_are_answered_while_a_vm_starts() {
    let mut vm = Vm::start();
    let body = serde_json::json!({ "kernel_image_path": vm.kernel() }).to_string();
    assert_eq!(vm.client().request("PUT", "/boot-source", Some(body.as_bytes())).unwrap().status, 204);
    let mut starter = vm.client();
    let start =
        std::thread::spawn(move || starter.request("PUT", "/actions", Some(br#"{"action_type":"InstanceStart"}"#)));
    let mut other = vm.client();
    let begun = Instant::now();
    while json(&other.request("GET", "/v2/vm", None).unwrap())["state"] != "starting" {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(json(&other.request("GET", "/", None).unwrap())["state"], "Not started");
    assert_eq!(
        json(&other.request("GET", "/vm/config", None).unwrap())["boot-source"]["initrd_path"],
        serde_json::Value::Null
    );
    assert_eq!(json(&other.request("GET", "/machine-config", None).unwrap())["vcpu_count"], 1);
    for path in ["/version", "/v2/metrics"] {
        assert_eq!(other.request("GET", path, None).unwrap().status, 200, "{path}");
    }
    // Nobody waits below /v2.
    let busy = other.request("PUT", "/v2/vm/power", Some(br#"{"power":"on"}"#)).unwrap();
    assert_eq!(busy.status, 409);
    assert_eq!(json(&busy)["detail"], "The VM is starting: ask again when that is done.");
    assert!(!start.is_finished());

    vm.hold = None;
    let answer = start.join().unwrap().unwrap();
    assert_eq!(answer.status, 400);
    assert!(json(&answer)["fault_message"].as_str().unwrap().contains("/dev/kvm"));
    assert_eq!(json(&other.request("GET", "/v2/vm", None).unwrap())["state"], "not started");
}

/// Whoever has changed something finds it changed, by whatever connection.
#[test]
fn a_change_is_shown_before_it_is_answered() {
    let vm = Vm::start();
    let (mut one, mut other) = (vm.client(), vm.client());
    for cpus in 1..=32 {
        let body = format!(r#"{{"vcpu_count":{cpus},"mem_size_mib":64}}"#);
        assert_eq!(one.request("PUT", "/machine-config", Some(body.as_bytes())).unwrap().status, 204);
        assert_eq!(json(&other.request("GET", "/machine-config", None).unwrap())["vcpu_count"], cpus);
    }
}
