//! What a machine counts, apart from the machine: it can be read while its owner is at work.

use std::sync::Arc;

use super::Machine;
use super::devices::DeviceId;
use super::limits::Limits;
use crate::backend::Limiter;
use crate::observe::{Exits, Traffic};
use crate::virtio::DeviceEvents;

/// The counts of a machine with the devices that it has at the moment.
#[derive(Clone)]
pub struct Meters {
    exits: Vec<Arc<Exits>>,
    limits: Limits,
    entropy: Option<Arc<Limiter>>,
    drivers: Vec<(DeviceId, Arc<dyn DeviceEvents>)>,
}

impl Meters {
    /// What each vCPU has left the guest for.
    pub fn exits(&self) -> impl Iterator<Item = &Exits> {
        self.exits.iter().map(|exits| &**exits)
    }

    /// Does the guest drive this device?
    #[must_use]
    pub fn is_driven(&self, device: &DeviceId) -> bool {
        self.drivers.iter().any(|(id, events)| id == device && events.driver_is_ready())
    }

    /// What each device has done: a disk, or a card in what the guest receives and in what it sends.
    pub fn traffic(&self) -> impl Iterator<Item = (DeviceId, Vec<&Traffic>)> {
        self.limits.traffic()
    }

    /// The same of the entropy device, if there is one.
    #[must_use]
    pub fn entropy_traffic(&self) -> Option<&Traffic> {
        self.entropy.as_ref().map(|limiter| &limiter.traffic)
    }
}

impl Machine {
    /// What is counted.
    #[must_use]
    pub fn meters(&self) -> Meters {
        let entropy = self.devices.entropy_limiter().cloned();
        let drivers = self.devices.drivers().map(|(id, events)| (id.clone(), events.clone())).collect();
        Meters { exits: self.vcpus.exits().to_vec(), limits: self.limits.clone(), entropy, drivers }
    }
}
