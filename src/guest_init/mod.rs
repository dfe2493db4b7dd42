//! What runs first inside a guest: the init of the initrds that [`kernels`](crate::kernels) builds.
//!
//! It loads the modules that the initrd brings, finds the root file system, and makes way for its init. On an error
//! it says why and ends, which the kernel answers with a panic: the monitor outside sees that.

pub mod cmdline;
mod modules;
pub(crate) mod partitions;
mod root;
pub mod superblock;

use std::ffi::CString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};

use cmdline::{Options, Root};
pub use modules::{BASE as MODULES_BASE, DIR as MODULES_DIR, ORDER as MODULES_ORDER};
use root::Found;

/// How long the root's device may take to appear. It takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the root file system is mounted before it becomes the root.
const NEW_ROOT: &str = "/root";

/// Tried in this order, as the kernel does.
const INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];

/// Is this process the first one of a guest?
#[must_use]
pub fn is_wanted(program: Option<&std::ffi::OsStr>) -> bool {
    std::process::id() == 1 && program.is_some_and(|program| Path::new(program).ends_with("init"))
}

/// Returns only if it failed.
#[must_use]
pub fn main() -> ExitCode {
    let Err(failure) = start();
    // Standard error is the console.
    eprintln!("tranche init: {failure}");
    ExitCode::FAILURE
}

/// What was wrong, in words for the guest's owner.
struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Says what could not be done when an operation failed.
fn doing<E: fmt::Display>(what: impl fmt::Display) -> impl FnOnce(E) -> Failure {
    move |error| Failure(format!("cannot {what}: {error}"))
}

fn start() -> Result<std::convert::Infallible, Failure> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, at, kind, MountFlags::empty(), None).map_err(doing(format_args!("mount {at}")))?;
    }
    let line = fs::read_to_string("/proc/cmdline").map_err(doing("read /proc/cmdline"))?;
    let options = Options::parse(&line);
    let wanted = options.root.as_deref().ok_or_else(|| {
        Failure("the kernel command line has no root=: give a root disk, or root=, or an initrd of your own".into())
    })?;
    let root = Root::parse(wanted).ok_or_else(|| {
        Failure(format!("root={wanted} is none of /dev/NAME, LABEL=, UUID=, PARTLABEL= and PARTUUID="))
    })?;

    modules::load(modules::BASE)?;
    let patience = (!options.wait).then(|| PATIENCE + Duration::from_secs(options.delay.min(3600)));
    let found = root::wait_for(&root, patience).ok_or_else(|| root::missing(wanted))?;
    mount_root(&found, &options)?;
    switch_root()?;
    Err(exec(options.init.as_deref()))
}

fn mount_root(found: &Found, options: &Options) -> Result<(), Failure> {
    let device = &found.device;
    let kind = options.kind.as_deref().or(found.superblock.as_ref().map(|superblock| superblock.kind.name()));
    let kind = kind.ok_or_else(|| Failure(format!("{device} holds no file system known here: give rootfstype=")))?;
    modules::load(kind)?;
    let flags = if options.writable { MountFlags::empty() } else { MountFlags::RDONLY };
    let data = CString::new(options.flags.as_str()).map_err(doing("take rootflags="))?;
    mount(device.as_str(), NEW_ROOT, kind, flags, Some(&*data))
        .map_err(doing(format_args!("mount {device} ({kind}, {})", if options.writable { "rw" } else { "ro" })))
}

/// Makes the mounted file system the root. What the initrd held goes, as its memory would stay in use.
fn switch_root() -> Result<(), Failure> {
    for dir in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{dir}"), format!("{NEW_ROOT}/{dir}"));
        if mount_move(&from, &to).is_err() {
            // The root has no such directory, and does without.
            let _ = unmount(&from, UnmountFlags::DETACH);
        }
    }
    let _ = fs::remove_dir_all(MODULES_DIR);
    let _ = fs::remove_file("/init");
    let result = (|| {
        rustix::process::chdir(NEW_ROOT)?;
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")
    })();
    result.map_err(doing("make it the root file system"))
}

/// Becomes the root's init, with the arguments that the kernel gave us. Returns why not.
fn exec(init: Option<&str>) -> Failure {
    let attempt = |path: &str| Command::new(path).args(std::env::args_os().skip(1)).exec();
    if let Some(path) = init {
        return doing(format_args!("run init={path}"))(attempt(path));
    }
    for path in INITS {
        let error = attempt(path);
        if error.kind() != io::ErrorKind::NotFound {
            return doing(format_args!("run {path}"))(error);
        }
    }
    Failure(format!("the root file system has no init: none of {}", INITS.join(", ")))
}
