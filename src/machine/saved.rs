//! A machine as data: what it is saved as, and all that is checked before one is made of it again.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::devices::DevicesStateV1;
use crate::cpu::{HostCpuid, Incompatible, VcpuStateV1};
use crate::platform::chips::ChipsStateV1;
use crate::platform::events::EventDeviceStateV1;
use crate::platform::layout;
use crate::platform::serial::SerialStateV1;

/// What a state is called in a file, and which version of it this is.
pub trait Kind: Serialize + DeserializeOwned {
    const KIND: &'static str;
    const VERSION: u32;
}

/// A state that says what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Versioned<T>(pub T);

impl<T: Kind> Serialize for Versioned<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Said<'a, T> {
            kind: &'static str,
            version: u32,
            state: &'a T,
        }
        Said { kind: T::KIND, version: T::VERSION, state: &self.0 }.serialize(serializer)
    }
}

impl<'de, T: Kind> Deserialize<'de> for Versioned<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Said {
            kind: String,
            version: u32,
            state: serde_json::Value,
        }
        let Said { kind, version, state } = Said::deserialize(deserializer)?;
        if kind != T::KIND {
            return Err(D::Error::custom(format_args!("a state of kind '{kind}' where one of '{}' belongs", T::KIND)));
        }
        if version != T::VERSION {
            return Err(D::Error::custom(format_args!(
                "version {version} of the state '{kind}': this release knows {}",
                T::VERSION
            )));
        }
        serde_json::from_value(state).map(Self).map_err(|error| D::Error::custom(format_args!("{kind}: {error}")))
    }
}

macro_rules! kinds {
    ($($state:ty: $kind:literal, $version:literal;)*) => {
        $(impl Kind for $state {
            const KIND: &'static str = $kind;
            const VERSION: u32 = $version;
        })*
    };
}

kinds! {
    VcpuStateV1: "vcpu", 1;
    ChipsStateV1: "chips", 1;
    SerialStateV1: "serial", 1;
    EventDeviceStateV1: "event-device", 1;
    DevicesStateV1: "virtio-devices", 1;
}

/// Everything that a machine is, but for its memory and its disks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineStateV1 {
    /// Was the guest asked to power off?
    pub stopping: bool,
    /// Where 64-bit BARs may be.
    pub pci_window_64: Option<(u64, u64)>,
    pub vcpus: Vec<Versioned<VcpuStateV1>>,
    pub chips: Versioned<ChipsStateV1>,
    pub serial: Versioned<SerialStateV1>,
    pub event_device: Versioned<EventDeviceStateV1>,
    pub devices: Versioned<DevicesStateV1>,
    /// Do the guest's ACPI tables tell of a generation ID?
    #[serde(default)]
    pub generation_id: bool,
}

/// Why a saved machine cannot go on here.
#[derive(Debug, Error)]
pub enum StateError {
    #[error("it has {saved} vCPUs, not {wanted}: their number is part of what is saved")]
    Cpus { saved: usize, wanted: u8 },
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    #[error("the saved {0}")]
    Part(String),
}

impl MachineStateV1 {
    /// Who made the CPU that it ran on, and what of it the guest may be using.
    #[must_use]
    pub fn cpu_needs(&self) -> (String, Vec<String>) {
        self.vcpus.first().map(|vcpu| vcpu.0.needs()).unwrap_or_default()
    }

    /// Checks what does not need the devices, before anything is made.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, cpus: u8, host: &HostCpuid) -> Result<(), StateError> {
        if self.vcpus.len() != usize::from(cpus) {
            return Err(StateError::Cpus { saved: self.vcpus.len(), wanted: cpus });
        }
        if let Some(vcpu) = self.vcpus.first() {
            host.check(&vcpu.0.cpuid)?;
        }
        let bits = host.physical_address_bits();
        if !(0..=bits).any(|bits| layout::pci_window_64(bits) == self.pci_window_64) {
            let window = self.pci_window_64;
            return Err(StateError::Part(format!(
                "PCI window {window:x?} is not within this host's {bits} address bits"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_says_what_it_is() {
        let state = Versioned(EventDeviceStateV1 { events: 1, pci_up: 2, pci_down: 0 });
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<Versioned<EventDeviceStateV1>>(&text).unwrap(), state);
        let refused = |from: &str, to: &str| {
            let text = text.replace(from, to);
            serde_json::from_str::<Versioned<EventDeviceStateV1>>(&text).unwrap_err().to_string()
        };
        assert!(refused("event-device", "serial").starts_with("a state of kind 'serial' where one of 'event-device'"));
        let newer = refused("\"version\":1", "\"version\":2");
        assert!(newer.starts_with("version 2 of the state 'event-device': this release knows 1"), "{newer}");
        assert!(refused("\"events\"", "\"event\"").starts_with("event-device: unknown field `event`"));
        assert!(refused("\"events\":1", "\"events\":-1").contains("invalid value"));
    }
}
