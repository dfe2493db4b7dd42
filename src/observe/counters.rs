//! What a VM counts: cheap enough for every request and every exit.

use std::sync::atomic::{AtomicU64, Ordering};

/// Only ever grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn count(&self) {
        self.add(1);
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a device, or one direction of it, has done.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Requests, or frames.
    pub operations: Counter,
    /// Of data.
    pub bytes: Counter,
    /// How often one had to wait for the limits.
    pub throttled: Counter,
    /// What the host could not do, or would not take.
    pub failed: Counter,
    /// Of those above, writes to a disk; and flushes.
    pub writes: Counter,
    pub written_bytes: Counter,
    pub flushes: Counter,
}

/// What a vCPU left the guest for.
#[derive(Debug, Default)]
pub struct Exits {
    pub port_reads: Counter,
    pub port_writes: Counter,
    pub mmio_reads: Counter,
    pub mmio_writes: Counter,
    /// What it could not go on from.
    pub failures: Counter,
}
