//! The parent of a jailed VMM: does what it asks for, as far as its policy goes.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::Cgroup;
use super::policy::Policy;
use super::seccomp::read_violation;
use super::wire::{self, Ask, Given, Received};
use crate::backend::disk::qcow2::header::MAGIC;
use crate::backend::host::Peer;
use crate::backend::kernel_cache::UnpackedKernels;
use crate::backend::tap::TapQueue;
use crate::backend::{HostFile, HostFiles, OpenDirectly, Right, passt};
use crate::memory;

/// How much more memory a VMM may map once its guest runs, in bytes: threads, buffers, devices that are plugged in.
const MORE_MEMORY: u64 = 256 << 20;

/// How much larger a file may become than the largest of its disks and than its memory, in bytes: logs, a console's
/// output, what a snapshot has besides.
const MORE_FILE: u64 = 1 << 30;

/// The parent's end.
pub struct Parent {
    socket: OwnedFd,
    pid: i32,
    /// Bytes of address space that the VMM may have, once its guest runs.
    memory: Option<u64>,
    /// Bytes of its largest disk.
    largest_disk: u64,
    pub policy: Policy,
    /// What runs for the VM; ends with it.
    helpers: Vec<Child>,
    kernels: Option<Option<Arc<dyn UnpackedKernels>>>,
    /// Dropped last: who is in it is gone then.
    cgroup: Option<Cgroup>,
}

