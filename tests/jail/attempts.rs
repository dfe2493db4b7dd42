//! Attempts at each level, on each kind of thread.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::support::nobody::Nobody;
use crate::support::{Running, guests, not_tested, tranche};

const LIMIT: Duration = Duration::from_secs(60);

/// What becomes of an attempt.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// The call is trapped, and ends the VMM.
    Trapped(&'static str),
    /// It fails, with an error of which this is a part.
    Fails(&'static str),
    /// It works.
    Works,
    /// It may work or not, according to the host.
    Either,
}

use Fate::{Either, Fails, Trapped, Works};

/// What is attempted upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Nothing,
    /// A disk that is not the VM's.
    OtherDisk,
    /// The VM's kernel, which it reads.
    Kernel,
    /// A disk of the VM's that it may only read.
    OwnReadOnlyDisk,
    /// A unix socket that somebody listens on.
    Socket,
    /// An abstract one.
    Abstract,
    /// A TCP port of the host.
    Port,
    /// A process of the same user.
    Process,
    /// A descriptor that whoever started the VM has left open.
    Descriptor,
}

struct Attempt {
    name: &'static str,
    victim: Victim,
    /// In a strict jail.
    strict: Fate,
    /// The same without seccomp: what is left when the filters have a hole.
    unfiltered: Fate,
    /// Without a jail, for root.
    off: Fate,
}

const fn attempt(name: &'static str, victim: Victim, strict: Fate, unfiltered: Fate, off: Fate) -> Attempt {
    Attempt { name, victim, strict, unfiltered, off }
}

const NO_FILE: Fate = Fails("No such file or directory");
const NO_PROCESS: Fate = Fails("No such process");
const NO_RIGHT: Fate = Fails("Operation not permitted");
const NOT_NAMED: Fate = Fails("the jail does not allow it");

const ATTEMPTS: &[Attempt] = &[
    attempt("open-shadow", Victim::Nothing, Trapped("openat"), NO_FILE, Works),
    attempt("open-disk", Victim::OtherDisk, Trapped("openat"), NO_FILE, Works),
    attempt("write-file", Victim::Nothing, Trapped("openat"), Fails(""), Either),
    attempt("list-processes", Victim::Nothing, Trapped("openat"), NO_FILE, Works),
    attempt("connect-socket", Victim::Socket, Trapped("socket"), NO_FILE, Works),
    attempt("connect-abstract", Victim::Abstract, Trapped("socket"), Fails("Connection refused"), Works),
    attempt("connect-internet", Victim::Port, Trapped("socket"), Fails(""), Works),
    attempt("internet-socket", Victim::Nothing, Trapped("socket"), Works, Works),
    attempt("packet-socket", Victim::Nothing, Trapped("socket"), NO_RIGHT, Works),
    attempt("ptrace", Victim::Process, Trapped("ptrace"), NO_PROCESS, Works),
    attempt("read-memory", Victim::Process, Trapped("process_vm_readv"), NO_PROCESS, Either),
    attempt("kill", Victim::Process, Trapped("kill"), NO_PROCESS, Works),
    attempt("signal-parent", Victim::Nothing, Trapped("kill"), Either, Either),
    attempt("mount", Victim::Nothing, Trapped("mount"), NO_RIGHT, Either),
    attempt("unshare", Victim::Nothing, Trapped("unshare"), NO_RIGHT, Works),
    attempt("chroot", Victim::Nothing, Trapped("chroot"), NO_RIGHT, Works),
    attempt("load-module", Victim::Nothing, Trapped("init_module"), Fails(""), Either),
    attempt("exec", Victim::Nothing, Trapped("execve"), NO_FILE, Either),
    attempt("map-code", Victim::Nothing, Trapped("mmap"), Works, Works),
    attempt("make-code", Victim::Nothing, Trapped("mprotect"), Works, Works),
    attempt("fork", Victim::Nothing, Trapped("clone"), Works, Works),
    attempt("fork-bomb", Victim::Nothing, Trapped("clone"), Fails("Resource temporarily unavailable"), Either),
    attempt("fork-by-clone3", Victim::Nothing, Trapped("clone3"), Works, Works),
    attempt("fill-memory", Victim::Nothing, Fails("Cannot allocate memory"), Fails("Cannot allocate memory"), Either),
    attempt("fill-disk", Victim::Nothing, Fails("File too large"), Fails("File too large"), Works),
    attempt("raise-limit", Victim::Nothing, Trapped("prlimit64"), NO_RIGHT, Either),
    attempt("add-key", Victim::Nothing, Trapped("add_key"), Either, Either),
    attempt("make-ring", Victim::Nothing, Trapped("io_uring_setup"), Either, Works),
    attempt("ring-open", Victim::Nothing, Fails("Permission denied"), Fails("Permission denied"), Works),
    attempt("ring-connect", Victim::Nothing, Fails("Permission denied"), Fails("Permission denied"), Either),
    attempt("bpf", Victim::Nothing, Trapped("bpf"), Fails(""), Either),
    attempt("perf", Victim::Nothing, Trapped("perf_event_open"), Either, Either),
    attempt("reboot", Victim::Nothing, Trapped("reboot"), NO_RIGHT, Either),
    attempt("handle-signals", Victim::Nothing, Trapped("rt_sigaction"), Works, Works),
    attempt("push-keys", Victim::Nothing, Trapped("ioctl(0x5412)"), Fails(""), Either),
    attempt("read-environment", Victim::Nothing, Fails(""), Fails(""), Works),
    attempt("read-inherited", Victim::Descriptor, Fails("Bad file descriptor"), Fails("Bad file descriptor"), Works),
    attempt("ask-for-shadow", Victim::Nothing, NOT_NAMED, NOT_NAMED, Either),
    attempt("ask-for-disk", Victim::OtherDisk, NOT_NAMED, NOT_NAMED, Either),
    attempt("ask-to-write", Victim::Kernel, NOT_NAMED, NOT_NAMED, Either),
    attempt("ask-to-grow", Victim::Nothing, Fails("no client has asked"), Fails("no client has asked"), Either),
    attempt("ask-for-pagemap", Victim::Nothing, Fails("Invalid argument"), Fails("Invalid argument"), Either),
    attempt("take-lease", Victim::Nothing, Trapped("fcntl"), Either, Either),
    attempt("ask-for-more", Victim::OwnReadOnlyDisk, Fails("Permission denied"), Fails("Permission denied"), Either),
];

