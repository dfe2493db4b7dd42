//! Where a running device's disk is put in, and another one instead of it.
//!
//! ```text
//!   change ──▶ each queue's thread: requests in flight end, the new disk serves what comes next
//!                 └─ the last of them: the new capacity, the driver is told, the old disk is flushed and let go
//! ```
//! So the driver hears of the new disk when all its queues are on it, and nobody waits for a request that hangs.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::sync::SyncEngine;
use super::{Config, ID_BYTES, Rings};
use crate::backend::disk::SECTOR;
use crate::backend::{Disk, Limiter};
use crate::config::CacheMode;
use crate::devices::front::DeviceConfig;
use crate::devices::worker::{Engine, Line};
use crate::virtio::device::read_config_bytes;
use crate::virtio::{DeviceEvents, DeviceKind, OwnStateV1, StateError};

/// The configuration space, in which the capacity may change.
pub(super) struct BlockConfig {
    fixed: Config,
    /// In sectors.
    capacity: AtomicU64,
}

impl DeviceConfig for Arc<BlockConfig> {
    fn read(&self, offset: usize, data: &mut [u8]) {
        let config = Config { capacity: self.capacity.load(Ordering::Acquire).into(), ..self.fixed };
        read_config_bytes(config.as_bytes(), offset, data);
    }

    fn save(&self, _offered: u64) -> OwnStateV1 {
        let state = BlockStateV1 { capacity: self.capacity.load(Ordering::Acquire) };
        OwnStateV1::new(DeviceKind::Block, STATE_VERSION, &state)
    }

    /// A disk may have grown: the driver is told then.
    fn check(&self, own: &OwnStateV1, _offered: u64, _accepted: u64) -> Result<(), StateError> {
        let BlockStateV1 { capacity } = own.parse(DeviceKind::Block, STATE_VERSION)?;
        let ours = self.capacity.load(Ordering::Acquire);
        if ours < capacity {
            let problem = format!("the guest's disk has {capacity} sectors, and there are only {ours}");
            return Err(StateError::new("state.capacity", problem));
        }
        Ok(())
    }

    fn restore(&self, own: &OwnStateV1) -> io::Result<bool> {
        let saved: BlockStateV1 = own.parse(DeviceKind::Block, STATE_VERSION).map_err(io::Error::other)?;
        Ok(saved.capacity != self.capacity.load(Ordering::Acquire))
    }
}

const STATE_VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockStateV1 {
    /// What the driver can read, in sectors.
    pub capacity: u64,
}

/// All that a device's engines have in common, but for the disk.
pub struct Tray {
    name: String,
    id: [u8; ID_BYTES],
    cache: CacheMode,
    limiter: Arc<Limiter>,
    config: Arc<BlockConfig>,
    /// To each queue's thread, in the order of the queues.
    lines: Vec<Line>,
}

impl Tray {
    pub(super) fn new(
        name: String,
        id: [u8; ID_BYTES],
        cache: CacheMode,
        limiter: Arc<Limiter>,
        config: Config,
    ) -> Self {
        let config = BlockConfig { fixed: config, capacity: AtomicU64::new(config.capacity.get()) };
        Self { name, id, cache, limiter, config: Arc::new(config), lines: Vec::new() }
    }

    pub(super) fn config(&self) -> Arc<BlockConfig> {
        self.config.clone()
    }

    /// One more queue is there.
    pub(super) fn serve(&mut self, line: Line) {
        self.lines.push(line);
    }

    pub(super) fn engine(&self, index: u16, disk: &Arc<Disk>, rings: &mut Rings) -> Box<dyn Engine> {
        let sync = SyncEngine::new(self.name.clone(), disk.clone(), self.id, self.cache, self.limiter.clone());
        rings.engine(index, sync)
    }

    /// Puts in `new`, which is as writable as the old one, with rings for all queues or none. Does not wait until all
    /// queues are on it; `told` is called then.
    pub fn change(
        &self,
        old: Arc<Disk>,
        new: &Arc<Disk>,
        mut rings: Rings,
        events: Arc<dyn DeviceEvents>,
        told: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Change> {
        let change = Arc::new(Change {
            queues_left: AtomicUsize::new(self.lines.len()),
            config: self.config.clone(),
            capacity: new.bytes() / SECTOR,
            events,
            flush: self.cache == CacheMode::Writeback && !old.read_only(),
            old: Mutex::new(Some(old)),
            done: Mutex::new(false),
            finished: Condvar::new(),
            told,
        });
        for (index, line) in (0..).zip(&self.lines) {
            let moved = change.clone();
            let done = Box::new(move || moved.queue_has_moved());
            if line.exchange(self.engine(index, new, &mut rings), done).is_err() {
                // Its thread has ended: nothing of it is left on the old disk.
                change.queue_has_moved();
            }
        }
        change
    }
}

/// Another disk on its way into a device.
pub struct Change {
    queues_left: AtomicUsize,
    config: Arc<BlockConfig>,
    /// In sectors.
    capacity: u64,
    events: Arc<dyn DeviceEvents>,
    /// Has what was written to the old disk to last?
    flush: bool,
    old: Mutex<Option<Arc<Disk>>>,
    done: Mutex<bool>,
    finished: Condvar,
    told: Box<dyn Fn() + Send + Sync>,
}

impl Change {
    fn queue_has_moved(&self) {
        if self.queues_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish();
        }
    }

    fn finish(&self) {
        self.config.capacity.store(self.capacity, Ordering::Release);
        self.events.config_changed();
        let old = self.old.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(old) = old
            && self.flush
            && let Err(error) = old.flush()
        {
            tracing::error!("disk {}, which was taken out, cannot be flushed: {error}", old.path().display());
        }
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.finished.notify_all();
        (self.told)();
    }

    /// Waits until all queues are on the new disk and the old one is let go, but not for longer than that; tells whether
    /// it is so.
    pub fn is_done_within(&self, patience: Duration) -> bool {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.finished.wait_timeout_while(done, patience, |done| !*done);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}
