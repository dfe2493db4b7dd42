//! Registers that come to rest, are saved and restored, and go on.
//!
//! ```text
//!            suspend                       resume
//!   running ─────────▶ resting ─▶ at rest ────────▶ running
//!                         └── resume: the stop is taken back, the queue runs
//! ```
//! A kick is not saved: each queue is looked at once when it starts. Nor is an interrupt that was on its way, in KVM's
//! hands: each queue's driver is told once, to no harm if it has been before.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::super::device::{QueueLayout, QueueState, StillBusy};
use super::super::queue::Virtqueue;
use super::super::state::{OwnStateV1, StateError};
use super::{Ordering, Service, VirtioCore, feature, status};

/// What both transports have registers for, and the device behind them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoreStateV1 {
    pub status: u8,
    pub generation: u8,
    pub isr: u8,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub queue_select: u32,
    pub driver_features: u64,
    pub queues: Vec<QueueStateV1>,
    pub own: OwnStateV1,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueStateV1 {
    /// As the driver has left it, who need not have finished.
    pub layout: QueueLayout,
    pub enabled: bool,
    /// Of one that the device serves.
    pub progress: Option<QueueState>,
}

/// What is told when a device goes on from a saved state.
pub(super) struct News {
    config_changed: bool,
}

impl VirtioCore {
    /// Brings all queues to rest. [`Self::resume`] takes it back, complete or not. `Ok(true)` if a reset that the driver
    /// has begun is complete by that.
    ///
    /// # Errors
    /// When a queue has not stopped by the deadline. It may be asked again.
    pub fn suspend(&mut self, deadline: Instant) -> Result<bool, StillBusy> {
        // What the driver has asked for comes first.
        let was_reset = self.settle_until(deadline);
        for index in 0..self.queues.len() as u16 {
            self.rest_queue(index, deadline);
        }
        let moving = |queue: &super::QueueRegisters| {
            matches!(queue.service, Service::Running | Service::Stopping | Service::Resting)
        };
        if self.queues.iter().any(moving) { Err(StillBusy) } else { Ok(was_reset) }
    }

    fn rest_queue(&mut self, index: u16, deadline: Instant) {
        let queue = &mut self.queues[usize::from(index)];
        if !matches!(queue.service, Service::Running | Service::Resting) {
            return;
        }
        let patience = deadline.saturating_duration_since(Instant::now());
        queue.service = match self.device.stop_queue_within(index, patience) {
            Ok(Some(state)) => Service::AtRest(state),
            Ok(None) => {
                self.events.needs_reset(&format_args!("queue {index} is lost"));
                Service::None
            }
            Err(StillBusy) => Service::Resting,
        };
    }

    /// Goes on. A device that needs a reset has nothing to go on with: its driver must not count on it (virtio 1.2,
    /// 2.1.2), and a broken ring is to stay silent.
    pub fn resume(&mut self) {
        let healthy = self.status() & status::NEEDS_RESET == 0;
        let news = self.news.take();
        for index in 0..self.queues.len() as u16 {
            let queue = &mut self.queues[usize::from(index)];
            match queue.service {
                Service::Resting => {
                    self.device.continue_queue(index);
                    queue.service = Service::Running;
                }
                Service::AtRest(state) => {
                    queue.service = Service::None;
                    if healthy {
                        self.start_queue(index, Some(state));
                    }
                    if news.is_some() {
                        self.events.queue_interrupt(index);
                    }
                }
                Service::None | Service::Running | Service::Stopping => {}
            }
        }
        if news.is_some_and(|news| news.config_changed) {
            self.events.config_changed();
        }
    }

    /// What there is while it is suspended.
    #[must_use]
    pub fn save(&self) -> CoreStateV1 {
        let queue = |queue: &super::QueueRegisters| QueueStateV1 {
            layout: queue.layout,
            enabled: queue.enabled,
            progress: if let Service::AtRest(state) = queue.service { Some(state) } else { None },
        };
        CoreStateV1 {
            status: self.status(),
            generation: self.generation(),
            isr: self.shared.isr(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            driver_features: self.driver_features,
            queues: self.queues.iter().map(queue).collect(),
            own: self.device.save(),
        }
    }

    /// Could this device have come to that state, with this memory?
    pub fn check(&self, state: &CoreStateV1) -> Result<(), StateError> {
        let wrong = |field: &str, problem: String| Err(StateError::new(field, problem));
        let CoreStateV1 { status, isr, driver_features: features, queues, own, .. } = state;
        let (offered, has) = (self.device.features(), |bit| status & bit != 0);
        if status & !(status::ALL | status::NEEDS_RESET) != 0 {
            return wrong("status", format!("{status:#x} has bits that do not exist"));
        }
        if has(status::DRIVER_OK) && !has(status::FEATURES_OK) {
            return wrong("status", format!("{status:#x} has DRIVER_OK without FEATURES_OK"));
        }
        if has(status::FEATURES_OK) && features & !offered != 0 {
            let missing = features & !offered;
            return wrong("driver_features", format!("the device does not offer {missing:#x} of {features:#x}"));
        }
        if has(status::FEATURES_OK) && features & feature::VERSION_1 == 0 {
            return wrong("driver_features", format!("{features:#x} lacks VERSION_1"));
        }
        if isr & !3 != 0 {
            return wrong("isr", format!("{isr:#x} has bits that do not exist"));
        }
        if queues.len() != self.queues.len() {
            return wrong("queues", format!("there are {}, and the device has {}", queues.len(), self.queues.len()));
        }
        for (index, (queue, ours)) in queues.iter().zip(&self.queues).enumerate() {
            let served = queue.progress.is_some();
            let may_be = queue.enabled && has(status::DRIVER_OK);
            if served && !may_be {
                return wrong(&format!("queues[{index}].progress"), "the queue has not been started".into());
            }
            if !served && may_be && !has(status::NEEDS_RESET) {
                return wrong(&format!("queues[{index}].progress"), "it is missing".into());
            }
            if served && let Err(error) = Virtqueue::check(ours.max_size, &queue.layout, &self.ram) {
                return wrong(&format!("queues[{index}].layout"), error.to_string());
            }
        }
        let accepted = if has(status::FEATURES_OK) { *features } else { 0 };
        self.device.check(own, accepted).map_err(|error| error.in_part("own"))
    }

    /// Takes up a state that has been checked, suspended.
    ///
    /// # Errors
    /// The host's.
    pub fn restore(&mut self, state: &CoreStateV1) -> std::io::Result<()> {
        let config_changed = self.device.restore(&state.own)?;
        self.news = Some(News { config_changed });
        self.shared.status.store(state.status, Ordering::Release);
        self.shared.generation.store(state.generation, Ordering::Release);
        self.shared.isr.store(state.isr, Ordering::Release);
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.driver_features = state.driver_features;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            queue.layout = saved.layout;
            queue.enabled = saved.enabled;
            queue.service = saved.progress.map_or(Service::None, Service::AtRest);
        }
        Ok(())
    }
}
