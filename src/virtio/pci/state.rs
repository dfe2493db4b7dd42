//! A function that comes to rest, is saved and restored, and goes on.

use std::io;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::config_space::{ConfigSpace, SIZE};
use super::msix::NO_VECTOR;
use super::{BarAddress, VirtioPci};
use crate::virtio::core::state::CoreStateV1;
use crate::virtio::signals::Source;
use crate::virtio::{StateError, StillBusy};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciStateV1 {
    pub core: CoreStateV1,
    /// The configuration space, 256 bytes.
    pub config: Vec<u8>,
    /// Does the BAR answer where the configuration space says? Not if the guest has put it where it cannot.
    pub mapped: bool,
    pub vectors: Vec<VectorStateV1>,
    /// The vectors of the configuration's changes and of the queues: 0xffff is none.
    pub config_vector: u16,
    pub queue_vectors: Vec<u16>,
}

/// An entry of the MSI-X table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorStateV1 {
    pub address: u64,
    pub data: u32,
    pub control: u32,
    pub pending: bool,
}

impl VirtioPci {
    /// Brings the device to rest: see [`VirtioCore::suspend`](crate::virtio::core::VirtioCore::suspend).
    ///
    /// # Errors
    /// As there.
    pub fn suspend(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        let was_reset = self.core.suspend(deadline)?;
        if was_reset {
            self.signals.carrier.reset();
        }
        Ok(())
    }

    /// Goes on, also after a suspension that did not succeed.
    pub fn resume(&mut self) {
        self.core.resume();
    }

    /// What there is while it is suspended.
    #[must_use]
    pub fn save(&self) -> PciStateV1 {
        let vector = |source| self.signals.carrier.vector(source);
        PciStateV1 {
            core: self.core.save(),
            config: self.config.save(),
            mapped: self.doorbells.is_some(),
            vectors: self.msix.save(),
            config_vector: vector(Source::Config),
            queue_vectors: (0..self.core.queues.len() as u16).map(|queue| vector(Source::Queue(queue))).collect(),
        }
    }

    /// The configuration space of a state, if that can be it.
    fn config_of(&self, state: &PciStateV1) -> Result<ConfigSpace, StateError> {
        let wrong = |problem| StateError::new("config", problem);
        let bytes: &[u8; SIZE] = state
            .config
            .as_slice()
            .try_into()
            .map_err(|_| wrong(format!("{} bytes, and not {SIZE}", state.config.len())))?;
        self.config.check(bytes).map_err(|at| {
            wrong(format!("byte {at:#x} is {:#x}, which is not this device's and cannot be written", bytes[at]))
        })?;
        Ok(self.config.with(bytes))
    }

    /// Could this function have come to that state? Changes nothing.
    ///
    /// # Errors
    /// What cannot be.
    pub fn check(&self, state: &PciStateV1) -> Result<(), StateError> {
        let config = self.config_of(state)?;
        if state.mapped && config.bar0().is_none() {
            return Err(StateError::new("mapped", "the BAR is not decoded"));
        }
        let (queues, vectors) = (self.core.queues.len(), self.core.queues.len() + 1);
        for (field, count, ours) in
            [("vectors", state.vectors.len(), vectors), ("queue_vectors", state.queue_vectors.len(), queues)]
        {
            if count != ours {
                return Err(StateError::new(field, format!("there are {count}, and the device has {ours}")));
            }
        }
        for vector in state.queue_vectors.iter().chain([&state.config_vector]) {
            if !self.signals.carrier.has_vector(*vector) {
                let problem = format!("{vector} is neither below {vectors} nor {NO_VECTOR} for none");
                return Err(StateError::new("config_vector, queue_vectors", problem));
            }
        }
        self.core.check(&state.core).map_err(|error| error.in_part("core"))
    }

    /// Takes up a state that has been checked, suspended. Returns where the BAR has to be mapped.
    ///
    /// # Errors
    /// The host's.
    pub fn restore(&mut self, state: &PciStateV1) -> io::Result<BarAddress> {
        let config = self.config_of(state).map_err(io::Error::other)?;
        self.core.restore(&state.core)?;
        self.config = config;
        self.signals.carrier.set_vector(Source::Config, state.config_vector);
        for (queue, &vector) in (0..).zip(&state.queue_vectors) {
            self.signals.carrier.set_vector(Source::Queue(queue), vector);
        }
        self.msix.restore(&state.vectors, self.config.msix_control().unwrap_or(0))?;
        Ok(self.bar_address().filter(|_| state.mapped))
    }
}
