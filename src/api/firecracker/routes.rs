//! Firecracker's paths: which call a request is, or why it is none.

use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::api::http::Method;
use crate::config::firecracker::{self as fc, InvalidValue};
use crate::control::{Call, When};

/// Why a request is no call.
#[derive(Debug, Error)]
pub enum BadRequest {
    #[error("Invalid request method and/or path: {method} {path}.")]
    Path { method: String, path: String },
    #[error("Empty {0} request.")]
    EmptyBody(&'static str),
    #[error("GET request cannot have a body.")]
    BodyOfGet,
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
    #[error("The id from the path does not match the id from the body!")]
    OtherId,
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    OtherInterface { path: String, body: String },
    #[error(transparent)]
    Value(#[from] InvalidValue),
    /// As another one, made in a way that is going to be given up.
    #[error(transparent)]
    Deprecated(Box<Self>),
}

impl BadRequest {
    #[must_use]
    pub fn is_deprecated(&self) -> bool {
        matches!(self, Self::Deprecated(_))
    }
}

/// A call, and whether it is made in a way that is going to be given up.
#[derive(Debug, PartialEq, Eq)]
pub struct Routed {
    pub call: Call,
    pub deprecated: bool,
}

impl From<Call> for Routed {
    fn from(call: Call) -> Self {
        Self { call, deprecated: false }
    }
}

/// Reads a request.
///
/// # Errors
/// When no call is meant by it.
pub fn route(method: &Method, path: &str, body: &[u8]) -> Result<Routed, BadRequest> {
    let unknown = || BadRequest::Path { method: method.to_string(), path: path.trim_start_matches('/').to_owned() };
    let mut words = path.split('/').skip(1);
    let words: [Option<&str>; 4] = std::array::from_fn(|_| words.next());
    match method {
        Method::Get if !body.is_empty() => return Err(BadRequest::BodyOfGet),
        Method::Put | Method::Patch if body.is_empty() && words != HINTING_STOP => {
            // An unknown path is the greater mistake.
            let probe = if matches!(method, Method::Put) { put(words, b"null") } else { patch(words, b"null") };
            return Err(match probe {
                Some(_) => BadRequest::EmptyBody(if matches!(method, Method::Put) { "PUT" } else { "PATCH" }),
                None => unknown(),
            });
        }
        _ => {}
    }
    match method {
        Method::Get => get(words).map(Routed::from).map(Ok),
        Method::Put => put(words, body),
        Method::Patch => patch(words, body),
        Method::Delete => delete(words).map(|call| call.map(Routed::from)),
        Method::Other(_) => None,
    }
    .unwrap_or_else(|| Err(unknown()))
}

const HINTING_STOP: [Option<&str>; 4] = [Some("balloon"), Some("hinting"), Some("stop"), None];

type Words<'a> = [Option<&'a str>; 4];
/// `None` for a path that there is not.
type Found<T = Routed> = Option<Result<T, BadRequest>>;

fn get(words: Words<'_>) -> Option<Call> {
    Some(match words {
        [Some(""), None, ..] => Call::GetInstance,
        [Some("version"), None, ..] => Call::GetVersion,
        [Some("vm"), Some("config"), None, _] => Call::GetDescription,
        [Some("machine-config"), None, ..] => Call::GetMachineConfig,
        [Some("balloon"), None, ..] | [Some("balloon"), Some("statistics"), None, _] => {
            Call::Missing("The balloon device", When::Always)
        }
        [Some("balloon"), Some("hinting"), Some("status"), None] => Call::Missing("The balloon device", When::After),
        [Some("mmds"), None, ..] => Call::Missing("MMDS", When::Always),
        [Some("hotplug"), Some("memory"), None, _] => Call::Missing("Memory hot-plug", When::After),
        _ => return None,
    })
}

fn put(words: Words<'_>, body: &[u8]) -> Found {
    let missing = |what, when| move || Routed::from(Call::Missing(what, when));
    Some(match words {
        [Some("actions"), None, ..] => read(body, |action: fc::Action| Ok(Call::Act(action.action_type))),
        [Some("boot-source"), None, ..] => read(body, |source| Ok(Call::PutBootSource(source))),
        [Some("machine-config"), None, ..] => parse(body).and_then(|config: fc::MachineConfig| {
            marked(config.cpu_template.is_some(), config.check().map(|()| Call::PutMachineConfig(config)))
        }),
        [Some("cpu-config"), None, ..] => read(body, |config: fc::CpuConfig| {
            config.check()?;
            Ok(Call::PutCpuConfig(config))
        }),
        [Some("drives"), id, None, _] => with_id(id, body, |id, drive: fc::Drive| {
            same_id(id, &drive.drive_id)?;
            drive.check()?;
            Ok(Call::PutDrive(Box::new(drive.with_defaults())))
        }),
        [Some("network-interfaces"), id, None, _] => with_id(id, body, |id, nic: fc::NetworkInterface| {
            same_interface(id, &nic.iface_id)?;
            nic.nic()?;
            Ok(Call::PutNetwork(Box::new(nic)))
        }),
        [Some("entropy"), None, ..] => read(body, |entropy| Ok(Call::PutEntropy(entropy))),
        [Some("serial"), None, ..] => read(body, |serial| Ok(Call::PutSerial(serial))),
        [Some("logger"), None, ..] => read(body, |logger| Ok(Call::PutLogger(logger))),
        [Some("metrics"), None, ..] => read(body, |metrics| Ok(Call::PutMetrics(metrics))),
        [Some("pmem"), id, None, _] => with_id(id, body, |id, pmem: fc::Pmem| {
            same_id(id, &pmem.id)?;
            pmem.check()?;
            Ok(Call::Missing("The pmem device", When::Always))
        }),
        [Some("vsock"), None, ..] => parse(body).and_then(|vsock: fc::Vsock| {
            let call = vsock.check().map(|()| Call::Missing("The vsock device", When::Before));
            marked(vsock.vsock_id.is_some(), call)
        }),
        [Some("balloon"), None, ..] => {
            parse::<fc::Balloon>(body).map(|_| missing("The balloon device", When::Before)())
        }
        [Some("hotplug"), Some("memory"), None, _] => read(body, |memory: fc::HotplugMemory| {
            memory.check()?;
            Ok(Call::Missing("Memory hot-plug", When::Before))
        }),
        [Some("mmds"), None, ..] => parse::<serde_json::Value>(body).map(|_| missing("MMDS", When::Always)()),
        [Some("mmds"), Some("config"), None, _] => parse::<fc::MmdsConfig>(body)
            .map(|config| Routed { call: Call::Missing("MMDS", When::Before), deprecated: config.is_deprecated() }),
        [Some("snapshot"), Some("create"), None, _] => read(body, |create| Ok(Call::CreateFiles(create))),
        [Some("snapshot"), Some("load"), None, _] => parse(body).and_then(|load: fc::SnapshotLoad| {
            let deprecated = load.mem_file_path.is_some();
            marked(deprecated, load.check().map(|()| Call::LoadFiles(Box::new(load))))
        }),
        _ => return None,
    })
}

fn patch(words: Words<'_>, body: &[u8]) -> Found {
    let missing = |what, when| move || Routed::from(Call::Missing(what, when));
    Some(match words {
        [Some("vm"), None, ..] => read(body, |vm: fc::VmPatch| Ok(Call::SetState(vm.state))),
        [Some("machine-config"), None, ..] => parse(body).and_then(|patch: fc::MachineConfigPatch| {
            if patch.is_empty() {
                return Err(BadRequest::EmptyBody("PATCH"));
            }
            Ok(Routed { call: Call::PatchMachineConfig(patch), deprecated: patch.cpu_template.is_some() })
        }),
        [Some("drives"), id, None, _] => with_id(id, body, |id, drive: fc::DrivePatch| {
            same_id(id, &drive.drive_id)?;
            drive.check()?;
            Ok(Call::PatchDrive(drive))
        }),
        [Some("network-interfaces"), id, None, _] => with_id(id, body, |id, nic: fc::NetworkPatch| {
            same_interface(id, &nic.iface_id)?;
            nic.check()?;
            Ok(Call::PatchNetwork(nic))
        }),
        [Some("pmem"), id, None, _] => with_id(id, body, |id, pmem: fc::PmemPatch| {
            same_id(id, &pmem.id)?;
            Ok(Call::Missing("The pmem device", When::After))
        }),
        [Some("balloon"), None, ..] => {
            parse::<fc::BalloonPatch>(body).map(|_| missing("The balloon device", When::After)())
        }
        [Some("balloon"), Some("statistics"), None, _] => {
            parse::<fc::BalloonStatisticsPatch>(body).map(|_| missing("The balloon device", When::After)())
        }
        [Some("balloon"), Some("hinting"), Some("start"), None] => {
            parse::<fc::HintingStart>(body).map(|_| missing("The balloon device", When::After)())
        }
        HINTING_STOP => Ok(missing("The balloon device", When::After)()),
        [Some("hotplug"), Some("memory"), None, _] => {
            parse::<fc::HotplugMemoryPatch>(body).map(|_| missing("Memory hot-plug", When::After)())
        }
        [Some("mmds"), None, ..] => parse::<serde_json::Value>(body).map(|_| missing("MMDS", When::Always)()),
        _ => return None,
    })
}

fn delete(words: Words<'_>) -> Found<Call> {
    let [Some(kind), Some(id), None, _] = words else { return None };
    let call = match kind {
        "drives" => Call::DeleteDrive(id.into()),
        "network-interfaces" => Call::DeleteNetwork(id.into()),
        "pmem" => Call::Missing("The pmem device", When::After),
        _ => return None,
    };
    Some(fc::check_id(id).map(|()| call).map_err(BadRequest::Value))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, BadRequest> {
    Ok(serde_json::from_slice(body)?)
}

fn read<T: DeserializeOwned>(
    body: &[u8],
    call: impl FnOnce(T) -> Result<Call, BadRequest>,
) -> Result<Routed, BadRequest> {
    parse(body).and_then(call).map(Routed::from)
}

/// A call or the lack of one, which is deprecated either way.
fn marked(deprecated: bool, call: Result<Call, InvalidValue>) -> Result<Routed, BadRequest> {
    match call {
        Ok(call) => Ok(Routed { call, deprecated }),
        Err(error) if deprecated => Err(BadRequest::Deprecated(Box::new(error.into()))),
        Err(error) => Err(error.into()),
    }
}

fn with_id<T: DeserializeOwned>(
    id: Option<&str>,
    body: &[u8],
    call: impl FnOnce(&str, T) -> Result<Call, BadRequest>,
) -> Result<Routed, BadRequest> {
    let id = id.unwrap_or_default();
    fc::check_id(id)?;
    read(body, |value| call(id, value))
}

fn same_id(path: &str, body: &str) -> Result<(), BadRequest> {
    if path == body { Ok(()) } else { Err(BadRequest::OtherId) }
}

fn same_interface(path: &str, body: &str) -> Result<(), BadRequest> {
    if path == body { Ok(()) } else { Err(BadRequest::OtherInterface { path: path.into(), body: body.into() }) }
}

#[cfg(test)]
mod tests;
