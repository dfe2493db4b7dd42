//! A control group of version 2 for a VM: what the host's kernel has it do with, whatever becomes of the VMM.
//!
//! ```text
//!   P            where groups may be made: the one around ours, if that is ours to use ("delegated", cgroups(7))
//!   ├─ ours      this process, and others
//!   └─ tranche-N the VMM and its helpers; N is this process's number
//!
//!   ours         or our own, if nobody else is in it: a scope or a service of systemd's
//!   ├─ parent    this process, as a group that has others in it cannot have processes
//!   └─ tranche-N
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access, getxattr, statfs};
use thiserror::Error;

use crate::config::{Flow, RateLimits, Share, TokenBucket};

const MOUNT: &str = "/sys/fs/cgroup";
const MAGIC: u64 = 0x6367_7270; // CGROUP2_SUPER_MAGIC, linux/magic.h

/// In front of the number of a VM's parent.
const NAME: &str = "tranche-";
/// Where this process goes when its group is to have others in it.
const PARENT: &str = "parent";

/// Microseconds for which CPU time is counted.
const CPU_PERIOD: u64 = 100_000;
/// Processes and threads of a VMM and its helpers.
const TASKS: u64 = super::enter::THREADS + 64;

const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

#[derive(Debug, Error)]
pub enum CgroupError {
    #[error("this host has no cgroups of version 2 at {MOUNT}")]
    NoCgroups,
    #[error("no cgroup can be made, as {} is not ours alone, nor is the one around it", .0.display())]
    NotDelegated(PathBuf),
    #[error("cgroups here have no controller '{0}'")]
    NoController(&'static str),
    #[error("no controllers are switched on for cgroups here")]
    NoControllers,
    #[error("cannot {what} {}", path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
}

impl CgroupError {
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoCgroups => "boot with 'systemd.unified_cgroup_hierarchy=1', or do without CPU and memory limits",
            _ => {
                "start it where a cgroup is delegated: 'systemd-run --user --scope -p Delegate=yes tranche ...', or a \
                 service with Delegate=yes (docs/shares.md)"
            }
        }
    }
}

fn path(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Path { what, path, source }
}

/// The group of a VM; gone when it is dropped, with the VM.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
    controllers: Vec<&'static str>,
    /// Does its memory have a limit that somebody has asked for?
    has_memory_limit: bool,
    io_limit: Option<RateLimits>,
    /// Our own, which we have left for one below it.
    left: Option<PathBuf>,
}

impl Cgroup {
    /// Makes a group, with the limits that it is to keep. Nothing is in it yet.
    ///
    /// # Errors
    /// When there is no place for it, or a controller is missing that a limit takes.
    pub fn make(share: &Share) -> Result<Self, CgroupError> {
        let Place { dir: place, left } = Place::find(&ours()?)?;
        let all = left.is_some();
        let dir = place.join(format!("{NAME}{}", std::process::id()));
        // From here on, whatever fails, it is taken back.
        let mut group = Self { dir, controllers: Vec::new(), has_memory_limit: false, io_limit: None, left };
        let wanted: Vec<_> = CONTROLLERS.into_iter().filter(|name| all || needs(share, name)).collect();
        group.controllers = enable(&place, &wanted)?;
        if let Some(missing) = CONTROLLERS.into_iter().find(|name| needs(share, name) && !group.has(name)) {
            return Err(CgroupError::NoController(missing));
        }
        if group.controllers.is_empty() {
            return Err(CgroupError::NoControllers);
        }
        // Of a process that had our number and was killed.
        let _ = fs::remove_dir(&group.dir);
        fs::create_dir(&group.dir).map_err(path("make the cgroup", &group.dir))?;
        group.limit(share)?;
        group.has_memory_limit = share.memory_limit.is_some();
        group.io_limit = share.io_limit.map(|Flow(limits)| limits).filter(|_| group.has("io"));
        Ok(group)
    }

    fn limit(&self, share: &Share) -> Result<(), CgroupError> {
        if let Some(limit) = share.cpu_limit {
            self.write("cpu.max", &format!("{} {CPU_PERIOD}", limit.quota(CPU_PERIOD)))?;
        }
        if let Some(weight) = share.cpu_weight {
            self.write("cpu.weight", &weight.to_string())?;
        }
        if let Some(limit) = share.memory_limit {
            self.write("memory.max", &limit.0.to_string())?;
        }
        if self.has("memory") {
            // A VMM without its helpers is none.
            self.write("memory.oom.group", "1")?;
        }
        if self.has("pids") {
            self.write("pids.max", &TASKS.to_string())?;
        }
        Ok(())
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.contains(&controller)
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let file = self.dir.join(file);
        fs::write(&file, value).map_err(path("set the limit", &file))
    }

    /// Controllers that count and limit what is in it.
    #[must_use]
    pub fn controllers(&self) -> &[&'static str] {
        &self.controllers
    }

    /// A process can be made in it by this.
    ///
    /// # Errors
    /// The host's.
    pub fn fd(&self) -> Result<OwnedFd, CgroupError> {
        File::open(&self.dir).map(OwnedFd::from).map_err(path("open the cgroup", &self.dir))
    }

