//! virtio-rng: the host's entropy (virtio 1.2, section 5.4).

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::worker::{Engine, Served, Turn, Worker, serve_each};
use crate::virtio::{Chain, DeviceKind, QueueResources, QueueState, RingError, VirtioDevice, Virtqueue, feature};

const QUEUES: &[u16] = &[64];

/// Most bytes per request; the driver asks again for more. Linux asks for a few dozen.
const MAX_BYTES: usize = 4096;

pub struct Rng {
    name: String,
    worker: Worker,
}

impl Rng {
    pub fn new(name: String) -> io::Result<Self> {
        let worker = Worker::spawn(&name, Box::new(RngEngine), QUEUES)?;
        Ok(Self { name, worker })
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        feature::RING
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()> {
        self.worker.start(index, resources, state)
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.worker.stop(index)
    }
}

pub(super) struct RngEngine;

impl Engine for RngEngine {
    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |chain, _| {
            let mut bytes = [0; MAX_BYTES];
            let wanted = chain.writable.len().min(MAX_BYTES);
            // It fails, or falls short, only while the host itself has no entropy yet: the driver then asks again.
            let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
            chain.writable.copy_from(&bytes[..got]) as u32
        })
    }
}
