//! Devices at rest, as data: what a snapshot holds. All of it may come from a file that anybody wrote, so each part is
//! checked as a whole before anything takes it up.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::device::DeviceKind;

pub use super::core::state::{CoreStateV1, QueueStateV1};
pub use super::mmio::MmioStateV1;
pub use super::pci::{PciStateV1, VectorStateV1};

/// Why a device cannot go on from a state.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct StateError {
    /// Such as `queues[1].layout.size`.
    pub field: String,
    pub problem: String,
}

impl StateError {
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The same, seen from the outside of what contains the field.
    #[must_use]
    pub fn in_part(self, part: &str) -> Self {
        Self { field: format!("{part}.{}", self.field), ..self }
    }
}

/// What a device has been told besides its queues: only a device of its kind can read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnStateV1 {
    pub kind: DeviceKind,
    pub version: u32,
    pub state: Value,
}

impl OwnStateV1 {
    /// # Panics
    /// If `state` is not plain data.
    pub fn new(kind: DeviceKind, version: u32, state: &impl Serialize) -> Self {
        Self { kind, version, state: serde_json::to_value(state).expect("plain data") }
    }

    /// # Errors
    /// When this is another device's, or not what that version says.
    pub fn parse<T: DeserializeOwned>(&self, kind: DeviceKind, version: u32) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::new("kind", format!("it is that of a {} device, not of a {kind}", self.kind)));
        }
        if self.version != version {
            return Err(StateError::new("version", format!("{} is not known, only {version}", self.version)));
        }
        T::deserialize(&self.state).map_err(|error| StateError::new("state", error.to_string()))
    }
}
