//! A device over MMIO that comes to rest, is saved and restored, and goes on.

use std::io;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::VirtioMmio;
use crate::virtio::core::state::CoreStateV1;
use crate::virtio::{StateError, StillBusy};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioStateV1 {
    pub core: CoreStateV1,
}

impl VirtioMmio {
    /// Brings the device to rest: see [`VirtioCore::suspend`](crate::virtio::core::VirtioCore::suspend).
    ///
    /// # Errors
    /// As there.
    pub fn suspend(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        self.core.suspend(deadline).map(drop)
    }

    /// Goes on, also after a suspension that did not succeed.
    pub fn resume(&mut self) {
        self.core.resume();
        if std::mem::take(&mut self.pulse) {
            // It fails only when the counter is full, and then the interrupt is long pending.
            let _ = self.line.write(1);
        }
    }

    /// What there is while it is suspended.
    #[must_use]
    pub fn save(&self) -> MmioStateV1 {
        MmioStateV1 { core: self.core.save() }
    }

    /// Could this device have come to that state? Changes nothing.
    ///
    /// # Errors
    /// What cannot be.
    pub fn check(&self, state: &MmioStateV1) -> Result<(), StateError> {
        self.core.check(&state.core).map_err(|error| error.in_part("core"))
    }

    /// Takes up a state that has been checked, suspended.
    ///
    /// # Errors
    /// The host's.
    pub fn restore(&mut self, state: &MmioStateV1) -> io::Result<()> {
        self.core.restore(&state.core)?;
        self.listen();
        // A pulse may not have reached the interrupt controller before that was saved.
        self.pulse = state.core.isr != 0;
        Ok(())
    }
}
