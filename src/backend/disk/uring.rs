//! A raw disk through io_uring: many transfers at a time, which the kernel completes in any order.
//!
//! ```text
//!   begin ──▶ slot, submission queue ── submit ──▶ kernel ──▶ completion queue ── complete ──▶ tag, result
//!               ▲                                                    │
//!               └────────────── the rest of a short transfer ────────┘
//! ```
//!
//! A ring is made and restricted before any right is taken away. From then on it takes `READV`, `WRITEV` and `FSYNC` on
//! its one registered file and nothing else; all that can be registered with it is another file in the place of that. So a
//! process that may not make rings any more goes on with those that it has: they change disks when one is done with.

#![expect(unsafe_code, reason = "the kernel is handed guest memory that it uses after the call has returned")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};

use super::{Disk, DiskError};
use crate::memory::IoBuf;

/// The disk among the ring's registered files.
const FILE: Fixed = Fixed(0);

/// Transfers at a time of the rings that are kept.
pub const DEPTH: u16 = 128;

/// Rings that no disk has, once they are the last ones to be had.
static KEPT: Mutex<Option<Vec<IoUring>>> = Mutex::new(None);

fn kept() -> std::sync::MutexGuard<'static, Option<Vec<IoUring>>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes so many rings that disks may have later: no more are made from now on.
pub fn make_last_rings(spare: usize) {
    // Without io_uring, disks do without.
    let rings = (0..spare).map_while(|_| blank(DEPTH.into()).ok());
    *kept() = Some(rings.collect());
}

/// A ring as a VMM has it that has been taken over.
#[cfg(debug_assertions)]
pub fn kept_ring() -> Option<IoUring> {
    kept().as_mut().and_then(Vec::pop)
}

/// What to do with a transfer's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill them from the disk.
    Read,
    /// Write them to the disk.
    Write,
    /// Put everything written before on stable storage. There are no buffers.
    Flush,
}

/// One transfer in flight.
struct Slot<T> {
    operation: Operation,
    /// What is left to transfer, and where. Not touched between `begin` and the completion: the kernel has it.
    buf: IoBuf,
    offset: u64,
    tag: T,
}

/// A ring over one disk. Each transfer carries a tag of type `T`.
pub struct Uring<T> {
    /// Goes to the next disk when there are no others to be had.
    ring: ManuallyDrop<IoUring>,
    slots: Vec<Option<Slot<T>>>,
    /// Indices of slots that are empty.
    free: Vec<u16>,
    /// Empty buffers, which keep their allocations.
    spare: Vec<IoBuf>,
    disk: Arc<Disk>,
}

impl<T> Uring<T> {
    /// Makes a ring for at most `depth` transfers at a time between guest memory and `file`, which is the disk's,
    /// [opened again](Disk::open_again): the kernel takes a ring apart some time after its process has ended, and
    /// a lock on the file would last as long.
    ///
    /// # Errors
    /// [`DiskError::Uring`] where the kernel has no io_uring or forbids it, [`DiskError::NoRing`] where all rings that
    /// this process may have are in use.
    pub fn new(disk: &Arc<Disk>, file: &File, depth: u16) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Uring { path: disk.path().to_owned(), source };
        let ring = match &mut *kept() {
            Some(rings) => rings.pop().ok_or_else(|| DiskError::NoRing { path: disk.path().to_owned() })?,
            None => blank(depth.into()).map_err(failed)?,
        };
        ring.submitter().register_files_update(FILE.0, &[file.as_raw_fd()]).map_err(failed)?;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            spare: Vec::new(),
            disk: disk.clone(),
        })
    }

    /// Readable when there are completions.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Transfers begun and not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Prepares a transfer, which the kernel sees at the next [`Self::submit`]. Takes the contents of `buf`, and
    /// leaves an empty one.
    ///
    /// # Panics
    /// If there is no room.
    pub fn begin(&mut self, operation: Operation, buf: &mut IoBuf, offset: u64, tag: T) {
        let at = self.free.pop().expect("the caller has asked for room");
        let empty = self.spare.pop().unwrap_or_else(|| buf.another());
        let buf = std::mem::replace(buf, empty);
        self.slots[usize::from(at)] = Some(Slot { operation, buf, offset, tag });
        self.push(at);
    }

    /// Puts what is left of a slot's transfer into the submission queue.
    fn push(&mut self, at: u16) {
        let slot = self.slots[usize::from(at)].as_ref().expect("a slot in use");
        let (vecs, count) = slot.buf.vectors();
        let entry: Entry = match slot.operation {
            Operation::Read => opcode::Readv::new(FILE, vecs, count).offset(slot.offset).build(),
            Operation::Write => opcode::Writev::new(FILE, vecs, count).offset(slot.offset).build(),
            Operation::Flush => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        };
        let entry = entry.user_data(at.into());
        // SAFETY: the vectors and the guest memory behind them belong to the slot, which nobody touches before
        // the kernel is done with it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has an entry for each slot");
    }

    /// Hands everything begun to the kernel, and lets it finish what it has deferred to this thread.
    pub fn submit(&mut self) {
        loop {
            let queue = self.ring.submission();
            let wanted = !queue.is_empty() || queue.taskrun();
            drop(queue);
            if !wanted {
                return;
            }
            self.enter(0);
        }
    }

    fn enter(&self, wait_for: usize) {
        match self.ring.submit_and_wait(wait_for) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The host is out of memory for requests: that passes, and there is nothing else to do meanwhile.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(error) => unreachable!("io_uring_enter on our own ring: {error}"),
        }
    }

    /// The next transfer that has come to its end, and how. Short ones go on by themselves, after the next
    /// [`Self::submit`].
    pub fn complete(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let at = entry.user_data() as u16;
            let slot = self.slots[usize::from(at)].as_mut().expect("the kernel completes what it was given");
            if let Some(result) = slot.advance(entry.result(), &self.disk) {
                let mut slot = self.slots[usize::from(at)].take().expect("it was there just now");
                self.free.push(at);
                slot.buf.clear();
                self.spare.push(slot.buf);
                return Some((slot.tag, result));
            }
            self.push(at);
        }
    }

    /// Waits until there is something to [`Self::complete`], if anything is in flight: for the disk, however long
    /// that takes.
    pub fn wait(&mut self) {
        self.submit();
        if self.in_flight() > 0 && self.ring.completion().is_empty() {
            self.enter(1);
        }
    }

    /// Lets go of the guest's memory.
    ///
    /// # Panics
    /// If anything is in flight.
    pub fn release(&mut self) {
        assert_eq!(self.in_flight(), 0);
        self.spare = Vec::new();
    }
}

