//! The parent of a jailed VMM: does what it asks for, as far as its policy goes.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::net::SendFlags;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::Cgroup;
use super::policy::Policy;
use super::seccomp::read_violation;
use super::wire::{self, Ask, Given, Received};
use crate::backend::host::Peer;
use crate::backend::kernel_cache::UnpackedKernels;
use crate::backend::tap::TapQueue;
use crate::backend::{Deed, HostFile, HostFiles, OpenDirectly, Right, passt};
use crate::config::{SavedVm, UserNetwork};
use crate::control::{Call, Disks, NextSize};
use crate::memory;
use crate::snapshot::{CONFIG, config_of_state, write_anew};

/// How much more memory a VMM may map once its guest runs, in bytes: threads, buffers, devices that are plugged in.
const MORE_MEMORY: u64 = 256 << 20;

/// How much larger a file may become than the largest of its disks and than its memory, in bytes: logs, a console's
/// output, what a snapshot has besides.
const MORE_FILE: u64 = 1 << 30;

/// Most sizes that are remembered for a VMM that does not take them up.
const MOST_SIZES: usize = 16;

/// The parent's end.
pub struct Parent {
    socket: OwnedFd,
    pid: i32,
    /// Bytes of address space that the VMM may have, once its guest runs.
    memory: Option<u64>,
    /// Bytes of its largest disk.
    largest_disk: u64,
    /// How often clients have asked for a look at a disk's size, and the VMM has not opened it for that yet.
    looks: u32,
    policy: Policy,
    /// Sizes that clients have asked for, and that the VMM has not said yet are to be.
    sizes: Vec<NextSize>,
    /// What runs for the VM; ends with it.
    helpers: Vec<Helper>,
    /// How many of them there were when the guest began to run: one for each network.
    most_helpers: usize,
    kernels: Option<Option<Arc<dyn UnpackedKernels>>>,
    /// Dropped last: who is in it is gone then.
    cgroup: Option<Cgroup>,
}

/// A process that is a network.
struct Helper {
    network: UserNetwork,
    child: Child,
}

impl Helper {
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a message was, besides something that has been done.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    Nothing,
    /// The VM runs.
    Started,
    KeepSize(NextSize),
    Ended {
        code: u8,
        reason: String,
    },
    /// It could not give something up, and does not go on.
    NotJailed(String),
    /// It has tried to do what it may not: a system call, on a thread of some kind.
    Violation {
        call: String,
        thread: &'static str,
    },
    /// It is gone.
    HungUp,
}

impl Parent {
    #[must_use]
    pub fn new(socket: OwnedFd, pid: i32, policy: Policy, cgroup: Option<Cgroup>) -> Self {
        Self {
            socket,
            pid,
            memory: None,
            largest_disk: 0,
            looks: 0,
            policy,
            sizes: Vec::new(),
            helpers: Vec::new(),
            most_helpers: 0,
            kernels: None,
            cgroup,
        }
    }