/// What a message was, besides something that has been done.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    Nothing,
    /// The VM runs.
    Started,
    KeepSize {
        cpus: u8,
        memory: u64,
    },
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
        Self { socket, pid, memory: None, largest_disk: 0, policy, helpers: Vec::new(), kernels: None, cgroup }
    }

    /// Has the host's kernel ended the VMM, as it took more memory than it may?
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)
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
            Ask::KeepSize { cpus, memory } => News::KeepSize { cpus, memory },
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
        // Who is gone does not take it in, but may have said something before: that is read, and then its end.
        let _ = wire::send(&self.socket, given, &fds);
        News::Nothing
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
    ///
    /// # Errors
    /// The host's.
    pub fn allow_memory(&mut self, bytes: u64) -> io::Result<()> {
        if let Some(memory) = &mut self.memory {
            *memory = memory.saturating_add(bytes);
            let memory = *memory;
            self.limit(Resource::As, memory)?;
            self.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.allow_memory(memory))?;
        }
        Ok(())
    }

    /// Lets the VMM's files become as large as this disk, which a client has named or changed.
    ///
    /// # Errors
    /// The host's.
    pub fn allow_disk(&mut self, path: &Path) -> io::Result<()> {
        // Whatever it is: it may be a pipe that nobody writes to.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => self.allow_file(&File::from(file)),
            // The VMM will hear of it.
            Err(_) => Ok(()),
        }
    }

    fn allow_file(&mut self, disk: &File) -> io::Result<()> {
        self.largest_disk = self.largest_disk.max(size_of_disk(disk)?);
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

    fn give(&mut self, ask: Ask, mut received: Received) -> io::Result<(Given, Vec<OwnedFd>)> {
        let host = OpenDirectly;
        let done = |fd: OwnedFd| Ok((Given::Done, vec![fd]));
        match ask {
            Ask::Open(file) => {
                self.check(Right::Open(file.clone()))?;
                let opened = host.open(&file)?;
                if let HostFile::Disk { path, .. } = &file {
                    self.allow_file(&opened)?;
                    if let Some(Err(error)) = self.cgroup.as_ref().map(|cgroup| cgroup.limit_disk(&opened)) {
                        tracing::warn!("the limit of disks does not hold where {} is: {error}", path.display());
                    }
                }
                done(opened.into())
            }
            // No more than it has already.
            Ask::OpenAgain { read_only } => done(host.open_again(&regular(received.fd()?)?, read_only)?.into()),
            Ask::Perform(deed) => {
                self.check(Right::Perform(deed.clone()))?;
                host.perform(&deed)?;
                self.policy.done(&deed);
                Ok((Given::Done, Vec::new()))
            }
            Ask::Link(path) => {
                self.check(Right::Link(path.clone()))?;
                host.link(&regular(received.fd()?)?, &path)?;
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
                Ok(match passt::spawn(&network, mtu) {
                    Ok(passt::Process { socket, complaints, child }) => {
                        if let (Some(child), Some(cgroup)) = (&child, &self.cgroup) {
                            cgroup.add(child.id())?;
                        }
                        self.helpers.extend(child);
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
            Ask::Freeze => {
                self.policy.freeze();
                self.limit_memory()?;
                self.limit_files()?;
                Ok((Given::Done, Vec::new()))
            }
            Ask::Started | Ask::KeepSize { .. } | Ask::Ended { .. } => Ok((Given::Nothing, Vec::new())),
        }
    }

    /// The user's cache, which nobody looks for before it is of use.
    fn kernels(&mut self) -> Option<Arc<dyn UnpackedKernels>> {
        self.kernels.get_or_insert_with(|| OpenDirectly.kernel_cache().open()).clone()
    }

    /// Takes leave of helpers that have ended.
    fn reap(&mut self) {
        self.helpers.retain_mut(|helper| matches!(helper.try_wait(), Ok(None)));
    }
}

impl AsFd for Parent {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for helper in &mut self.helpers {
            let _ = helper.kill();
            let _ = helper.wait();
        }
    }
}

/// How large a disk is, or may become.
fn size_of_disk(file: &File) -> io::Result<u64> {
    let meta = file.metadata()?;
    if !meta.is_file() {
        // One whose size is not that of a file.
        return Ok(0);
    }
    // Of a qcow2 image, what its header says: a magic number, a version, three numbers of 4 and 8 bytes, the size.
    let mut header = [0; 32];
    let is_image = file.read_exact_at(&mut header, 0).is_ok() && header.starts_with(&MAGIC);
    let size = if is_image { u64::from_be_bytes(header[24..].try_into().unwrap_or_default()) } else { 0 };
    Ok(meta.len().max(size))
}

fn kernel(found: Option<(File, u64)>) -> (Given, Vec<OwnedFd>) {
    found.map_or((Given::Nothing, Vec::new()), |(file, bytes)| (Given::Kernel(bytes), vec![file.into()]))
}

/// A file of the VMM's that is one: a regular file, a block device or memory.
fn regular(fd: OwnedFd) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    let file = File::from(fd);
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

    use crate::backend::descriptors;

    fn parent() -> (Parent, OwnedFd) {
        let sockets = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = sockets.unwrap();
        let mut parent = Parent::new(ours, std::process::id() as i32, Policy::default(), None);
        parent.policy.freeze();
        (parent, theirs)
    }

    #[test]
    fn a_disk_is_as_large_as_its_guest_sees_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        assert_eq!(size_of_disk(&file).unwrap(), 5000);
        file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        file.write_all_at(&(1u64 << 40).to_be_bytes(), 24).unwrap();
        assert_eq!(size_of_disk(&file).unwrap(), 1 << 40);
        file.set_len(20).unwrap();
        assert_eq!(size_of_disk(&file).unwrap(), 20);
    }

    /// A violation is the last that a VMM says, perhaps while another of its threads waits for an answer.
    #[test]
    fn what_was_said_last_is_heard() {
        let (mut parent, vmm) = parent();
        let mut violation = [super::super::seccomp::VIOLATION; super::super::seccomp::VIOLATION_BYTES];
        violation[1..5].copy_from_slice(&(libc::SYS_openat as i32).to_ne_bytes());
        violation[9] = crate::threads::Kind::Api as u8;
        wire::send(&vmm, &Ask::Canonical("/nowhere".into()), &[]).unwrap();
        assert_eq!(parent.serve(), News::Nothing, "its answer is not taken in");
        wire::send(&vmm, &Ask::Canonical("/nowhere".into()), &[]).unwrap();
        descriptors::send(&vmm, &violation, &[], SendFlags::empty()).unwrap();
        drop(vmm);
        assert_eq!(parent.serve(), News::Nothing, "there is nobody to answer");
        assert_eq!(parent.serve(), News::Violation { call: "openat".into(), thread: "api" });
        assert_eq!(parent.serve(), News::HungUp);
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
