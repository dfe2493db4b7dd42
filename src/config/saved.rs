//! A VM that has run: what of it a person may read and change before it goes on, on this host or another.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{DiskConfig, EntropyConfig, Image, MemorySize, NetBackend, NetConfig, Transport};

/// What a saved VM is made of. Sizes and shapes are as they were: changing them is changing another VM than the one
/// whose memory is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SavedVm {
    pub cpus: u8,
    pub memory: MemorySize,
    pub transport: Transport,
    pub disks: Vec<SavedDisk>,
    pub nics: Vec<SavedNic>,
    pub entropy: Option<EntropyConfig>,
}

/// A disk, by the name that its owner knows it by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SavedDisk {
    pub name: String,
    /// Is it part of the snapshot? Then its file, and those behind it, lie in the snapshot's directory, and what the VM
    /// writes from now on goes elsewhere.
    #[serde(default)]
    pub stored: bool,
    pub config: DiskConfig,
}

/// A network card, by the name that its owner knows it by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SavedNic {
    pub name: String,
    pub config: NetConfig,
}

/// Another file or network for a device of a saved VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Override {
    /// A disk by its name, and its file.
    Disk(String, PathBuf),
    /// A network card by its name, and its tap.
    Net(String, String),
}

/// Why it cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OverrideError {
    #[error("'{0}' overrides nothing: say disk.NAME=PATH or net.NAME=TAP")]
    Syntax(String),
    #[error("the saved VM has no disk '{name}'{}", list(.known))]
    NoDisk { name: String, known: Vec<String> },
    #[error("the saved VM has no network card '{name}'{}", list(.known))]
    NoNic { name: String, known: Vec<String> },
    #[error("the network card '{0}' is in a user network, which has no tap")]
    NoTap(String),
    #[error(
        "'{0}' cannot be changed at a restore: the guest's kernel has counted its CPUs and its memory when it booted, and would \
         go on with those it had. Boot it with another size: 'tranche resize' of a named VM"
    )]
    Shape(String),
}

fn list(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!(": it has {}", known.join(", ")) }
}

impl FromStr for Override {
    type Err = OverrideError;

    fn from_str(text: &str) -> Result<Self, OverrideError> {
        let wrong = || OverrideError::Syntax(text.to_owned());
        let (place, value) = text.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(wrong)?;
        match place.split_once('.').filter(|(_, name)| !name.is_empty()) {
            Some(("disk", name)) => Ok(Self::Disk(name.into(), value.into())),
            None if ["cpus", "memory"].contains(&place) => Err(OverrideError::Shape(place.to_owned())),
            Some(("net", name)) => Ok(Self::Net(name.into(), value.into())),
            _ => Err(wrong()),
        }
    }
}

impl Override {
    /// # Errors
    /// When the VM has no such device.
    pub fn apply(&self, vm: &mut SavedVm) -> Result<(), OverrideError> {
        match self {
            Self::Disk(name, path) => {
                let known = || vm.disks.iter().map(|disk| disk.name.clone()).collect();
                let missing = OverrideError::NoDisk { name: name.clone(), known: known() };
                let disk = vm.disks.iter_mut().find(|disk| disk.name == *name).ok_or(missing)?;
                disk.config.path.clone_from(path);
                if std::mem::take(&mut disk.stored) {
                    disk.config.image = Image::default();
                }
            }
            Self::Net(name, tap) => {
                let known = || vm.nics.iter().map(|nic| nic.name.clone()).collect();
                let missing = OverrideError::NoNic { name: name.clone(), known: known() };
                let nic = vm.nics.iter_mut().find(|nic| nic.name == *name).ok_or(missing)?;
                match &mut nic.config.backend {
                    NetBackend::Tap(network) => network.name.clone_from(tap),
                    NetBackend::User(_) => return Err(OverrideError::NoTap(name.clone())),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, TapNetwork, UserNetwork};

    fn vm() -> SavedVm {
        let disk = SavedDisk { name: "root.fs".into(), stored: true, config: DiskConfig::from_arg("/old").unwrap() };
        let nic = |name: &str, backend| SavedNic {
            name: name.into(),
            config: NetConfig {
                backend,
                mac: None,
                mtu: None,
                rx_limits: Default::default(),
                tx_limits: Default::default(),
            },
        };
        let tap = NetBackend::Tap(TapNetwork { name: "tap0".into(), queues: 1, vhost: false });
        SavedVm {
            cpus: 1,
            memory: MemorySize(64 << 20),
            transport: Transport::Pci,
            disks: vec![disk],
            nics: vec![nic("net0", tap), nic("net1", NetBackend::User(UserNetwork::default()))],
            entropy: None,
        }
    }

    #[test]
    fn devices_get_other_files_and_networks() {
        let mut saved = vm();
        for text in ["disk.root.fs=/new=1", "net.net0=tap9"] {
            text.parse::<Override>().unwrap().apply(&mut saved).unwrap();
        }
        assert_eq!((&saved.disks[0].config.path, saved.disks[0].stored), (&PathBuf::from("/new=1"), false));
        assert!(matches!(&saved.nics[0].config.backend, NetBackend::Tap(tap) if tap.name == "tap9"));
        let text = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<SavedVm>(&text).unwrap(), saved);
    }

    #[test]
    fn what_is_not_there_is_not_overridden() {
        for text in ["", "disk", "disk=x", "disk.=x", "disk.a=", "nic.a=b", "=", "net.x"] {
            assert_eq!(text.parse::<Override>(), Err(OverrideError::Syntax(text.into())));
        }
        assert_eq!("cpus=4".parse::<Override>(), Err(OverrideError::Shape("cpus".into())));
        let refused = |text: &str| text.parse::<Override>().unwrap().apply(&mut vm()).unwrap_err().to_string();
        assert_eq!(refused("disk.a=b"), "the saved VM has no disk 'a': it has root.fs");
        assert_eq!(refused("net.a=b"), "the saved VM has no network card 'a': it has net0, net1");
        assert_eq!(refused("net.net1=b"), "the network card 'net1' is in a user network, which has no tap");
    }
}
