//! A driver in miniature: it lays out a ring in guest memory, makes chains available, kicks only when asked to,
//! and looks at the used ring only when interrupted, so that a lost notification is a failed test.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::{Ram, anonymous};
use crate::virtio::{DeviceEvents, QueueLayout, QueueResources, QueueState, VirtioDevice, feature};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const PATIENCE: Duration = Duration::from_secs(5);

/// What the device told its transport.
#[derive(Default)]
pub struct TestEvents {
    interrupts: [AtomicU32; 16],
    config_changes: AtomicU32,
    broken: Mutex<Option<String>>,
    news: Condvar,
}

impl TestEvents {
    pub fn interrupts(&self, queue: u16) -> u32 {
        self.interrupts[usize::from(queue)].load(Ordering::SeqCst)
    }

    pub fn config_changes(&self) -> u32 {
        self.config_changes.load(Ordering::SeqCst)
    }

    pub fn broken(&self) -> Option<String> {
        self.broken.lock().unwrap().clone()
    }

    /// Waits until `happened`; false if that takes too long.
    pub fn wait(&self, mut happened: impl FnMut(&Self, Option<&str>) -> bool) -> bool {
        let broken = self.broken.lock().unwrap();
        let result = self.news.wait_timeout_while(broken, PATIENCE, |broken| !happened(self, broken.as_deref()));
        !result.unwrap().1.timed_out()
    }
}

impl DeviceEvents for TestEvents {
    fn queue_interrupt(&self, queue: u16) {
        let _news = self.broken.lock().unwrap();
        self.interrupts[usize::from(queue)].fetch_add(1, Ordering::SeqCst);
        self.news.notify_all();
    }

    fn config_changed(&self) {
        let _news = self.broken.lock().unwrap();
        self.config_changes.fetch_add(1, Ordering::SeqCst);
        self.news.notify_all();
    }

    fn needs_reset(&self, why: &dyn std::fmt::Display) {
        *self.broken.lock().unwrap() = Some(why.to_string());
        self.news.notify_all();
    }
}

