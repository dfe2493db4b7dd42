//! A directory of its own for a VMM that is started in it: what Firecracker's jailer makes, with root's rights.

#![expect(unsafe_code, reason = "unshare, fork and descriptors that are closed by their numbers")]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount};
use rustix::process::{Gid, Resource, Rlimit, Uid, setrlimit, setsid};
use rustix::thread::{
    LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};
use thiserror::Error;

/// What it is to be.
#[derive(Debug, Clone)]
pub struct ChrootConfig {
    pub id: String,
    pub program: PathBuf,
    pub user: u32,
    pub group: u32,
    /// Directories of all such VMMs are below it.
    pub base: PathBuf,
    pub net_namespace: Option<PathBuf>,
    pub daemonize: bool,
    pub pid_namespace: bool,
    pub limits: Vec<(Resource, u64)>,
    pub cgroup: CgroupConfig,
    /// What the program is given.
    pub arguments: Vec<OsString>,
}

/// The control group that it is to be in.
#[derive(Debug, Clone)]
pub struct CgroupConfig {
    pub version: u8,
    /// A path below each hierarchy's mount.
    pub parent: Option<PathBuf>,
    /// A file, such as `cpu.shares`, and what is written to it.
    pub files: Vec<(String, String)>,
}

#[derive(Debug, Error)]
pub enum ChrootError {
    #[error("{} has to be a regular file without other names: {what}", path.display())]
    Program { path: PathBuf, what: &'static str },
    #[error("Failed to {what} {}", path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("Failed to {what}")]
    Host { what: &'static str, source: io::Error },
    #[error("There is no cgroup hierarchy of version {version} with the controller {controller}")]
    Controller { version: u8, controller: String },
}

fn path(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ChrootError {
    let path = path.to_owned();
    move |source| ChrootError::Path { what, path, source }
}

fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ChrootError {
    move |error| ChrootError::Host { what, source: error.into() }
}

/// Makes the directory, and becomes the program in it. Comes back only with an error, or in the parent of a program that
/// is in a PID namespace of its own.
///
/// # Errors
/// The first step that fails; what was made by then stays, as with Firecracker's.
pub fn become_jailed(config: &ChrootConfig) -> Result<(), ChrootError> {
    close_inherited();
    let name = check_program(&config.program)?;
    let root = config.base.join(&name).join(&config.id).join("root");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(path("make the directory", &root))?;
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(path("close to others", &root))?;
    let copy = root.join(&name);
    copy_program(&config.program, &copy)?;
    for &(resource, limit) in &config.limits {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(host("limit resources"))?;
    }
    join_cgroups(&config.cgroup, Path::new(&name), &config.id)?;
    if let Some(namespace) = &config.net_namespace {
        let enter = |file: File| Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?);
        File::open(namespace).and_then(enter).map_err(path("join the network namespace", namespace))?;
    }
    // Before the root directory changes, as /dev/null is in the one of before.
    let null = File::options().read(true).write(true).open("/dev/null").map_err(host("open /dev/null"))?;
    let userfault = userfault_minor();
    change_root(&root)?;
    make_nodes(config, userfault)?;
    chown("/", Some(config.user), Some(config.group)).map_err(host("give the directory to its user"))?;
    if config.daemonize {
        setsid().map_err(host("begin a session"))?;
        for replace in [rustix::stdio::dup2_stdin, rustix::stdio::dup2_stdout, rustix::stdio::dup2_stderr] {
            replace(null.as_fd()).map_err(host("let go of the standard streams"))?;
        }
    }
    drop(null);
    let pid_file = PathBuf::from("/").join(format!("{}.pid", name.display()));
    if config.pid_namespace {
        // SAFETY: descriptors are not shared with anybody.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.map_err(host("make a PID namespace"))?;
        // SAFETY: there is one thread, and no lock is held.
        match unsafe { libc::fork() } {
            0 => {}
            -1 => return Err(host("make a process")(io::Error::last_os_error())),
            child => return write_pid(&pid_file, child.unsigned_abs(), config),
        }
    } else {
        write_pid(&pid_file, std::process::id(), config)?;
    }
    let (user, group) = (Uid::from_raw(config.user), Gid::from_raw(config.group));
    set_thread_groups(&[]).map_err(host("leave its groups"))?;
    set_thread_res_gid(group, group, group).map_err(host("change its group"))?;
    set_thread_res_uid(user, user, user).map_err(host("change its user"))?;
    let program = Path::new("/").join(&name);
    let error = Command::new(&program).args(&config.arguments).env_clear().exec();
    Err(path("run", &program)(error))
}

/// Nothing but the standard streams gets into it.
fn close_inherited() {
    // SAFETY: nobody of this process has opened a descriptor that it goes on with.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// The program's name, which has to say whose part it plays.
fn check_program(program: &Path) -> Result<PathBuf, ChrootError> {
    let wrong = |what| ChrootError::Program { path: program.to_owned(), what };
    let metadata = fs::symlink_metadata(program).map_err(path("look at", program))?;
    if metadata.is_symlink() {
        return Err(wrong("it is a symbolic link"));
    }
    if !metadata.is_file() {
        return Err(wrong("it is none"));
    }
    if metadata.nlink() > 1 {
        return Err(wrong("it has several names"));
    }
    let name = program.file_name().filter(|name| name.to_string_lossy().contains("firecracker"));
    name.map(PathBuf::from).ok_or_else(|| wrong("its name does not contain 'firecracker'"))
}

fn copy_program(program: &Path, copy: &Path) -> Result<(), ChrootError> {
    let mut from = File::open(program).map_err(path("open", program))?;
    // One that is there is another VMM's, or what is left of it.
    let to = File::options().write(true).create_new(true).mode(0o755).custom_flags(libc::O_NOFOLLOW).open(copy);
    let mut to = to.map_err(path("make", copy))?;
    io::copy(&mut from, &mut to).map_err(path("copy the program to", copy))?;
    Ok(())
}

fn write_pid(file: &Path, pid: u32, config: &ChrootConfig) -> Result<(), ChrootError> {
    // What is there may be a name that a VMM has given to something else.
    let made = File::options().write(true).create_new(true).open(file).and_then(|mut file| write!(file, "{pid}"));
    made.map_err(path("write", file))?;
    chown(file, Some(config.user), Some(config.group)).map_err(path("give away", file))
}

/// Has a directory be the root directory of this process, in a mount namespace of its own.
fn change_root(root: &Path) -> Result<(), ChrootError> {
    // SAFETY: descriptors are not shared with anybody.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(host("make a mount namespace"))?;
    let kept = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", kept).map_err(host("keep mounts to itself"))?;
    // What becomes a root directory has to be a mount.
    mount_bind_recursive(root, root).map_err(|error| path("mount", root)(error.into()))?;
    rustix::process::chdir(root).map_err(|error| path("go to", root)(error.into()))?;
    // The old root directory comes to lie over the new one, and goes away.
    rustix::process::pivot_root(".", ".").map_err(|error| path("change the root directory to", root)(error.into()))?;
    unmount(".", UnmountFlags::DETACH).map_err(host("let go of the host's files"))?;
    rustix::process::chdir("/").map_err(host("go to the root directory"))
}

/// The number that the host has given to `/dev/userfaultfd`, if it has one.
fn userfault_minor() -> Option<u32> {
    let misc = fs::read_to_string("/proc/misc").ok()?;
    misc.lines().find_map(|line| line.trim().strip_suffix(" userfaultfd")?.trim().parse().ok())
}

fn make_nodes(config: &ChrootConfig, userfault: Option<u32>) -> Result<(), ChrootError> {
    for dir in ["/dev", "/dev/net", "/run"] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(path("make the directory", dir.as_ref()))?;
        chown(dir, Some(config.user), Some(config.group)).map_err(path("give away", dir.as_ref()))?;
    }
    // Documentation/admin-guide/devices.txt of Linux.
    let nodes = [("/dev/kvm", 10, 232), ("/dev/net/tun", 10, 200), ("/dev/urandom", 1, 9)];
    let userfault = userfault.map(|minor| ("/dev/userfaultfd", 10, minor));
    for (node, major, minor) in nodes.into_iter().chain(userfault) {
        mknodat(CWD, node, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(major, minor))
            .map_err(|error| path("make the device node", node.as_ref())(error.into()))?;
        chown(node, Some(config.user), Some(config.group)).map_err(path("give away", node.as_ref()))?;
    }
    Ok(())
}

/// Puts this process into control groups of its own, one in each hierarchy that a file belongs to.
fn join_cgroups(config: &CgroupConfig, program: &Path, id: &str) -> Result<(), ChrootError> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(host("read /proc/mounts"))?;
    let parent = config.parent.as_deref().unwrap_or(program);
    let mut joined: Vec<PathBuf> = Vec::new();
    for (file, value) in &config.files {
        let controller = file.split('.').next().unwrap_or_default();
        let mount = hierarchy(&mounts, config.version, controller)
            .ok_or_else(|| ChrootError::Controller { version: config.version, controller: controller.to_owned() })?;
        let dir = mount.join(parent).join(id);
        fs::create_dir_all(&dir).map_err(path("make the cgroup", &dir))?;
        match (config.version, controller) {
            (2, _) => delegate(&mount, &dir, controller)?,
            (_, "cpuset") => inherit(&mount, &dir)?,
            _ => {}
        }
        let file = dir.join(file);
        fs::write(&file, value).map_err(path("write", &file))?;
        if !joined.contains(&dir) {
            joined.push(dir);
        }
    }
    if let (true, 2, Some(parent)) = (joined.is_empty(), config.version, &config.parent) {
        let mount = hierarchy(&mounts, 2, "");
        let mount = mount.ok_or_else(|| ChrootError::Controller { version: 2, controller: String::new() })?;
        joined.push(mount.join(parent));
    }
    let processes = if config.version == 1 { "tasks" } else { "cgroup.procs" };
    joined.iter().try_for_each(|dir| {
        let file = dir.join(processes);
        fs::write(&file, std::process::id().to_string()).map_err(path("write", &file))
    })
}

/// Has all groups above `dir` share out a controller.
fn delegate(mount: &Path, dir: &Path, controller: &str) -> Result<(), ChrootError> {
    let above: Vec<_> = dir.ancestors().skip(1).take_while(|above| above.starts_with(mount)).collect();
    above.into_iter().rev().try_for_each(|group| {
        let file = group.join("cgroup.subtree_control");
        fs::write(&file, format!("+{controller}")).map_err(path("write", &file))
    })
}

/// Has new groups of version 1 have the CPUs and memory of those above them: none, at first, which nobody can be in.
fn inherit(mount: &Path, dir: &Path) -> Result<(), ChrootError> {
    let groups: Vec<_> = dir.ancestors().take_while(|group| group.starts_with(mount) && *group != mount).collect();
    for group in groups.into_iter().rev() {
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let file = group.join(name);
            if fs::read_to_string(&file).map_err(path("read", &file))?.trim().is_empty() {
                let above = group.with_file_name(name);
                let above = fs::read_to_string(&above).map_err(path("read", &above))?;
                fs::write(&file, above.trim()).map_err(path("write", &file))?;
            }
        }
    }
    Ok(())
}

/// Where a hierarchy is mounted, of the text of /proc/mounts.
fn hierarchy(mounts: &str, version: u8, controller: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind, options) = (words.next()?, words.next()?, words.next()?);
        let fits = match version {
            1 => kind == "cgroup" && options.split(',').any(|option| option == controller),
            _ => kind == "cgroup2",
        };
        fits.then(|| PathBuf::from(place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_by_their_controllers() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(hierarchy(mounts, 1, "cpu"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(hierarchy(mounts, 1, "memory"), None);
        assert_eq!(hierarchy(mounts, 2, "memory"), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn a_program_has_one_name_that_says_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let good = dir.path().join("firecracker-v1");
        fs::write(&good, "").unwrap();
        assert_eq!(check_program(&good).unwrap(), Path::new("firecracker-v1"));
        let link = dir.path().join("firecracker");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        let other = dir.path().join("qemu");
        fs::write(&other, "").unwrap();
        for bad in [&link, &other, &dir.path().to_owned(), &dir.path().join("none")] {
            assert!(check_program(bad).is_err(), "{}", bad.display());
        }
        fs::hard_link(&good, dir.path().join("firecracker-again")).unwrap();
        assert!(check_program(&good).unwrap_err().to_string().contains("several names"));
    }
}