impl<T> Drop for Uring<T> {
    /// Waits for what is in flight: the kernel may write to guest memory until then.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            self.wait();
            while self.complete().is_some() {}
        }
        // SAFETY: nobody uses it after this.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if let Some(rings) = &mut *kept()
            && ring.submitter().register_files_update(FILE.0, &[-1]).is_ok()
        {
            rings.push(ring);
        }
    }
}

impl<T> Slot<T> {
    /// Takes in what the kernel says; `None` if there is more to do.
    fn advance(&mut self, result: i32, disk: &Disk) -> Option<io::Result<()>> {
        let n = match usize::try_from(result) {
            Ok(n) => n,
            Err(_) => match -result {
                libc::EINTR => return None,
                // It would have to wait and has no other way to.
                libc::EAGAIN => return Some(self.finish(disk)),
                errno => return Some(Err(io::Error::from_raw_os_error(errno))),
            },
        };
        match self.operation {
            Operation::Flush => return Some(Ok(())),
            Operation::Read => self.buf.mark_dirty(n),
            Operation::Write => {}
        }
        if n == 0 && !self.buf.is_empty() {
            return Some(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.buf.trim_front(n);
        self.offset += n as u64;
        self.buf.is_empty().then_some(Ok(()))
    }

    /// Does what is left, waiting for it.
    fn finish(&mut self, disk: &Disk) -> io::Result<()> {
        match self.operation {
            Operation::Read => disk.read(&mut self.buf, self.offset, None),
            Operation::Write => disk.write(&mut self.buf, self.offset, None),
            Operation::Flush => disk.flush(),
        }
    }
}

/// Makes a ring with room for one file that takes what [`Operation`] needs and nothing else.
fn blank(entries: u32) -> io::Result<IoUring> {
    /// `IORING_REGISTER_FILES_UPDATE` (Linux, uapi/linux/io_uring.h).
    const FILES_UPDATE: u8 = 6;
    let ring = build(entries)?;
    let submitter = ring.submitter();
    submitter.register_files(&[-1])?;
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        Restriction::register_op(FILES_UPDATE),
    ])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// Makes a ring, disabled as yet. Its completions do not interrupt its thread at work, from Linux 5.19 on; Linux
/// 5.10 is the least that will do.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled();
    match builder.clone().setup_coop_taskrun().setup_taskrun_flag().build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder.build(entries),
        result => result,
    }
}

/// What the user may do about a ring that cannot be had.
pub(super) fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has none, or a container hides it: give engine=sync",
        Some(libc::EPERM | libc::EACCES) => {
            "the administrator allows it with 'sysctl kernel.io_uring_disabled=0', unless a seccomp filter forbids it; else give engine=sync"
        }
        Some(libc::EINVAL) => "it takes Linux 5.10 or newer: give engine=sync",
        Some(libc::ENOMEM) => "raise the limit of locked memory ('ulimit -l'), or give engine=sync",
        _ => "give engine=sync",
    }
}