/// Guest memory for one ring, 64 KiB from a base on, and 1 MiB of buffers behind it.
pub fn memory() -> Ram {
    anonymous(&[(GuestAddress(0), 0x20_0000)]).unwrap()
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

pub fn readable(addr: u64, len: u32) -> Buffer {
    Buffer { addr, len, writable: false }
}

pub fn writable(addr: u64, len: u32) -> Buffer {
    Buffer { addr, len, writable: true }
}

pub struct Ring {
    pub ram: Ram,
    pub index: u16,
    pub layout: QueueLayout,
    pub events: Arc<TestEvents>,
    pub features: u64,
    base: u64,
    kick: EventFd,
    /// The available index, and the one of the last kick considered.
    avail: u16,
    kicked: u16,
    /// The used index seen so far.
    seen: u16,
    interrupts: u32,
}

impl Ring {
    pub fn new(ram: &Ram, index: u16, size: u16, features: u64) -> Self {
        let base = u64::from(index) * 0x1_0000;
        ram.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
        Self {
            ram: ram.clone(),
            index,
            layout: QueueLayout { size, descriptors: base, avail: base + 0x1000, used: base + 0x2000 },
            events: Arc::default(),
            features,
            base,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail: 0,
            kicked: 0,
            seen: 0,
            interrupts: 0,
        }
    }

    pub fn resources(&self) -> QueueResources {
        QueueResources {
            ram: self.ram.clone(),
            layout: self.layout,
            features: self.features,
            kick: self.kick.try_clone().unwrap(),
            events: self.events.clone(),
        }
    }

    pub fn start(&self, device: &mut dyn VirtioDevice, state: Option<QueueState>) {
        device.start_queue(self.index, self.resources(), state).unwrap();
    }

    pub fn write_descriptor(&self, addr: u64, target: u64, len: u32, flags: u16, next: u16) {
        let raw = u128::from(target) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.ram.write_obj(raw.to_le(), GuestAddress(addr)).unwrap();
    }

    /// Entry `slot` of the descriptor table.
    pub fn descriptor(&self, slot: u16, target: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor(self.layout.descriptors + 16 * u64::from(slot), target, len, flags, next);
    }

    /// A place for an indirect table of 64 entries; there are 16.
    pub fn table(&self, n: u16) -> u64 {
        self.base + 0x4000 + 0x400 * u64::from(n % 16)
    }

    /// Describes a chain from entry `slot` on, there or in an indirect table.
    pub fn chain(&self, slot: u16, buffers: &[Buffer], indirect: bool) {
        let (table, first) = if indirect { (self.table(slot / 8), 0) } else { (self.layout.descriptors, slot) };
        for (at, buffer) in (first..).zip(buffers) {
            let last = usize::from(at - first) + 1 == buffers.len();
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.write_descriptor(table + 16 * u64::from(at), buffer.addr, buffer.len, flags, at + 1);
        }
        if indirect {
            self.descriptor(slot, table, 16 * buffers.len() as u32, INDIRECT, 0);
        }
    }

    /// Puts a chain in the available ring and shows it to the device.
    pub fn publish(&mut self, head: u16) {
        let at = self.layout.avail + 4 + 2 * u64::from(self.avail % self.layout.size);
        self.ram.write_obj(head.to_le(), GuestAddress(at)).unwrap();
        self.jump(1);
    }

    /// Moves the available index.
    pub fn jump(&mut self, by: u16) {
        self.avail = self.avail.wrapping_add(by);
        self.ram.store(self.avail.to_le(), GuestAddress(self.layout.avail + 2), Ordering::Release).unwrap();
    }

    /// Kicks if the device asked for it.
    pub fn kick(&mut self) {
        if self.wants_kick() {
            self.kick_anyway();
        }
    }

    /// Has the device asked to be kicked for what has come since the last look?
    pub fn wants_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let used = self.layout.used;
        let wanted = if self.features & feature::EVENT_IDX != 0 {
            let event = self.load(used + 4 + 8 * u64::from(self.layout.size));
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(self.kicked)
        } else {
            self.load(used) & 1 == 0
        };
        self.kicked = self.avail;
        wanted
    }

    pub fn kick_anyway(&self) {
        self.kick.write(1).unwrap();
    }

    /// Replaces the eventfd by one that has never been kicked.
    pub fn renew_kick(&mut self) {
        self.kick = EventFd::new(EFD_NONBLOCK).unwrap();
    }

    pub fn load(&self, addr: u64) -> u16 {
        u16::from_le(self.ram.load(GuestAddress(addr), Ordering::Acquire).unwrap())
    }

    pub fn used_index(&self) -> u16 {
        self.load(self.layout.used + 2)
    }

    /// Used entries not seen before: head and bytes written.
    pub fn collect(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.seen != self.used_index() {
            let at = self.layout.used + 4 + 8 * u64::from(self.seen % self.layout.size);
            let raw: u64 = u64::from_le(self.ram.read_obj(GuestAddress(at)).unwrap());
            entries.push((raw as u32, (raw >> 32) as u32));
            self.seen = self.seen.wrapping_add(1);
        }
        entries
    }

    /// Waits for `count` used entries, by interrupts alone.
    pub fn wait_used(&mut self, count: usize) -> Vec<(u32, u32)> {
        let (index, events) = (self.index, self.events.clone());
        let mut heard = self.interrupts;
        let entries = self.wait_used_by(count, || {
            let told = events.wait(|events, broken| events.interrupts(index) != heard || broken.is_some());
            assert_eq!(events.broken(), None);
            heard = events.interrupts(index);
            told
        });
        self.interrupts = heard;
        entries
    }

    /// The same, where `told` waits for an interrupt; false if none comes.
    pub fn wait_used_by(&mut self, count: usize, mut told: impl FnMut() -> bool) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        loop {
            entries.extend(self.collect());
            if entries.len() >= count {
                return entries;
            }
            // Ask for an interrupt at the next entry, then make sure that it has not come already.
            let event = self.layout.avail + 4 + 2 * u64::from(self.layout.size);
            self.ram.store(self.seen.to_le(), GuestAddress(event), Ordering::Relaxed).unwrap();
            fence(Ordering::SeqCst);
            if self.used_index() != self.seen {
                continue;
            }
            let told = told();
            assert!(told || self.used_index() == self.seen, "an interrupt was lost");
            assert!(told, "{} of {count} requests were answered", entries.len());
        }
    }
}
