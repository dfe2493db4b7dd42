//! What all transports share: the device status machine, feature negotiation, the queues' registers.
//!
//! ```text
//! reset ──▶ ACKNOWLEDGE ──▶ DRIVER ──▶ FEATURES_OK ──▶ DRIVER_OK (queues run)
//!   ▲                                                      │
//!   └──────────────── status = 0, from any state ──────────┘
//! ```
//! (virtio 1.2, 2.1 and 3.1.)
//!
//! A queue stops after its request in hand, and that may hang with its host. A register access waits for it only so
//! long; then the status reads as it was until the reset is done, and everything else that is written is ignored
//! (2.4.1: a driver waits until it reads 0).

pub mod state;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{DeviceEvents, QueueLayout, QueueResources, QueueState, StillBusy, VirtioDevice};
use super::feature;
use crate::memory::Ram;

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
    pub const FAILED: u8 = 0x80;
    pub const ALL: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The part of a device's registers that its own threads change too.
#[derive(Default)]
pub struct SharedRegisters {
    status: AtomicU8,
    generation: AtomicU8,
    isr: AtomicU8,
}

impl SharedRegisters {
    /// The configuration space has changed: a driver that reads it in parts notices by this number.
    pub fn bump_generation(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    pub fn driver_is_ready(&self) -> bool {
        self.status.load(Ordering::Acquire) & status::DRIVER_OK != 0
    }

    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    pub fn set_isr(&self, bits: u8) {
        self.isr.fetch_or(bits, Ordering::AcqRel);
    }

    /// Clears bits, and returns those that were set before.
    pub fn clear_isr(&self, bits: u8) -> u8 {
        self.isr.fetch_and(!bits, Ordering::AcqRel)
    }

    /// Sets `DEVICE_NEEDS_RESET`; `true` if it was not set.
    pub fn mark_needs_reset(&self) -> bool {
        self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel) & status::NEEDS_RESET == 0
    }
}

/// How long one access waits for queues to stop: longer than any request takes whose host is well, so that also
/// drivers that do not wait find the device reset. The vCPU is not in the guest meanwhile.
const PATIENCE: Duration = Duration::from_millis(100);

/// What the device does with a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    None,
    Running,
    /// Asked to stop.
    Stopping,
    /// The VM is suspended: asked to stop, and to go on later. Drivers see no difference to a running queue.
    Resting,
    /// It has stopped here.
    AtRest(QueueState),
}

/// The registers of one queue.
pub struct QueueRegisters {
    pub layout: QueueLayout,
    enabled: bool,
    max_size: u16,
    service: Service,
    /// Written by the driver's notification, read by the device.
    pub kick: EventFd,
}

impl QueueRegisters {
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// A queue is ready until it has stopped.
    pub fn is_ready(&self) -> bool {
        self.enabled || self.service == Service::Stopping
    }
}

/// A device and its registers, without an address.
pub struct VirtioCore {
    device: Box<dyn VirtioDevice>,
    ram: Ram,
    shared: Arc<SharedRegisters>,
    events: Arc<dyn DeviceEvents>,
    pub queues: Vec<QueueRegisters>,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    /// Any number the driver has chosen, whether there is such a queue or not.
    pub queue_select: u32,
    driver_features: u64,
    /// A reset waits for queues to stop.
    resetting: bool,
    /// There is something to tell when it goes on from a saved state.
    news: Option<state::News>,
}

