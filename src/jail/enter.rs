//! How a VMM loses its rights: a child of ours, which goes through one list of steps.
//!
//! ```text
//!   parent: keeps the user's rights, opens what the VM needs          VMM: a child, before its first thread
//!     clone3 ─── new user, mount, PID, network, IPC, UTS, cgroup namespaces ──▶ waits
//!     maps one user of the namespace to an ordinary one of the host, says so ──▶ is that user
//!                                                                               an empty, read-only root directory
//!                                                                               resource limits
//!                                                                               no capabilities
//!                                                                               its profile of AppArmor and TOMOYO
//!                                                                               no new privileges
//!                                                                               not to be looked into (not dumpable)
//!                                                                               Landlock: no files, no ports, no signals
//!     policy ◀── freezes ────────────────────────────────────────────────────── seccomp, before the guest runs
//! ```

#![expect(unsafe_code, reason = "clone3, and rustix's descriptors of a child that has just begun")]

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{
    DumpableBehavior, Gid, Pid, Resource, Rlimit, Signal, Uid, WaitOptions, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit, waitpid,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use thiserror::Error;

use super::lsm::Profiles;
use super::tool::kernel_version;
use super::{Cgroup, CgroupError, Layer, wire};
use crate::config::JailLevel as Level;
use crate::memory;

/// The first byte of the message that says why a VMM is not jailed.
pub const NOT_JAILED: u8 = 0xfe;

/// Whom the host takes a VMM for whose user is root: nobody.
const NOBODY: u32 = 65534;

/// Most processes and threads of a VMM; those of 64 vCPUs and as many devices take a part of that.
pub(super) const THREADS: u64 = 1024;

#[derive(Debug, Error)]
pub enum JailError {
    #[error("cannot make a process in namespaces of its own")]
    Namespaces(#[source] io::Error),
    #[error("cannot make a process")]
    Fork(#[source] io::Error),
    #[error("cannot map the user of the VMM's user namespace")]
    Map(#[source] io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot make a process in its cgroup")]
    JoinCgroup(#[source] io::Error),
    #[error("limits of CPU time and memory take a jail: --jail strict or compat")]
    LimitsUnjailed,
    #[error("{0}")]
    Step(String),
    #[error("the VMM's parent cannot go on: {what}")]
    Host { what: &'static str, source: io::Error },
}

impl JailError {
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Namespaces(_) | Self::Map(_) => Some(
                "an ordinary user needs user namespaces: kernel.unprivileged_userns_clone=1, user.max_user_namespaces \
                 above 0, kernel.apparmor_restrict_unprivileged_userns=0 or the AppArmor profile of docs/jail.md; \
                 'tranche doctor --jail' shows what this host has, '--jail compat' does with it",
            ),
            Self::Step(_) => Some(
                "'tranche doctor --jail' shows what this host has, and '--jail compat' does with that; where mounting is denied \
                 (kernel.apparmor_restrict_unprivileged_userns=1, a container's profile), docs/jail.md tells what allows it",
            ),
            Self::Cgroup(error) => Some(error.hint()),
            Self::Fork(_) | Self::JoinCgroup(_) | Self::LimitsUnjailed | Self::Host { .. } => None,
        }
    }
}

/// Either side of the wall.
pub enum Side {
    Parent {
        /// Readable at its end.
        process: OwnedFd,
        pid: i32,
        /// What the VMM asks comes from there.
        socket: OwnedFd,
    },
    Vmm {
        /// What asks the parent.
        socket: OwnedFd,
        /// What the host would not take away, and why.
        missing: Missing,
    },
}

/// Layers of a jail that are not there, and why.
pub type Missing = Vec<(Layer, String)>;

/// linux/sched.h; the one of libc is too small for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

const NAMESPACES: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;

/// Makes the process that is to be the VMM, in the cgroup if there is one. It has rights still, and waits for nobody.
///
/// No other thread may be there yet.
///
/// # Errors
/// With [`Level::Strict`], when the host does not let us take away all of them.
pub fn split(level: Level, cgroup: Option<&Cgroup>) -> Result<Side, JailError> {
    let failed = |source: Errno| JailError::Host { what: "no socket", source: source.into() };
    let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = pair(SocketType::SEQPACKET).map_err(failed)?;
    let (go, wait) = pair(SocketType::STREAM).map_err(failed)?;
    let (mut go, mut wait) = (UnixStream::from(go), UnixStream::from(wait));
    let is_root = rustix::process::geteuid().is_root();
    let parent = std::process::id();
    let mut namespaces = NAMESPACES;
    let cgroup = cgroup.map(Cgroup::fd).transpose()?;
    let (pid, process) = loop {
        match clone3(namespaces, cgroup.as_ref()) {
            Ok(Some(child)) => break child,
            Ok(None) => {
                drop((ours, go, cgroup));
                let mut start = [0];
                let entered = wait
                    .read_exact(&mut start)
                    .map_err(|_| "the parent has ended".to_owned())
                    .and_then(|()| enter(level, namespaces, is_root, parent, &theirs).map_err(|error| error.text()));
                return match entered {
                    Ok(missing) => Ok(Side::Vmm { socket: theirs, missing }),
                    Err(text) => {
                        let mut message = vec![NOT_JAILED];
                        message.extend(text.bytes());
                        let _ = rustix::io::write(&theirs, &message);
                        std::process::exit(1)
                    }
                };
            }
            // Of the cgroup only: one that has gone, is not ours, or has groups in it.
            Err(error)
                if cgroup.is_some()
                    && [libc::ENODEV, libc::EACCES, libc::EBUSY].map(Some).contains(&error.raw_os_error()) =>
            {
                return Err(JailError::JoinCgroup(error));
            }
            Err(error) if level == Level::Strict => return Err(JailError::Namespaces(error)),
            // Root does without those of users, others without any.
            Err(_) if is_root && namespaces == NAMESPACES => namespaces &= !(libc::CLONE_NEWUSER as u64),
            Err(_) if namespaces != 0 => namespaces = 0,
            Err(error) => return Err(JailError::Fork(error)),
        }
    };
    drop((theirs, wait));
    if namespaces & libc::CLONE_NEWUSER as u64 != 0 {
        map_user(pid, is_root).map_err(JailError::Map)?;
    }
    go.write_all(&[1]).map_err(|source| JailError::Host { what: "its VMM has ended", source })?;
    Ok(Side::Parent { process, pid, socket: ours })
}

/// The process's number and descriptor; nothing in the child.
fn clone3(flags: u64, cgroup: Option<&OwnedFd>) -> io::Result<Option<(i32, OwnedFd)>> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: all zeroes are a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.pidfd = (&raw mut pidfd).addr() as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM this is fork(2): the child goes on with a copy of all. It has one thread, as we have, so
    // that no lock is left locked in it.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) } {
        0 => Ok(None),
        // SAFETY: a fresh descriptor that nobody else owns.
        pid if pid > 0 => Ok(Some((pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) }))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// User 0 of the VMM's namespace is an ordinary one of the host: who started it, or nobody for root.
fn map_user(pid: i32, is_root: bool) -> io::Result<()> {
    let (user, group) = match is_root {
        true => (NOBODY, NOBODY),
        false => (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
    };
    if !is_root {
        fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    }
    fs::write(format!("/proc/{pid}/uid_map"), format!("0 {user} 1"))?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("0 {group} 1"))
}

/// A step that has failed.
struct Failed {
    what: &'static str,
    source: io::Error,
}

impl Failed {
    fn text(&self) -> String {
        format!("cannot {}: {}", self.what, self.source)
    }
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Failed {
    move |source| Failed { what, source: source.into() }
}

/// Takes this process's rights away, one after the other.
fn enter(level: Level, namespaces: u64, is_root: bool, parent: u32, socket: &OwnedFd) -> Result<Missing, Failed> {
    let mut missing = Missing::new();
    // What is not there is an error in a strict jail only.
    let mut may_lack = |layer: Layer, taken: Result<(), Failed>| match taken {
        Err(error) if level == Level::Compat => {
            missing.push((layer, error.text()));
            Ok(())
        }
        taken => taken,
    };
    // A session of its own: signals to the group that the program is in are not for it, nor from it.
    rustix::process::setsid().map_err(step("begin a session"))?;
    close_inherited().map_err(step("close what it has inherited"))?;
    forget_environment();
    // The last that is opened by a path.
    memory::pagemap().map_err(step("open /proc/self/pagemap"))?;
    let _ = memory::keep_mappings();
    let profiles = Profiles::find();
    super::seccomp::tell_of_violations(socket).map_err(step("hear of forbidden system calls"))?;
    let in_user_namespace = namespaces & libc::CLONE_NEWUSER as u64 != 0;
    // There, nobody may be what he was not.
    if is_root && in_user_namespace {
        become_nobody(0)?;
    }
    if namespaces == NAMESPACES {
        may_lack(Layer::EmptyRoot, empty_root())?;
    } else {
        let none = || step("make all of them")(io::Error::from(io::ErrorKind::PermissionDenied));
        may_lack(Layer::Namespaces, Err(none()))?;
        may_lack(Layer::EmptyRoot, if namespaces == 0 { Err(none()) } else { empty_root() })?;
    }
    limit_resources(in_user_namespace)?;
    if is_root && !in_user_namespace {
        become_nobody(NOBODY)?;
    }
    drop_capabilities()?;
    let profile = profiles.enter().map_err(step("go over to the AppArmor profile of a VMM, below its program's"));
    may_lack(Layer::Profile, profile)?;
    set_no_new_privs(true).map_err(step("keep it from new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("keep it from being looked into"))?;
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("have it end with its parent"))?;
    // In a PID namespace of its own it has no parent that it can see, and is killed with the socket's other end gone.
    if namespaces & libc::CLONE_NEWPID as u64 == 0 && std::os::unix::process::parent_id() != parent {
        return Err(step("find its parent")(io::Error::from(io::ErrorKind::NotFound)));
    }
    may_lack(Layer::Landlock, restrict())?;
    Ok(missing)
}

/// Closes what whoever started the program has left open. All that is ours would be closed by an exec.
fn close_inherited() -> io::Result<()> {
    let inherited = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| {
        let number: i32 = entry.file_name().to_str()?.parse().ok()?;
        // SAFETY: the call takes any number.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        (number > 2 && flags & libc::FD_CLOEXEC == 0).then_some(number)
    });
    for number in inherited.collect::<Vec<_>>() {
        // SAFETY: nobody of this process has made it, so nobody owns it.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// What of the environment it needs; tests say there what it is to attempt.
const KNOWN: &[&str] = if cfg!(debug_assertions) {
    &["TMPDIR=", "RUST_", "TRANCHE_ATTACK", "TRANCHE_VICTIM"]
} else {
    &["TMPDIR=", "RUST_"]
};

/// Writes zeroes over the rest, which may be somebody's secrets.
fn forget_environment() {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: there is one thread, which has no reference into the environment; it is a list of strings that ends with a
    // null pointer, and each may be written to up to its end.
    unsafe {
        let mut variable = environ;
        while !(*variable).is_null() {
            let text = std::ffi::CStr::from_ptr(*variable).to_bytes();
            if !KNOWN.iter().any(|known| text.starts_with(known.as_bytes())) {
                std::ptr::write_bytes(*variable, 0, text.len());
            }
            variable = variable.add(1);
        }
    }
}

/// Finds out which layers this host allows: makes a jail, and takes it down.
///
/// # Errors
/// When there is not even a process to be had.
pub fn examine() -> Result<Missing, JailError> {
    match split(Level::Compat, None)? {
        Side::Vmm { socket, missing } => {
            let _ = wire::send(&socket, &missing, &[], SendFlags::empty());
            std::process::exit(0)
        }
        Side::Parent { pid, socket, .. } => {
            let failed = |source| JailError::Host { what: "its VMM says nothing", source };
            let received = wire::receive(&socket).map_err(failed)?;
            let _ = Pid::from_raw(pid).map(|pid| waitpid(Some(pid), WaitOptions::empty()));
            let received = received.ok_or(io::ErrorKind::UnexpectedEof.into()).map_err(failed)?;
            match received.bytes.strip_prefix(&[NOT_JAILED]) {
                Some(why) => Err(JailError::Step(String::from_utf8_lossy(why).into_owned())),
                None => received.parse().map_err(failed),
            }
        }
    }
}

/// Has nothing but an empty, read-only directory be all files there are.
fn empty_root() -> Result<(), Failed> {
    const PLACE: &str = "/dev";
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("keep mounts to itself"))?;
    mount("none", PLACE, "tmpfs", flags, c"size=4k,nr_inodes=1,mode=555").map_err(step("mount an empty directory"))?;
    rustix::process::chdir(PLACE).map_err(step("go to the empty directory"))?;
    mount_remount(".", flags | MountFlags::RDONLY, c"").map_err(step("make the empty directory read-only"))?;
    // The old root directory comes to lie over the new one, and goes away.
    rustix::process::pivot_root(".", ".").map_err(step("make the empty directory its root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("let go of the host's files"))?;
    rustix::process::chdir("/").map_err(step("go to its root directory"))
}

fn limit_resources(in_user_namespace: bool) -> Result<(), Failed> {
    // Its parent limits how large its files become. Beyond that, a write is to fail.
    // SAFETY: the signal gets no handler.
    if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(step("ignore writes that are too large")(io::Error::last_os_error()));
    }
    // A dump has the guest's memory, and nobody it could be written for. Elsewhere, all threads of the user would count.
    // Since Linux 5.14, they count in each user namespace by themselves.
    let counts_here = in_user_namespace && kernel_version() >= (5, 14);
    let threads = counts_here.then_some((Resource::Nproc, THREADS));
    for (resource, most) in [(Resource::Core, 0), (Resource::Msgqueue, 0)].into_iter().chain(threads) {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(step("limit its resources"))?;
    }
    Ok(())
}

/// Root's VMM is not root's any more.
fn become_nobody(id: u32) -> Result<(), Failed> {
    rustix::thread::set_thread_groups(&[]).map_err(step("leave its groups"))?;
    let (group, user) = (Gid::from_raw(id), Uid::from_raw(id));
    rustix::thread::set_thread_res_gid(group, group, group).map_err(step("be in nobody's group"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(step("be nobody"))
}

fn drop_capabilities() -> Result<(), Failed> {
    rustix::thread::clear_ambient_capability_set().map_err(step("clear its ambient capabilities"))?;
    for number in 0..64 {
        let Some(capability) = CapabilitySet::from_bits(1u64 << number) else { continue };
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first that the kernel does not know; or, without a user namespace, the right to is not there.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(error) => return Err(step("bound its capabilities")(error)),
        }
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(step("take its capabilities away"))
}

/// No file, no TCP port, no abstract socket and no signal of anybody else's, as far as the kernel's Landlock goes.
fn restrict() -> Result<(), Failed> {
    let restricted = || -> Result<_, RulesetError> {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::from_all(ABI::V4))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?
            .restrict_self()
    };
    let status = restricted().map_err(|error| step("set Landlock's rules")(io::Error::other(error)))?;
    match status.ruleset {
        RulesetStatus::NotEnforced => {
            let lacks = io::Error::other("Landlock (Linux 5.13) is missing or switched off");
            Err(step("take files and ports away")(lacks))
        }
        _ => Ok(()),
    }
}
