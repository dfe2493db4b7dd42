//! What became of a VM's last start.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// From a start to its end, as the process that is the VM has written it down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    pub pid: u32,
    /// The process in which the guest runs, if it is another one.
    #[serde(default)]
    pub vmm: Option<u32>,
    /// Of the host: none of its processes is left when it is another one.
    pub boot_id: String,
    /// Milliseconds since 1970.
    pub started: u64,
    pub ended: Option<Ended>,
}

/// How it ended, if the process could tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Milliseconds since 1970.
    pub time: u64,
    /// The process's exit code.
    pub code: u8,
    pub reason: String,
}

/// What a VM is just now, as far as its files tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It was not started yet, or has ended in good order.
    Stopped,
    /// It ended as it should not have: the guest's fault, or it could not be started.
    Failed(String),
    /// Its process is gone without a word.
    Dead(String),
    Running,
}

impl State {
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Failed(_) => "failed",
            Self::Dead(_) => "dead",
            Self::Running => "running",
        }
    }

    #[must_use]
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Failed(why) | Self::Dead(why) => Some(why),
            Self::Stopped | Self::Running => None,
        }
    }
}

/// Exit codes of ends that somebody wanted: the guest's power-off, and that from outside.
const WANTED: [u8; 2] = [0, 5];

impl Life {
    /// One that begins now, in this process.
    #[must_use]
    pub fn begin() -> Self {
        Self { pid: std::process::id(), vmm: None, boot_id: boot_id(), started: now(), ended: None }
    }

    pub(super) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Whole or not at all. After a loss of power the one before may be there: that boot's end is the same end.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let partial = path.with_extension("new");
        fs::write(&partial, serde_json::to_vec(self)?)?;
        fs::rename(&partial, path)
    }

    /// What a VM is whose process does not live.
    #[must_use]
    pub fn state(&self) -> State {
        match &self.ended {
            Some(ended) if WANTED.contains(&ended.code) => State::Stopped,
            Some(ended) => State::Failed(ended.reason.clone()),
            None if self.boot_id == boot_id() => State::Dead("its process was killed".into()),
            None => State::Dead("the host was restarted".into()),
        }
    }
}

#[must_use]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