impl VirtioCore {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Ram,
        shared: Arc<SharedRegisters>,
        events: Arc<dyn DeviceEvents>,
    ) -> io::Result<Self> {
        let queue = |&max_size: &u16| {
            let layout = QueueLayout { size: max_size, ..Default::default() };
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            Ok(QueueRegisters { layout, enabled: false, max_size, service: Service::None, kick })
        };
        let queues = device.queue_sizes().iter().map(queue).collect::<io::Result<_>>()?;
        Ok(Self {
            device,
            ram,
            shared,
            events,
            queues,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            driver_features: 0,
            resetting: false,
            news: None,
        })
    }

    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// What the device tells its driver by.
    pub fn events(&self) -> &Arc<dyn DeviceEvents> {
        &self.events
    }

    pub fn registers(&self) -> &SharedRegisters {
        &self.shared
    }

    pub fn status(&self) -> u8 {
        self.shared.status.load(Ordering::Acquire)
    }

    pub fn generation(&self) -> u8 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// The selected half of the offered features; beyond 64 bits there are none.
    pub fn device_features(&self) -> u32 {
        half(self.device.features(), self.device_feature_select)
    }

    pub fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_feature_select)
    }

    /// Accepts features, only while they are negotiated.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status() & status::FEATURES_OK != 0 || self.driver_feature_select > 1 {
            return;
        }
        let shift = 32 * self.driver_feature_select;
        self.driver_features = self.driver_features & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }

    /// The selected queue, while its registers may still be changed.
    pub fn queue_to_configure(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(self.queue_select as usize).filter(|queue| !queue.is_ready())
    }

    pub fn selected_queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }

    /// Enables the selected queue.
    pub fn enable_queue(&mut self) {
        if let Some(queue) = self.queue_to_configure() {
            queue.enabled = true;
            // Late, but some drivers do it.
            if self.status() & status::DRIVER_OK != 0 {
                self.start_queue(self.queue_select as u16, None);
            }
        }
    }

    /// Disables the selected queue after the request in hand; its next life begins with an empty ring.
    pub fn disable_queue(&mut self) {
        if let Some(queue) = self.queues.get_mut(self.queue_select as usize) {
            queue.enabled = false;
            self.stop_queue(self.queue_select as u16, Instant::now() + PATIENCE);
        }
    }

    /// Asks a queue to stop and waits for that until `deadline`.
    fn stop_queue(&mut self, index: u16, deadline: Instant) {
        let queue = &mut self.queues[usize::from(index)];
        if queue.service != Service::None {
            let patience = deadline.saturating_duration_since(Instant::now());
            queue.service = match self.device.stop_queue_within(index, patience) {
                Ok(_) => Service::None,
                Err(StillBusy) => Service::Stopping,
            };
        }
        // A kick from before is nothing to the queue's next life.
        let _ = queue.kick.read();
    }

    /// Looks whether queues that were asked to stop have stopped, and does what waited for them. `true` if that was
    /// the rest of a reset.
    #[must_use]
    pub fn settle(&mut self) -> bool {
        self.settle_until(Instant::now())
    }

    /// The same, waiting for them.
    fn settle_until(&mut self, deadline: Instant) -> bool {
        for index in 0..self.queues.len() {
            if self.queues[index].service == Service::Stopping {
                self.stop_queue(index as u16, deadline);
            }
        }
        self.resetting && self.finish_reset()
    }

    /// Until it is over, a driver can do nothing but wait.
    pub fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// A write to the status register. Bits only come, until a zero takes them all: `true` if it has.
    #[must_use]
    pub fn set_status(&mut self, value: u8) -> bool {
        if value == 0 {
            return self.reset();
        }
        let old = self.status();
        let mut new = old | value & status::ALL;
        let offered = self.device.features();
        let acceptable = self.driver_features & !offered == 0 && self.driver_features & feature::VERSION_1 != 0;
        if old & status::FEATURES_OK == 0 && !acceptable {
            new &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.shared.status.fetch_or(new, Ordering::AcqRel);
        if new & !old & status::DRIVER_OK != 0 {
            for index in 0..self.queues.len() as u16 {
                if self.queues[usize::from(index)].enabled {
                    self.start_queue(index, None);
                }
            }
        }
        false
    }

    fn start_queue(&mut self, index: u16, state: Option<QueueState>) {
        let queue = &mut self.queues[usize::from(index)];
        if queue.service != Service::None {
            return;
        }
        let started = queue.kick.try_clone().and_then(|kick| {
            let resources = QueueResources {
                ram: self.ram.clone(),
                layout: queue.layout,
                features: self.driver_features,
                kick,
                events: self.events.clone(),
            };
            self.device.start_queue(index, resources, state)
        });
        match started {
            Ok(()) => queue.service = Service::Running,
            Err(error) => self.events.needs_reset(&format_args!("queue {index}: {error}")),
        }
    }

    fn reset(&mut self) -> bool {
        self.resetting = true;
        let deadline = Instant::now() + PATIENCE;
        for index in 0..self.queues.len() {
            self.stop_queue(index as u16, deadline);
        }
        self.finish_reset()
    }

    fn finish_reset(&mut self) -> bool {
        if self.queues.iter().any(|queue| queue.service != Service::None) {
            return false;
        }
        self.resetting = false;
        for queue in &mut self.queues {
            queue.layout = QueueLayout { size: queue.max_size, ..Default::default() };
            queue.enabled = false;
        }
        self.device.reset();
        (self.device_feature_select, self.driver_feature_select, self.queue_select) = (0, 0, 0);
        self.driver_features = 0;
        self.shared.status.store(0, Ordering::Release);
        // What was to be told is of no interest any more (virtio 1.2, 2.4.1).
        self.shared.isr.store(0, Ordering::Release);
        true
    }

    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(offset) = usize::try_from(offset) {
            self.device.read_config(offset, data);
        }
    }

    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Ok(offset) = usize::try_from(offset) {
            self.device.write_config(offset, data);
        }
    }

    /// A notification that came as an exit instead of through the ioeventfd.
    pub fn kick(&self, index: u64) {
        if let Some(queue) = usize::try_from(index).ok().and_then(|i| self.queues.get(i)) {
            // It fails only when the counter is full, which is a kick already.
            let _ = queue.kick.write(1);
        }
    }
}

impl Drop for VirtioCore {
    fn drop(&mut self) {
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.service != Service::None {
                self.device.stop_queue(index as u16);
            }
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
