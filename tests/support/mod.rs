//! Runs the program under test, with a time limit on everything.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod nobody;
pub mod worker;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

pub fn tranche() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tranche"))
}

/// What a stream has said so far.
#[derive(Clone, Default)]
pub struct Transcript(Arc<(Mutex<Said>, Condvar)>);

#[derive(Default)]
struct Said {
    text: Vec<u8>,
    /// It will close, and has not yet.
    open: bool,
}

impl Transcript {
    /// Of a stream that may outlive the program, as a terminal does.
    pub fn of(stream: impl Read + Send + 'static) -> Self {
        Self::default().listen_to(stream)
    }

    /// Of a pipe, which the program closes when it ends.
    fn of_pipe(pipe: impl Read + Send + 'static) -> Self {
        let transcript = Self::default();
        transcript.0.0.lock().unwrap().open = true;
        transcript.listen_to(pipe)
    }

    fn listen_to(self, mut stream: impl Read + Send + 'static) -> Self {
        let writer = self.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            let (said, changed) = &*writer.0;
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                said.lock().unwrap().text.extend_from_slice(&chunk[..count]);
                changed.notify_all();
            }
            said.lock().unwrap().open = false;
            changed.notify_all();
        });
        self
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().text).replace('\r', "")
    }

    /// Waits until `what` has been said.
    pub fn wait_for(&self, what: &str, limit: Duration) {
        let said = |said: &Said| String::from_utf8_lossy(&said.text).contains(what);
        assert!(self.wait_until(said, limit), "no '{what}' within {limit:?}; so far:\n{}", self.text());
    }

    /// Waits until nothing more can come.
    fn wait_for_the_end(&self, limit: Duration) {
        assert!(self.wait_until(|said| !said.open, limit), "still open after {limit:?}; so far:\n{}", self.text());
    }

    fn wait_until(&self, done: impl Fn(&Said) -> bool, limit: Duration) -> bool {
        let (said, changed) = &*self.0;
        let wait = changed.wait_timeout_while(said.lock().unwrap(), limit, |said| !done(said));
        !wait.unwrap().1.timed_out()
    }
}

/// A running program under test; killed when the test gives up on it.
pub struct Running {
    pub child: Child,
    pub output: Transcript,
    pub errors: Transcript,
    pub input: Option<std::process::ChildStdin>,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub output: String,
    pub errors: String,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Starts it with the streams that `command` names; what is piped is listened to.
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("the program under test starts");
        let output = child.stdout.take().map(Transcript::of_pipe).unwrap_or_default();
        let errors = child.stderr.take().map(Transcript::of_pipe).unwrap_or_default();
        let input = child.stdin.take();
        Self { child, output, errors, input }
    }

    /// The process in which the guest runs: a child of the program's, once it is jailed.
    pub fn vmm(&self) -> u32 {
        let pid = self.child.id();
        let program = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
            let children = tasks.flat_map(|task| {
                let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<u32>>()
            });
            if let Some(vmm) = children.into_iter().find(|&child| program(child) == program(pid)) {
                return vmm;
            }
            assert!(Instant::now() < deadline, "the program has no VMM");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn send(&mut self, text: &str) {
        self.input.as_mut().expect("input is open").write_all(text.as_bytes()).unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn wait(mut self, limit: Duration) -> Ended {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "not ended within {limit:?}; output:\n{}\nerrors:\n{}",
                self.output.text(),
                self.errors.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        // On a busy machine what it said last is read some time after its end.
        self.output.wait_for_the_end(limit);
        self.errors.wait_for_the_end(limit);
        Ended { status, output: self.output.text(), errors: self.errors.text() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "output:\n{}\nerrors:\n{}", self.output, self.errors);
        self
    }
}

/// The bare-metal guests of `resources/guest`, built once.
pub fn guests() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/guest/build");
        let built = Command::new(build).arg(&dir).output().unwrap();
        assert!(built.status.success(), "the guests do not build:\n{}", String::from_utf8_lossy(&built.stderr));
        dir
    })
}

/// Says, past the test harness's capture, that this machine leaves something untested.
pub fn not_tested(what: &str) {
    let _ = std::io::stderr().write_all(format!("\n*** NOT TESTED: {what}\n").as_bytes());
}

/// A program among what `tests/clients/prepare` has prepared.
pub fn prepared_client(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/clients").join(name);
    path.exists().then_some(path)
}

/// A file with `content`, filled with zeroes up to a multiple of 512 bytes.
pub fn disk_with(dir: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.join(name);
    let mut file = File::create(&path).unwrap();
    file.write_all(content).unwrap();
    file.set_len((content.len() as u64).next_multiple_of(512)).unwrap();
    path
}
