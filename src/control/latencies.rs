//! How long what takes long has taken, as Firecracker's metrics tell it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use super::{Answerer, Call};
use crate::config::firecracker as fc;

/// The group of the metrics.
pub const GROUP: &str = "latencies_us";
const NAMES: [&str; 5] = ["full_create_snapshot", "diff_create_snapshot", "load_snapshot", "pause_vm", "resume_vm"];

/// For each of [`NAMES`] the microseconds of the last one that was a success, 0 before there is one.
#[derive(Debug, Default)]
pub struct Latencies([AtomicU64; NAMES.len()]);

fn name_of(call: &Call) -> Option<&'static str> {
    Some(match call {
        Call::CreateFiles(request) => match request.snapshot_type {
            fc::SnapshotType::Full => NAMES[0],
            fc::SnapshotType::Diff => NAMES[1],
        },
        Call::LoadFiles(_) => NAMES[2],
        Call::SetState(fc::WantedState::Paused) => NAMES[3],
        Call::SetState(fc::WantedState::Resumed) => NAMES[4],
        _ => return None,
    })
}

impl Latencies {
    /// An answerer that also takes the time from now on, if it is for one of those calls.
    pub fn timed(self: &Arc<Self>, call: &Call, answerer: Answerer) -> Answerer {
        let Some(place) = name_of(call).and_then(|name| NAMES.iter().position(|known| *known == name)) else {
            return answerer;
        };
        let (this, begun) = (self.clone(), Instant::now());
        Box::new(move |answer| {
            if answer.is_ok() {
                // One that took no time has been, too.
                let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
                this.0[place].store(micros, Relaxed);
            }
            answerer(answer);
        })
    }

    /// Names and microseconds: what the API's client waits for, and, as that is all of it here, what the VMM takes.
    pub fn all(&self) -> impl Iterator<Item = (String, u64)> {
        NAMES.iter().zip(&self.0).flat_map(|(name, micros)| {
            let micros = micros.load(Relaxed);
            [((*name).to_owned(), micros), (format!("vmm_{name}"), micros)]
        })
    }
}
