//! The contract between a device and whatever carries it (a transport, a snapshot, a test).
//!
//! ```text
//!              start_queue(i, resources, None)
//!   ┌───────┐ ────────────────────────────────▶ ┌─────────┐
//!   │ idle  │                                   │ running │──▶ a broken ring: needs_reset(), the queue stays
//!   └───────┘ ◀──────────────────────────────── └─────────┘    silent until it is stopped
//!              stop_queue(i) -> Some(state)
//! ```
//!
//! Boot, pause, save, restore and reset are all these two calls: pausing is stopping every queue and keeping
//! its state, resuming is starting it again from that state, a reset drops the state (and what else the driver
//! has told the device, if there is a way to). A saved device is its queues' states and [`VirtioDevice::save`].

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::state::{OwnStateV1, StateError};
use crate::memory::Ram;

/// Virtio device IDs (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Net = 1,
    Block = 2,
    Rng = 4,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Rng => "rng",
        })
    }
}

/// Where the driver put a queue: guest physical addresses and the number of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueLayout {
    pub size: u16,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
}

/// How far a queue has come: ring indices, as free-running 16-bit counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    pub next_avail: u16,
    pub next_used: u16,
}

/// What a device may tell its transport, from any thread.
pub trait DeviceEvents: Send + Sync {
    /// Raises the interrupt of a queue: there are used buffers.
    fn queue_interrupt(&self, queue: u16);
    /// What raises that interrupt when it is signalled, for a server of the queue that is not in this process.
    /// `None` where an interrupt needs this process.
    fn interrupt_fd(&self, _queue: u16) -> Option<EventFd> {
        None
    }
    /// The device's configuration space has changed.
    fn config_changed(&self);
    /// Does a driver use the device (`DRIVER_OK`)?
    fn driver_is_ready(&self) -> bool {
        false
    }
    /// The driver broke the rules in a way this device cannot go on from: sets `DEVICE_NEEDS_RESET`.
    fn needs_reset(&self, why: &dyn fmt::Display);
}

/// Everything a device needs to serve one queue.
pub struct QueueResources {
    pub ram: Ram,
    pub layout: QueueLayout,
    /// The features the driver accepted.
    pub features: u64,
    /// Readable when the driver has made buffers available.
    pub kick: EventFd,
    pub events: Arc<dyn DeviceEvents>,
}

/// A queue has been asked to stop and has not yet, as its request in hand takes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StillBusy;

/// A virtio device, as seen by a transport. Calls come from one thread at a time.
pub trait VirtioDevice: Send {
    fn kind(&self) -> DeviceKind;

    /// A short name for logs and thread names, such as `block0`.
    fn name(&self) -> &str;

    /// Feature bits the device offers, [`super::feature::RING`] among them.
    fn features(&self) -> u64;

    /// The largest size of each queue; there are as many queues as entries. Powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space. Bytes past its end read as zero (the transport has zeroed `data`).
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes the configuration space; writes to what is read-only or not there are ignored.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Starts serving a queue, from the beginning or from where `state` says it was stopped.
    ///
    /// # Errors
    /// When the rings are not in guest memory, or the device's own thread could not be told. The transport
    /// then sets `DEVICE_NEEDS_RESET`.
    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()>;

    /// Stops a queue after the request in hand. `None` if it was not running.
    fn stop_queue(&mut self, index: u16) -> Option<QueueState>;

    /// The same for whoever cannot wait for ever, as a request may hang with its host.
    ///
    /// # Errors
    /// When the queue has not stopped within `patience`. It will, when its request is done: ask again.
    fn stop_queue_within(&mut self, index: u16, _patience: Duration) -> Result<Option<QueueState>, StillBusy> {
        Ok(self.stop_queue(index))
    }

    /// Takes back a stop that was answered with [`StillBusy`]: the queue goes on as if nobody had asked.
    fn continue_queue(&mut self, _index: u16) {}

    /// The driver resets the device: what it has been told besides its queues, all stopped now, is forgotten.
    fn reset(&mut self) {}

    /// What it has been told besides its queues.
    fn save(&self) -> OwnStateV1;

    /// Could it go on from that, under a driver that has accepted `features`? Changes nothing.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&self, state: &OwnStateV1, features: u64) -> Result<(), StateError>;

    /// Goes on from a state that has been checked; its queues are started later. `true` if the driver finds another
    /// configuration space than before.
    ///
    /// # Errors
    /// The host's.
    fn restore(&mut self, state: &OwnStateV1) -> io::Result<bool>;
}

/// Copies the part of `config` that an access of `data.len()` bytes at `offset` sees.
pub fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    if let Some(rest) = config.get(offset..) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}