/// Files, sockets and processes that an attacker is after.
struct Scene {
    dir: TempDir,
    _socket: UnixListener,
    _abstract: UnixListener,
    port: TcpListener,
    process: Child,
}

impl Scene {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["other", "own", "read-only"] {
            std::fs::write(dir.path().join(name), [0; 4096]).unwrap();
        }
        let socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        let name = SocketAddr::from_abstract_name(Self::name()).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let _abstract = UnixListener::bind_addr(&name).unwrap();
        Self { dir, _socket: socket, _abstract, port, process }
    }

    /// One for each test of this process, which may run at the same time.
    fn name() -> String {
        format!("tranche-test-{:?}", std::thread::current().id())
    }

    /// Lets any user at it.
    fn open_to_all(&self) {
        for name in ["other", "own", "read-only", "socket"] {
            std::fs::set_permissions(self.file(name), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        }
        std::fs::set_permissions(self.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn victim(&self, victim: Victim, kernel: &Path) -> String {
        match victim {
            Victim::Nothing => String::new(),
            Victim::OtherDisk => self.file("other"),
            Victim::Kernel => kernel.to_str().unwrap().to_owned(),
            Victim::OwnReadOnlyDisk => self.file("read-only"),
            Victim::Socket => self.file("socket"),
            Victim::Abstract => Self::name(),
            Victim::Port => self.port.local_addr().unwrap().port().to_string(),
            Victim::Process => self.process.id().to_string(),
            Victim::Descriptor => "99".into(),
        }
    }

    /// Has threads of each of these kinds attempt all that there is, with their filters.
    fn try_all(&self, run: impl Fn() -> Command, kernel: &Path, kinds: &[&str]) {
        for attempt in ATTEMPTS {
            for kind in kinds {
                self.try_it(&mut run(), kernel, kind, attempt, strict_on(kind, attempt));
            }
        }
    }

    /// Has a thread of a VM attempt something.
    fn try_it(&self, command: &mut Command, kernel: &Path, kind: &str, attempt: &Attempt, fate: Fate) {
        let disks = [self.file("own"), format!("{},ro", self.file("read-only"))];
        for disk in disks {
            command.arg("--disk").arg(disk);
        }
        command.args(["--cmdline", "end=halt", "--api-sock"]).arg(self.file("api"));
        command.env("TRANCHE_ATTACK", format!("{kind}:{}", attempt.name));
        command.env("TRANCHE_VICTIM", self.victim(attempt.victim, kernel));
        let ended =
            Running::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped())).wait(LIMIT);
        let what = format!("{kind}: {}", attempt.name);
        let told = ended.errors.lines().find_map(|line| line.strip_prefix(&format!("attack: {}: ", attempt.name)));
        // Whatever it did, to itself perhaps, it did not to its parent, which tells of it.
        assert!(ended.status.code().is_some(), "{what}: {ended:?}");
        match fate {
            Trapped(call) => {
                let expected = format!("its {kind} thread called {call}, which its jail forbids");
                assert!(ended.errors.contains(&expected), "{what}: {ended:?}");
                assert_eq!((told, ended.status.code()), (None, Some(8)), "{what}: {ended:?}");
            }
            Fails(error) => {
                let told = told.unwrap_or_else(|| panic!("{what}: {ended:?}"));
                assert!(told != "done" && told.contains(error), "{what}: {ended:?}");
            }
            Works => assert_eq!(told, Some("done"), "{what}: {ended:?}"),
            Either => {}
        }
        assert_eq!(std::fs::metadata(self.file("other")).unwrap().len(), 4096);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `tranche run` by whoever runs this test.
/// It has a secret in its environment, and is started with one more file open than it knows of.
fn run() -> Command {
    let program = tranche();
    // Others than bash have no number as high, which the VMM itself does not come to.
    let mut command = Command::new("bash");
    command.args(["-c", "exec 99< /etc/passwd; exec \"$0\" \"$@\""]).arg(program.get_program());
    command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("SECRET", "42");
    command.arg("run").arg("--kernel").arg(guests().join("hello"));
    command
}

/// The kinds of threads.
const KINDS: [&str; 4] = ["main", "vcpu", "io", "api"];

/// What comes of an attempt in a strict jail, where that is not the same on all kinds of threads.
fn strict_on(kind: &str, attempt: &Attempt) -> Fate {
    match (kind, attempt.name) {
        // With this answer, glibc falls back to a call that can be looked at.
        ("main", "fork-by-clone3") => Fails("Function not implemented"),
        // Only the owner asks its parent.
        ("vcpu" | "api" | "io", name) if name.starts_with("ask-") => Trapped("sendmsg"),
        ("vcpu" | "api", name) if name.starts_with("ring-") => Trapped("io_uring_enter"),
        ("vcpu" | "api", "fill-disk") => Trapped("ftruncate"),
        _ => attempt.strict,
    }
}

#[test]
fn on_a_vcpus_thread() {
    let (scene, kernel) = (Scene::new(), guests().join("hello"));
    scene.try_all(run, &kernel, &["vcpu"]);
}

#[test]
fn on_the_owners_thread() {
    let (scene, kernel) = (Scene::new(), guests().join("hello"));
    scene.try_all(run, &kernel, &["main"]);
}

#[test]
fn on_a_devices_thread_and_on_the_apis() {
    let (scene, kernel) = (Scene::new(), guests().join("hello"));
    scene.try_all(run, &kernel, &["io", "api"]);
}

#[test]
fn without_its_filters() {
    let (scene, kernel) = (Scene::new(), guests().join("hello"));
    for attempt in ATTEMPTS {
        scene.try_it(run().env("TRANCHE_ATTACK_UNFILTERED", "1"), &kernel, "vcpu", attempt, attempt.unfiltered);
    }
}

#[test]
fn of_an_ordinary_users_vmm() {
    if !is_root() {
        return not_tested("an ordinary user: only root can play one");
    }
    let (scene, nobody) = (Scene::new(), Nobody::new());
    scene.open_to_all();
    let kernel = nobody.kernel();
    scene.try_all(|| nobody.run(&[]), &kernel, &KINDS);
    for attempt in ATTEMPTS {
        let mut unfiltered = nobody.run(&[]);
        unfiltered.env("TRANCHE_ATTACK_UNFILTERED", "1");
        scene.try_it(&mut unfiltered, &kernel, "main", attempt, attempt.unfiltered);
    }
}

/// Where there are no namespaces, what is left of a jail refuses the same.
#[test]
fn in_a_jail_that_lacks_namespaces() {
    if !is_root() {
        return not_tested("a host without user namespaces: only root can make one");
    }
    let (scene, nobody) = (Scene::new(), Nobody::new());
    scene.open_to_all();
    scene.try_all(|| nobody.run_without_user_namespaces("compat"), &nobody.kernel(), &KINDS);
}

/// Else the table would say nothing: all of this works where there is no jail.
#[test]
fn without_a_jail() {
    if !is_root() {
        return not_tested("attempts without a jail, which take root's rights to work");
    }
    let (scene, kernel) = (Scene::new(), guests().join("hello"));
    for attempt in ATTEMPTS.iter().filter(|attempt| !matches!(attempt.off, Either)) {
        scene.try_it(run().args(["--jail", "off"]), &kernel, "vcpu", attempt, attempt.off);
    }
}