    /// Takes in a process that is there already.
    ///
    /// # Errors
    /// The host's.
    pub fn add(&self, process: u32) -> io::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), process.to_string())
    }

    /// How much memory the VM may take in the end, if nobody has said it: all that it may map.
    ///
    /// # Errors
    /// The host's.
    pub fn allow_memory(&self, bytes: u64) -> io::Result<()> {
        if self.has_memory_limit || !self.has("memory") {
            return Ok(());
        }
        fs::write(self.dir.join("memory.max"), bytes.to_string())
    }

    /// Has the limits of disks hold where their files are too, for a VMM that keeps none itself. They are twice as wide
    /// there, so that nobody else meets them: the host reads ahead, and a budget may be spent in one go.
    ///
    /// # Errors
    /// The host's. Files that are on no block device have no limits.
    pub fn limit_disk(&self, file: &File) -> io::Result<()> {
        let Some(limits) = self.io_limit else { return Ok(()) };
        let meta = file.metadata()?;
        let device = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
        let Some(device) = whole_device(device) else { return Ok(()) };
        let text = format!("{device}{}\n", io_max(limits));
        fs::write(self.dir.join("io.max"), text)
    }

    /// Has the kernel ended what is in it, as it took more memory than it may?
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.dir.join("memory.events")).unwrap_or_default();
        let count = |line: &str| line.strip_prefix("oom_kill ")?.parse::<u64>().ok();
        events.lines().find_map(count).is_some_and(|count| count > 0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Who was in it is dead, and out of it in a moment.
        for _ in 0..100 {
            match fs::remove_dir(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => break,
            }
        }
        if let Some(ours) = &self.left {
            let _ = come_back(ours);
        } else if let Some(place) = self.dir.parent() {
            sweep(place);
        }
    }
}

/// Does the share take this controller?
fn needs(share: &Share, controller: &str) -> bool {
    match controller {
        "cpu" => share.cpu_limit.is_some() || share.cpu_weight.is_some(),
        "memory" => share.memory_limit.is_some(),
        // Disks and cards have limiters of their own.
        _ => false,
    }
}

/// The group that we are in.
fn ours() -> Result<PathBuf, CgroupError> {
    if !statfs(MOUNT).is_ok_and(|of| of.f_type as u64 == MAGIC) {
        return Err(CgroupError::NoCgroups);
    }
    let text = fs::read_to_string("/proc/self/cgroup").map_err(|_| CgroupError::NoCgroups)?;
    let name = text.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(CgroupError::NoCgroups)?;
    // Without a slash at its end.
    Ok(if name.is_empty() { MOUNT.into() } else { Path::new(MOUNT).join(name) })
}

/// Can limits be kept where we are?
#[must_use]
pub fn can_be_made() -> bool {
    ours().is_ok_and(|ours| Place::look(&ours).is_some())
}

/// The group of a VM's process, as `/proc/PID/cgroup` names it, and its limits.
#[must_use]
pub fn look_at(pid: u32) -> Option<(String, BTreeMap<&'static str, String>)> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Path::new(name).file_name()?.to_str()?.strip_prefix(NAME)?;
    let dir = Path::new(MOUNT).join(name);
    let limits = ["cpu.max", "cpu.weight", "memory.max", "pids.max", "io.max"].into_iter();
    let limits = limits.filter_map(|file| Some((file, fs::read_to_string(dir.join(file)).ok()?.trim().to_owned())));
    Some((format!("/{name}"), limits.collect()))
}

/// Where groups are made.
struct Place {
    dir: PathBuf,
    /// Our own group, if it is the one and we have to leave it.
    left: Option<PathBuf>,
}

impl Place {
    fn look(ours: &Path) -> Option<Self> {
        // Where systemd is, groups are made in those that it has given away (systemd.resource-control(5), Delegate=).
        let free = !Path::new("/run/systemd/system").exists();
        // The root of all groups may have processes and groups in it.
        if is_root(ours) {
            return (free && may_write(ours)).then(|| Self { dir: ours.into(), left: None });
        }
        let around = ours.parent().filter(|_| ours != Path::new(MOUNT));
        if let Some(around) = around.filter(|around| may_write(around) && (free || is_given_away(around))) {
            return Some(Self { dir: around.into(), left: None });
        }
        let alone = fs::read_to_string(ours.join("cgroup.procs"))
            .is_ok_and(|processes| processes.lines().all(|process| process.parse() == Ok(std::process::id())));
        // Older ones give a user's away without a mark that the user could see.
        let free = free || !rustix::process::geteuid().is_root() || is_given_away(ours);
        (alone && free && may_write(ours)).then(|| Self { dir: ours.into(), left: Some(ours.into()) })
    }

    /// Finds it, and leaves our group if need be.
    fn find(ours: &Path) -> Result<Self, CgroupError> {
        let place = Self::look(ours).ok_or_else(|| CgroupError::NotDelegated(ours.into()))?;
        if let Some(left) = &place.left {
            let parent = left.join(PARENT);
            let made = fs::create_dir(&parent).or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => Err(error),
            });
            made.and_then(|()| fs::write(parent.join("cgroup.procs"), "0")).map_err(path("move to", &parent))?;
        }
        Ok(place)
    }
}