    /// Has the host's kernel ended the VMM, as it took more memory than it may?
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)
    }

    /// A client asks for something, which the VMM does not know yet: what that takes is the VMM's from now on.
    pub fn hear(&mut self, call: &Call) {
        self.policy.hear(call);
        // What cannot be allowed, the VMM will miss, and say so.
        let _ = match call {
            Call::Resize(request) => {
                self.sizes.truncate(MOST_SIZES - 1);
                self.sizes.extend(NextSize::of(request));
                // Memory is for the life after the next reset.
                let memory = request.memory_bytes.map_or(Ok(()), |bytes| self.allow_memory(bytes));
                memory.and(request.disks.values().try_for_each(|&bytes| self.allow_files(bytes)))
            }
            // Its file may be another one now, or, where none is named, a larger one.
            Call::PatchDrive(drive) => self.allow_disk(drive.path_on_host.as_deref()),
            Call::PutDrive(drive) => self.allow_disk(drive.path_on_host.as_deref()),
            _ => Ok(()),
        };
    }

    /// Takes in a message, and waits for one if there is none.
    pub fn serve(&mut self) -> News {
        let received = wire::receive(&self.socket);
        // One that makes no sense: the VMM is not to be talked to any more.
        let Ok(Some(received)) = received else { return News::HungUp };
        if let Some((call, thread)) = read_violation(&received.bytes) {
            return News::Violation { call, thread };
        }
        if let Some(text) = received.bytes.strip_prefix(&[super::enter::NOT_JAILED]) {
            return News::NotJailed(String::from_utf8_lossy(text).into_owned());
        }
        let Ok(ask) = received.parse() else { return News::HungUp };
        self.reap();
        match ask {
            Ask::Started => News::Started,
            Ask::KeepSize(size) => match self.sizes.iter().position(|asked| *asked == size) {
                Some(index) => News::KeepSize(self.sizes.swap_remove(index)),
                None => {
                    let why = io::Error::other("the jail does not allow it: no client has asked for that size");
                    self.answer(&Given::Failed(why), &[])
                }
            },
            Ask::Ended { code, reason } => News::Ended { code, reason },
            ask => {
                let (given, fds) = self.give(ask, received).unwrap_or_else(|error| (Given::Failed(error), Vec::new()));
                self.answer(&given, &fds)
            }
        }
    }

    /// Answers what [`Self::serve`] has told of.
    pub fn answer(&self, given: &Given, fds: &[OwnedFd]) -> News {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match wire::send(&self.socket, given, &fds, SendFlags::DONTWAIT) {
            // It asks, and does not take the answers in: nobody of ours does that.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => News::HungUp,
            // Who is gone does not take it in, but may have said something before: that is read, and then its end.
            _ => News::Nothing,
        }
    }

    /// What the VMM has mapped by now is about all that it needs.
    fn limit_memory(&mut self) -> io::Result<()> {
        // In pages, the first number (proc(5), /proc/pid/statm).
        let sizes = fs::read_to_string(format!("/proc/{}/statm", self.pid))?;
        let pages: u64 =
            sizes.split(' ').next().and_then(|pages| pages.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        self.memory = Some(pages * memory::PAGE_SIZE);
        self.allow_memory(MORE_MEMORY)
    }

    /// Lets the VMM map so many bytes more.
    fn allow_memory(&mut self, bytes: u64) -> io::Result<()> {
        if let Some(memory) = &mut self.memory {
            *memory = memory.saturating_add(bytes);
            let memory = *memory;
            self.limit(Resource::As, memory)?;
            self.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.allow_memory(memory))?;
        }
        Ok(())
    }

    /// Lets the VMM's files become as large as this disk, which a client has named or changed.
    fn allow_disk(&mut self, path: Option<&Path>) -> io::Result<()> {
        match path {
            Some(path) => self.allow_files(fs::metadata(path)?.len()),
            None => {
                self.looks = self.looks.saturating_add(1);
                Ok(())
            }
        }
    }

    /// Lets the VMM's files become so large, in bytes.
    fn allow_files(&mut self, bytes: u64) -> io::Result<()> {
        self.largest_disk = self.largest_disk.max(bytes);
        self.limit_files()
    }

    /// Once the guest runs: a VMM cannot fill the host's disks by what it has open.
    fn limit_files(&self) -> io::Result<()> {
        let Some(memory) = self.memory else { return Ok(()) };
        let largest = self.largest_disk.max(memory);
        // Images have tables besides.
        let limit = largest.saturating_add(largest / 64).saturating_add(MORE_FILE);
        self.limit(Resource::Fsize, limit)
    }

    /// Limits something, within the limits that there are already. Only the lower one is set, which the VMM cannot change: who
    /// is not root could not raise the other one again.
    fn limit(&self, resource: Resource, limit: u64) -> io::Result<()> {
        let Rlimit { current, maximum } = getrlimit(resource);
        let current = current.map_or(limit, |current| current.min(limit));
        let limit = Rlimit { current: Some(current), maximum };
        Ok(prlimit(Pid::from_raw(self.pid), resource, limit).map(drop)?)
    }

    fn check(&mut self, right: Right) -> io::Result<()> {
        if self.policy.allows(right) {
            return Ok(());
        }
        let why = "the jail does not allow it: nobody has named it to this VM";
        Err(io::Error::other(why))
    }

    /// A snapshot names files and networks, of which the process that restores it is to have what this VM has, and no more.
    fn check_what_is_saved(&self, deed: &Deed) -> io::Result<()> {
        let is_in_order = |saved: &SavedVm| self.policy.check_saved(saved);
        match deed {
            Deed::Place { from, .. } => {
                write_anew(&from.join(CONFIG), |text| Ok(serde_json::from_slice(text)?), is_in_order)
            }
            Deed::ReplaceState { from, .. } => write_anew(from, config_of_state, is_in_order),
            _ => Ok(()),
        }
    }

    fn give(&mut self, ask: Ask, mut received: Received) -> io::Result<(Given, Vec<OwnedFd>)> {
        let host = OpenDirectly;
        let done = |fd: OwnedFd| Ok((Given::Done, vec![fd]));
        match ask {
            Ask::Open(file) => {
                self.check(Right::Open(file.clone()))?;
                let opened = host.open(&file)?;
                if matches!(file, HostFile::Disk { .. }) && self.looks > 0 {
                    self.looks -= 1;
                    self.allow_files(opened.metadata()?.len())?;
                }
                if let HostFile::Disk { path, .. } = &file
                    && let Some(Err(error)) = self.cgroup.as_ref().map(|cgroup| cgroup.limit_disk(&opened))
                {
                    tracing::warn!("the limit of disks does not hold where {} is: {error}", path.display());
                }
                done(opened.into())
            }
            // No more than it has already. What /proc has depends on who opens it.
            Ask::OpenAgain { read_only } => done(host.open_again(&regular(received.fd()?)?, read_only)?.into()),
            Ask::Perform(deed) => {
                self.check(Right::Perform(deed.clone()))?;
                self.check_what_is_saved(&deed)?;
                host.perform(&deed)?;
                self.policy.done(&deed);
                Ok((Given::Done, Vec::new()))
            }
            Ask::Link(path) => {
                self.check(Right::Link(path.clone()))?;
                let file = regular(received.fd()?)?;
                if !never_changes(&file)? {
                    return Err(io::Error::other("the jail does not allow it: the file may be written to"));
                }
                host.link(&file, &path)?;
                Ok((Given::Done, Vec::new()))
            }
            Ask::Canonical(path) => {
                self.check(Right::Canonical(path.clone()))?;
                Ok((Given::Path(host.canonical(&path)?), Vec::new()))
            }
            Ask::JoinTap { name, several } => {
                self.check(Right::JoinTap(name.clone()))?;
                Ok(match host.join_tap(&name, several) {
                    Ok(TapQueue { file, mtu }) => (Given::Tap(mtu), vec![file.into()]),
                    Err(error) => (Given::TapFailed(error), Vec::new()),
                })
            }
            Ask::StartPasst { network, mtu } => {
                self.check(Right::StartPasst(network.clone()))?;
                self.make_room_for(&network);
                Ok(match passt::spawn(&network, mtu) {
                    Ok(passt::Process { socket, complaints, child }) => {
                        let id = child.as_ref().map(Child::id);
                        self.helpers.extend(child.map(|child| Helper { network, child }));
                        if let (Some(id), Some(cgroup)) = (id, &self.cgroup) {
                            cgroup.add(id)?;
                        }
                        (Given::Done, vec![socket.into(), complaints.into()])
                    }
                    Err(error) => (Given::PasstFailed(error), Vec::new()),
                })
            }
            Ask::Listen(path) => {
                self.check(Right::Listen(path.clone()))?;
                done(host.listen(&path)?.into())
            }
            Ask::Connect(path) => {
                self.check(Right::Connect(path.clone()))?;
                let Peer { socket, process } = host.connect(&path)?;
                Ok((Given::Done, std::iter::once(socket.into()).chain(process).collect()))
            }
            Ask::FindKernelByFile => {
                let file = regular(received.fd()?)?;
                Ok(kernel(self.kernels().and_then(|kernels| kernels.find_by_file(&file))))
            }
            Ask::LetGo(right) => {
                self.policy.let_go(&right);
                Ok((Given::Done, Vec::new()))
            }
            Ask::Ending => Ok((Given::Done, Vec::new())),
            ask if self.policy.is_frozen() => {
                Err(io::Error::other(format!("the jail does not allow it once the guest runs: {ask:?}")))
            }
            Ask::FindKernel(key) => Ok(kernel(self.kernels().and_then(|kernels| kernels.find(&key.checked()?)))),
            Ask::KeepKernel(key) => {
                let file = regular(received.fd()?)?;
                let key = key.checked().ok_or(io::ErrorKind::InvalidInput)?;
                match self.kernels().is_some_and(|kernels| kernels.insert(&key, &file)) {
                    true => Ok((Given::Done, Vec::new())),
                    false => Ok((Given::Nothing, Vec::new())),
                }
            }
            Ask::RememberKernel(key) => {
                let file = regular(received.fd()?)?;
                if let (Some(kernels), Some(key)) = (self.kernels(), key.checked()) {
                    kernels.remember(&file, &key);
                }
                Ok((Given::Done, Vec::new()))
            }
            Ask::Freeze(Disks { drives, largest }) => {
                self.policy.freeze(drives);
                self.most_helpers = self.helpers.len();
                self.largest_disk = self.largest_disk.max(largest);
                self.limit_memory()?;
                self.limit_files()?;
                Ok((Given::Done, Vec::new()))
            }
            Ask::Started | Ask::KeepSize(_) | Ask::Ended { .. } => Ok((Given::Nothing, Vec::new())),
        }
    }

    /// The user's cache, which nobody looks for before it is of use.
    fn kernels(&mut self) -> Option<Arc<dyn UnpackedKernels>> {
        self.kernels.get_or_insert_with(|| OpenDirectly.kernel_cache().open()).clone()
    }

    /// Once the guest runs, a network is started again only in place of one: the card has let go of that.
    fn make_room_for(&mut self, network: &UserNetwork) {
        if self.policy.is_frozen() && self.helpers.len() >= self.most_helpers {
            let before = self.helpers.iter().position(|helper| helper.network == *network);
            if before.unwrap_or(0) < self.helpers.len() {
                self.helpers.remove(before.unwrap_or(0)).end();
            }
        }
    }

    /// Takes leave of helpers that have ended.
    fn reap(&mut self) {
        self.helpers.retain_mut(|helper| matches!(helper.child.try_wait(), Ok(None)));
    }
}

