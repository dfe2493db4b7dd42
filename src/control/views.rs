//! What is shown of a VM.

use std::time::SystemTime;

use serde::Serialize;

use super::Answer;
use super::owner::Identity;
use super::view::Shown;
use crate::config::Transport;
use crate::config::firecracker as fc;
use crate::machine::{DeviceId, Presence};
use crate::observe::rfc3339;

#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Instance<'a> {
    id: &'a str,
    state: &'a str,
    vmm_version: &'a str,
    app_name: &'a str,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Version<'a> {
    firecracker_version: &'a str,
}

/// `GET /v2/vm`.
#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Vm<'a> {
    id: &'a str,
    state: &'a str,
    version: &'a str,
    transport: &'a str,
    vcpus: u8,
    memory_bytes: u64,
    /// What it is to be from its next start or reset on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pending: Option<Pending>,
    devices: Vec<Device<'a>>,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
struct Pending {
    vcpus: u8,
    memory_bytes: u64,
}

/// A device of the guest, or of the guest to be.
#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Device<'a> {
    kind: &'a str,
    id: &'a str,
    /// `present`, or `leaving` while the guest has not let go of it.
    state: &'a str,
    /// Does the guest drive it?
    driver: bool,
}

/// A line of `GET /v2/events`.
#[derive(Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
struct StateEvent<'a> {
    time: String,
    event: &'a str,
    from: Option<&'a str>,
    to: &'a str,
}

/// Our own types always have a JSON form.
pub fn json(value: &impl Serialize) -> Answer {
    Answer::Json(serde_json::to_string(value).unwrap_or_default())
}

/// Firecracker's clients know three states.
fn firecracker_state(state: &str) -> &'static str {
    match state {
        super::owner::NOT_STARTED | "starting" => "Not started",
        "paused" | "saving" => "Paused",
        _ => "Running",
    }
}

pub fn instance(identity: &Identity, state: &str) -> Answer {
    json(&Instance {
        id: &identity.id,
        state: firecracker_state(state),
        vmm_version: identity.version,
        app_name: identity.app_name,
    })
}

pub fn version(identity: &Identity) -> Answer {
    json(&Version { firecracker_version: identity.version })
}

pub fn description(description: &fc::VmDescription) -> Answer {
    let machine_config = Some(description.machine_config.unwrap_or_default());
    json(&fc::VmDescription { machine_config, ..description.clone() })
}

pub fn vm(shown: &Shown) -> Answer {
    let Shown { identity, description, .. } = shown;
    let config = description.machine_config.unwrap_or_default();
    let devices = match &shown.devices {
        Some(devices) => {
            let is_driven = |id| shown.meters.as_ref().is_some_and(|meters| meters.is_driven(id));
            devices.iter().map(|(id, presence)| device(id, *presence, is_driven(id))).collect()
        }
        None => {
            let drives = description.drives.iter().map(|drive| ("disk", drive.drive_id.as_str()));
            let nics = description.network_interfaces.iter().map(|nic| ("nic", nic.iface_id.as_str()));
            drives.chain(nics).map(|(kind, id)| Device { kind, id, state: "present", driver: false }).collect()
        }
    };
    json(&Vm {
        id: &identity.id,
        state: shown.state,
        version: env!("CARGO_PKG_VERSION"),
        transport: if identity.transport == Transport::Pci { "pci" } else { "mmio" },
        vcpus: config.vcpu_count,
        memory_bytes: config.mem_size_mib << 20,
        pending: shown.next_size.map(|size| Pending { vcpus: size.cpus, memory_bytes: size.memory.0 }),
        devices,
    })
}

fn device(id: &DeviceId, presence: Presence, driver: bool) -> Device<'_> {
    let (kind, id) = match id {
        DeviceId::Disk(id) => ("disk", id.as_str()),
        DeviceId::Nic(id) => ("nic", id.as_str()),
        DeviceId::Entropy => ("entropy", ""),
    };
    let state = match presence {
        Presence::Present => "present",
        Presence::Leaving | Presence::Ejected => "leaving",
    };
    Device { kind, id, state, driver }
}

/// A line about a change of state; without `from`, what the state is at first.
pub fn state_event(from: Option<&str>, to: &str) -> String {
    let event = StateEvent { time: rfc3339(SystemTime::now()), event: "state", from, to };
    let mut line = serde_json::to_string(&event).unwrap_or_default();
    line.push('\n');
    line
}