fn is_root(dir: &Path) -> bool {
    !dir.join("cgroup.type").exists()
}

/// May we make groups in it, and move processes there?
fn may_write(dir: &Path) -> bool {
    let files = [dir.into(), dir.join("cgroup.procs"), dir.join("cgroup.subtree_control")];
    files.iter().all(|path: &PathBuf| access(path, Access::WRITE_OK).is_ok())
}

/// Has systemd marked it as one that is not its own any more? The second mark is there since version 251.
fn is_given_away(dir: &Path) -> bool {
    ["trusted.delegate", "user.delegate"].iter().any(|name| {
        let mut value = [0; 1];
        getxattr(dir, *name, &mut value) == Ok(1) && value == *b"1"
    })
}

/// Has groups in `dir` be controlled, by these as far as they are there; tells which ones are on then.
fn enable(dir: &Path, wanted: &[&'static str]) -> Result<Vec<&'static str>, CgroupError> {
    let read = |file: &str| {
        let file = dir.join(file);
        fs::read_to_string(&file).map_err(path("read", &file))
    };
    let among = |text: &str, name: &str| text.split_whitespace().any(|word| word == name);
    let (there, on) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let (mut enabled, mut more) = (Vec::new(), String::new());
    for name in CONTROLLERS {
        if among(&on, name) {
            enabled.push(name);
        } else if wanted.contains(&name) && among(&there, name) {
            enabled.push(name);
            more.push_str(&format!("+{name} "));
        }
    }
    if !more.is_empty() {
        let file = dir.join("cgroup.subtree_control");
        fs::write(&file, more.trim_end()).map_err(path("switch controllers on in", &file))?;
    }
    Ok(enabled)
}

/// Goes back to the group that we have left, and leaves it as it was.
fn come_back(ours: &Path) -> io::Result<()> {
    let control = ours.join("cgroup.subtree_control");
    let off: String = fs::read_to_string(&control)?.split_whitespace().map(|name| format!("-{name} ")).collect();
    fs::write(&control, off.trim_end())?;
    fs::write(ours.join("cgroup.procs"), "0")?;
    fs::remove_dir(ours.join(PARENT))
}

/// Removes the groups of VMs whose parents were killed; those that have processes stay.
fn sweep(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(NAME)?.parse::<u32>().ok());
        if number.is_some_and(|number| !Path::new("/proc").join(number.to_string()).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The device of which `device` is all or a part, as `MAJOR:MINOR`; none for a file system without one.
fn whole_device(device: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let whole = if entry.join("partition").exists() { entry.parent()? } else { &entry };
    Some(fs::read_to_string(whole.join("dev")).ok()?.trim().to_owned())
}

/// As `io.max` has them, after the device.
fn io_max(limits: RateLimits) -> String {
    let per_second = |bucket: TokenBucket| {
        let rate = u128::from(bucket.size) * 2 * 1000 / u128::from(bucket.refill_ms.max(1));
        u64::try_from(rate).unwrap_or(u64::MAX).max(1)
    };
    let of = |limit: Option<TokenBucket>, keys: [&str; 2]| {
        let rate = limit.filter(|bucket| !bucket.is_unlimited()).map(per_second);
        rate.map(|rate| keys.map(|key| format!(" {key}={rate}")).concat()).unwrap_or_default()
    };
    of(limits.bandwidth, ["rbps", "wbps"]) + &of(limits.operations, ["riops", "wiops"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_hosts_devices_are_rates() {
        let bucket = |size, refill_ms| Some(TokenBucket { size, refill_ms, burst: 5 });
        let limits = |bandwidth, operations| io_max(RateLimits { bandwidth, operations });
        assert_eq!(limits(bucket(1000, 1000), None), " rbps=2000 wbps=2000");
        assert_eq!(limits(bucket(1 << 20, 100), bucket(1, 10_000)), " rbps=20971520 wbps=20971520 riops=1 wiops=1");
        let most = u64::MAX;
        assert_eq!(limits(None, bucket(most, 1)), format!(" riops={most} wiops={most}"));
        assert_eq!(limits(None, bucket(0, 1)), "");
    }

    #[test]
    fn controllers_are_switched_on_once() {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("cgroup.subtree_control");
        fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu io memory\n").unwrap();
        fs::write(&control, "memory\n").unwrap();
        assert_eq!(enable(dir.path(), &[]).unwrap(), ["memory"]);
        assert_eq!(fs::read_to_string(&control).unwrap(), "memory\n");
        assert_eq!(enable(dir.path(), &["cpu", "memory", "pids"]).unwrap(), ["cpu", "memory"]);
        assert_eq!(fs::read_to_string(&control).unwrap(), "+cpu");
    }

    #[test]
    fn what_is_on_no_device_has_none() {
        let null = fs::metadata("/proc/self/stat").unwrap().dev();
        assert_eq!(whole_device(null), None);
    }
}
