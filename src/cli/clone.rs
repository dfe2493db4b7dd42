//! `tranche clone`: many VMs of one snapshot at once, each a process of its own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::exit::{self, Exit};
use super::run::JailArgs;
use super::signals::Signals;
use crate::api::client::Client;
use crate::backend::OpenDirectly;
use crate::backend::netns::NetNamespace;
use crate::config::{NetBackend, Override, SavedVm};
use crate::snapshot::Folder;

/// Start many VMs of one snapshot (see docs/snapshots.md)
///
/// They share what of memory and disks they do not write. Each has an API socket and a console in a directory; a line on
/// standard output tells its number, its process and that socket once it goes on. If one cannot start, none does.
#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub struct CloneArgs {
    /// The snapshot's directory
    dir: PathBuf,

    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    number: u32,

    /// Where N.sock (API), N.console (serial port) and N.log go, N from 1 on; by default a new directory in
    /// $XDG_RUNTIME_DIR or /tmp, which is gone with the clones
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,

    /// Another file or network than the saved one, '{}' being the clone's number; may be repeated
    #[arg(long = "override", value_name = "disk.NAME=PATH|net.NAME=TAP", value_parser = an_override)]
    overrides: Vec<String>,

    /// A directory for what they write to the snapshot's disks, in N/NAME.qcow2; without it, that is gone when they end
    #[arg(long, value_name = "DIR")]
    disks: Option<PathBuf>,

    /// The network namespace of each, '{}' being its number: a name or path, or 'new', in which its taps are made;
    /// 'host' for none of its own. By default 'new' if the VM has taps
    #[arg(long, value_name = "new|host|NAME{}|PATH{}", value_parser = a_namespace)]
    netns: Option<String>,

    /// Leave them paused, each to go on when it is resumed
    #[arg(long)]
    paused: bool,

    /// Leave them running, and end
    #[arg(short, long, requires = "run_dir")]
    detach: bool,

    #[command(flatten)]
    jail: JailArgs,
}