impl AsFd for Parent {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        self.helpers.iter_mut().for_each(Helper::end);
    }
}

fn kernel(found: Option<(File, u64)>) -> (Given, Vec<OwnedFd>) {
    found.map_or((Given::Nothing, Vec::new()), |(file, bytes)| (Given::Kernel(bytes), vec![file.into()]))
}

/// A file of the VMM's that is one: a regular file, a block device or memory.
fn regular(fd: OwnedFd) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    let file = File::from(fd);
    let kind = file.metadata()?.file_type();
    let is_of_proc = rustix::fs::fstatfs(&file)?.f_type == rustix::fs::PROC_SUPER_MAGIC;
    let is_one = (kind.is_file() && !is_of_proc) || kind.is_block_device();
    if is_one { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// May nobody write to a file, nor whoever has it open so?
fn never_changes(file: &File) -> io::Result<bool> {
    let is_only_read = rustix::fs::fcntl_getfl(file)? & OFlags::RWMODE == OFlags::RDONLY;
    Ok(is_only_read && file.metadata()?.mode() & 0o222 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use crate::backend::descriptors;
    use crate::control::Drives;

    fn parent() -> (Parent, OwnedFd) {
        let sockets = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = sockets.unwrap();
        let mut parent = Parent::new(ours, std::process::id() as i32, Policy::default(), None);
        parent.policy.freeze(Drives::new());
        (parent, theirs)
    }

    #[test]
    fn what_may_be_written_to_is_not_linked_nor_what_proc_has_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "x").unwrap();
        let open = |write| File::options().read(true).write(write).open(&path).unwrap();
        assert!(!never_changes(&open(false)).unwrap());
        let writable = open(true);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        assert!(!never_changes(&writable).unwrap() && never_changes(&open(false)).unwrap());
        assert!(regular(open(false).into()).is_ok());
        assert!(regular(File::open("/proc/self/status").unwrap().into()).is_err());
    }

    /// Asks as a VMM does, and hears what comes.
    fn ask(parent: &mut Parent, vmm: &OwnedFd, ask: &Ask) -> Given {
        wire::send(vmm, ask, &[], SendFlags::empty()).unwrap();
        assert_eq!(parent.serve(), News::Nothing);
        wire::receive(vmm).unwrap().unwrap().parse().unwrap()
    }

    /// A snapshot is written by the VMM, and restored by somebody who may open more than it.
    #[test]
    fn a_snapshot_has_nothing_that_its_vm_has_not() {
        let (mut parent, vmm) = parent();
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("snap");
        parent.policy =
            Policy::knowing(vec![Right::Open(HostFile::Disk { path: "/its/disk".into(), read_only: true })]);
        parent.policy.freeze(Drives::new());
        let request = serde_json::json!({ "path": place, "disks": false });
        parent.policy.hear(&Call::Snapshot(serde_json::from_value(request).unwrap()));
        let partial = dir.path().join(".snap.partial");
        fs::create_dir(&partial).unwrap();
        let config = |path: &str, read_only| {
            let disk = serde_json::json!({ "path": path, "read-only": read_only });
            let disks = [serde_json::json!({ "name": "d", "stored": false, "config": disk })];
            let saved =
                serde_json::json!({ "cpus": 1, "memory": "64M", "transport": "pci", "disks": disks, "nics": [] });
            fs::write(partial.join(CONFIG), saved.to_string()).unwrap();
        };
        let placed = Ask::Perform(Deed::Place { from: partial.clone(), to: place.clone() });
        for (path, read_only) in [("/etc/shadow", true), ("/its/disk", false)] {
            config(path, read_only);
            let given = ask(&mut parent, &vmm, &placed);
            assert!(matches!(&given, Given::Failed(why) if why.to_string().contains(path)), "{given:?}");
            assert!(!place.exists());
        }
        config("/its/disk", true);
        let theirs = File::options().write(true).open(partial.join(CONFIG)).unwrap();
        let given = ask(&mut parent, &vmm, &placed);
        assert!(matches!(given, Given::Done), "{given:?}");
        // What the VMM has open is not what lies there.
        assert_ne!(theirs.metadata().unwrap().ino(), fs::metadata(place.join(CONFIG)).unwrap().ino());
    }

    /// A violation is the last that a VMM says, perhaps while another of its threads waits for an answer.
    #[test]
    fn what_was_said_last_is_heard() {
        let (mut parent, vmm) = parent();
        let mut violation = [super::super::seccomp::VIOLATION; super::super::seccomp::VIOLATION_BYTES];
        violation[1..5].copy_from_slice(&(libc::SYS_openat as i32).to_ne_bytes());
        violation[9] = crate::threads::Kind::Api as u8;
        wire::send(&vmm, &Ask::Canonical("/nowhere".into()), &[], SendFlags::empty()).unwrap();
        assert_eq!(parent.serve(), News::Nothing, "its answer is not taken in");
        wire::send(&vmm, &Ask::Canonical("/nowhere".into()), &[], SendFlags::empty()).unwrap();
        descriptors::send(&vmm, &violation, &[], SendFlags::empty()).unwrap();
        drop(vmm);
        assert_eq!(parent.serve(), News::Nothing, "there is nobody to answer");
        assert_eq!(parent.serve(), News::Violation { call: "openat".into(), thread: "api" });
        assert_eq!(parent.serve(), News::HungUp);
    }

    /// A VMM that asks and does not listen must not keep its parent from anything else.
    #[test]
    fn who_takes_no_answers_is_not_talked_to_any_more() {
        let (mut parent, vmm) = parent();
        let ask = Ask::Canonical("/nowhere".into());
        let mut heard = 0;
        loop {
            assert!(heard < 100_000, "it is answered for ever");
            wire::send(&vmm, &ask, &[], SendFlags::DONTWAIT).unwrap();
            match parent.serve() {
                News::Nothing => heard += 1,
                news => break assert_eq!(news, News::HungUp),
            }
        }
        assert!(heard > 0);
    }

    proptest! {
        /// Whatever a VMM says that has been taken over: it is answered, or hung up on.
        #[test]
        fn no_message_does_harm(bytes in proptest::collection::vec(any::<u8>(), 1..200), path: String, kind in 0..6) {
            let (mut parent, vmm) = parent();
            let text = format!(
                "{}",
                match kind {
                    0 => serde_json::json!({"Open": {"BootFile": path}}),
                    1 => serde_json::json!({"Open": {"Disk": {"path": path, "read_only": false}}}),
                    2 => serde_json::json!({"OpenAgain": {"read_only": false}}),
                    3 => serde_json::json!({"Connect": path}),
                    4 => serde_json::json!({"JoinTap": {"name": path, "several": true}}),
                    _ => serde_json::json!("FindKernelByFile"),
                }
            );
            for message in [&bytes[..], text.as_bytes()] {
                descriptors::send(&vmm, message, &[], SendFlags::empty()).unwrap();
                match parent.serve() {
                    News::Nothing => {
                        let answer = wire::receive(&vmm).unwrap().unwrap();
                        prop_assert!(answer.fds.is_empty(), "{answer:?}");
                        prop_assert!(matches!(answer.parse::<Given>().unwrap(), Given::Failed(_)), "{answer:?}");
                    }
                    News::HungUp | News::NotJailed(_) | News::Violation { .. } => {}
                    news => prop_assert!(false, "{news:?}"),
                }
            }
        }
    }
}
