//! What is shown of a VM while its owner is at work.
//!
//! The owner publishes how things stand whenever something has changed, and before it answers whoever changed it. GETs
//! are answered from that, on the thread that asks: so they never wait for a kernel that is unpacked, or for a host's
//! file that hangs.

use std::sync::{Arc, Mutex, PoisonError};

use super::latencies::Latencies;
use super::metrics::{self, ApiCounts};
use super::owner::Identity;
use super::resize::Size;
use super::{Answer, Call, views};
use crate::config::firecracker as fc;
use crate::machine::{DeviceId, Meters, Presence};
use crate::memory;

/// What an owner can be busy with for long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Before it starts, or goes on from where it was saved.
    Starting,
    /// It stands still while its memory is written.
    Saving,
}

impl Work {
    /// The VM's state meanwhile.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Saving => "saving",
        }
    }
}

/// How a VM stood when it was published. What is counted is read when it is asked for.
pub struct Shown {
    pub identity: Arc<Identity>,
    pub state: &'static str,
    pub work: Option<Work>,
    pub description: fc::VmDescription,
    /// What it is to be from its next start on, if that is something else.
    pub next_size: Option<Size>,
    /// Those of the machine, if there is one.
    pub devices: Option<Vec<(DeviceId, Presence)>>,
    pub meters: Option<Meters>,
    pub api: Option<ApiCounts>,
    pub latencies: Arc<Latencies>,
}

impl Shown {
    /// The answer to a call that only asks.
    #[must_use]
    pub fn answer(&self, call: &Call) -> Option<Answer> {
        Some(match call {
            Call::GetInstance => views::instance(&self.identity, self.state),
            Call::GetVersion => views::version(&self.identity),
            Call::GetDescription => views::description(&self.description),
            Call::GetMachineConfig => views::json(&self.description.machine_config.unwrap_or_default()),
            Call::GetVm => views::vm(self),
            Call::GetMetrics => Answer::Text(metrics::prometheus(&self.sample(), memory::usage().ok())),
            _ => return None,
        })
    }

    /// What has been counted by now.
    #[must_use]
    pub fn sample(&self) -> metrics::Sample {
        metrics::sample(self.meters.as_ref(), self.api.as_ref(), &self.latencies)
    }
}

/// What was published last: nothing, until there is an owner that serves.
#[derive(Default)]
pub struct View(Mutex<Option<Arc<Shown>>>);

impl View {
    pub fn publish(&self, shown: Shown) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(shown));
    }

    #[must_use]
    pub fn get(&self) -> Option<Arc<Shown>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