fn an_override(text: &str) -> Result<String, String> {
    Override::from_str(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn a_namespace(text: &str) -> Result<String, &'static str> {
    if text != "host" {
        NetNamespace::from_str(text)?;
    }
    Ok(text.to_owned())
}

/// A clone that has been started.
struct Running {
    number: u32,
    child: Child,
}

/// Why there are no clones.
enum Failure {
    /// It has been told.
    Told(Exit),
    Host(&'static str, PathBuf, io::Error),
    /// One has ended before it went on, and has said why.
    Clone(u32, ExitStatus, String),
}

pub fn run(args: &CloneArgs) -> ExitCode {
    match run_to_end(args) {
        Ok(code) => ExitCode::from(code),
        Err(Failure::Told(exit)) => ExitCode::from(exit as u8),
        Err(Failure::Host(what, path, source)) => {
            exit::say(&format!("tranche: error: cannot {what} {}\n  cause: {source}\n", path.display()));
            ExitCode::from(Exit::ApiSocket as u8)
        }
        Err(Failure::Clone(number, status, text)) => {
            exit::say(&format!("tranche: error: clone {number} does not start, so none does\n{text}"));
            ExitCode::from(code_of(status))
        }
    }
}

fn run_to_end(args: &CloneArgs) -> Result<u8, Failure> {
    // What is wrong with all of them is told once, before there is any.
    let folder =
        Folder::open(&args.dir, &OpenDirectly).map_err(|error| Failure::Told(super::snapshot::report(&error)))?;
    let namespace = args.netns.clone().or_else(|| has_taps(&folder.snapshot.config, args).then(|| "new".into()));
    drop(folder);
    let host = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Failure::Host(what, path, source)
    };
    let mut signals = Signals::block().map_err(host("listen to signals of", Path::new("this process")))?;
    let program = std::env::current_exe().map_err(host("find", Path::new("this program")))?;
    let run_dir = RunDir::make(args).map_err(|(path, source)| Failure::Host("make the directory", path, source))?;
    let mut clones = Clones(Vec::new());
    for number in 1..=args.number {
        let mut command = command(args, &program, &run_dir.path, number, namespace.as_deref());
        if let Some(dir) = &args.disks {
            let dir = dir.join(number.to_string());
            fs::create_dir_all(&dir).map_err(host("make the directory", &dir))?;
        }
        let log = run_dir.file(number, "log");
        command.stderr(File::create(&log).map_err(host("write", &log))?);
        let child = command.spawn().map_err(host("start", &program))?;
        clones.0.push(Running { number, child });
    }
    for clone in &mut clones.0 {
        let socket = run_dir.file(clone.number, "sock");
        if let Some(status) = clone.wait_until_it_goes_on(&socket) {
            // Before it goes with its directory.
            let text = fs::read_to_string(run_dir.file(clone.number, "log")).unwrap_or_default();
            return Err(Failure::Clone(clone.number, status, text));
        }
        exit::print(&format!("{} {} {}\n", clone.number, clone.child.id(), socket.display()));
    }
    if args.detach {
        clones.0.clear();
        return Ok(0);
    }
    let code = clones.wait_for_all(&mut signals);
    Ok(code)
}

/// Is one of its networks a tap that none of the clones has for itself already?
fn has_taps(config: &SavedVm, args: &CloneArgs) -> bool {
    let is_given = |name: &str| args.overrides.iter().any(|text| text.starts_with(&format!("net.{name}=")));
    config.nics.iter().any(|nic| matches!(nic.config.backend, NetBackend::Tap(_)) && !is_given(&nic.name))
}

fn command(args: &CloneArgs, program: &Path, run_dir: &Path, number: u32, namespace: Option<&str>) -> Command {
    let numbered = |text: &str| text.replace("{}", &number.to_string());
    let file = |kind: &str| run_dir.join(format!("{number}.{kind}"));
    let mut command = Command::new(program);
    command.arg0("tranche").arg("restore").arg(&args.dir).arg("--api-sock").arg(file("sock"));
    let mut console = OsString::from("socket=");
    console.push(file("console"));
    command.arg("--serial").arg(console).arg("--id").arg(format!("clone-{number}"));
    command.arg("--jail").arg(args.jail.level().to_string()).args(args.jail.share.to_options());
    for change in &args.overrides {
        command.arg("--override").arg(numbered(change));
    }
    if let Some(namespace) = namespace.filter(|namespace| *namespace != "host") {
        command.arg("--netns").arg(numbered(namespace));
    }
    if let Some(dir) = &args.disks {
        command.arg("--disks").arg(dir.join(number.to_string()));
    }
    if args.paused {
        command.arg("--paused");
    }
    if args.detach {
        // The keys of this terminal are not for them.
        command.process_group(0);
    } else {
        command.arg("--with-parent").arg(std::process::id().to_string());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Where the clones' files are.
struct RunDir {
    path: PathBuf,
    /// Is it ours to remove?
    ours: bool,
}

impl RunDir {
    fn make(args: &CloneArgs) -> Result<Self, (PathBuf, io::Error)> {
        let (path, ours) = match &args.run_dir {
            Some(path) => (path.clone(), false),
            None => {
                let base = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
                let base = base.map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
                (base.join(format!("tranche-clones-{}", std::process::id())), true)
            }
        };
        let made = fs::DirBuilder::new().recursive(!ours).mode(0o700).create(&path);
        let path = made.and_then(|()| path.canonicalize()).map_err(|error| (path, error))?;
        Ok(Self { path, ours })
    }

    fn file(&self, number: u32, kind: &str) -> PathBuf {
        self.path.join(format!("{number}.{kind}"))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Running {
    /// Waits for its API's first answer; returns how it has ended, if that came first.
    fn wait_until_it_goes_on(&mut self, socket: &Path) -> Option<ExitStatus> {
        loop {
            let answer = Client::connect(socket).and_then(|mut client| client.request("GET", "/", None));
            if answer.is_ok() {
                return None;
            }
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                Ok(Some(status)) => return Some(status),
                Err(_) => return Some(ExitStatus::from_raw(0)),
            }
        }
    }
}

/// All of them. Those that are left when this is dropped are killed.
struct Clones(Vec<Running>);

impl Clones {
    /// Waits for the end of each, and hands on the signals that ask for it. Returns the first exit code that is not 0.
    fn wait_for_all(mut self, signals: &mut Signals) -> u8 {
        let mut code = 0;
        let pidfd = |clone: &Running| pidfd_open(Pid::from_child(&clone.child), PidfdFlags::empty());
        let ends: Vec<_> = self.0.iter().map(pidfd).collect();
        let mut left: Vec<_> = self.0.drain(..).zip(ends).collect();
        while !left.is_empty() {
            // The signals' descriptor, and one for each clone that ends.
            let signals_fd = signals.as_fd();
            let mut fds = vec![PollFd::from_borrowed_fd(signals_fd, PollFlags::IN)];
            fds.extend(left.iter().filter_map(|(_, end)| Some(PollFd::new(end.as_ref().ok()?, PollFlags::IN))));
            let _ = poll(&mut fds, None);
            drop(fds);
            while let Some(signal) = signals.next() {
                let signal = Signal::from_named_raw(signal).unwrap_or(Signal::TERM);
                for end in left.iter().filter_map(|(_, end)| end.as_ref().ok()) {
                    let _ = pidfd_send_signal(end, signal);
                }
            }
            left.retain_mut(|(clone, end)| {
                // Without a descriptor for its end, there is nothing to do but to wait.
                let status = if end.is_ok() { clone.child.try_wait() } else { clone.child.wait().map(Some) };
                let status = match status {
                    Ok(None) => return true,
                    Ok(Some(status)) => status,
                    Err(_) => return false,
                };
                if !status.success() {
                    exit::say(&format!("tranche: clone {} has ended: {status}\n", clone.number));
                    code = if code == 0 { code_of(status) } else { code };
                }
                false
            });
        }
        code
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        for clone in &mut self.0 {
            let _ = clone.child.kill();
            let _ = clone.child.wait();
        }
    }
}

/// The exit code of a clone, or what a shell makes of its signal.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
