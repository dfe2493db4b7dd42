//! virtio-rng: the host's entropy (virtio 1.2, section 5.4).

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};

use super::front::{DeviceConfig, Front};
use super::worker::{Engine, Served, Turn, Worker, serve_each};
use crate::backend::Limiter;
use crate::virtio::{Chain, DeviceKind, OwnStateV1, RingError, StateError, Virtqueue, feature};

const QUEUES: &[(u16, u16)] = &[(0, 64)];

/// Most bytes per request; the driver asks again for more. Linux asks for a few dozen.
const MAX_BYTES: usize = 4096;

pub fn device(name: String, limiter: Arc<Limiter>) -> io::Result<Front> {
    let worker = Worker::spawn(&name, Box::new(RngEngine { limiter }), QUEUES)?;
    Ok(Front::new(DeviceKind::Rng, name, feature::RING, NoConfig, vec![Box::new(worker)]))
}

/// A device with nothing to configure, and nothing to tell it besides its queue.
pub(crate) struct NoConfig;

const STATE_VERSION: u32 = 1;

impl DeviceConfig for NoConfig {
    fn read(&self, _offset: usize, _data: &mut [u8]) {}

    fn save(&self, _offered: u64) -> OwnStateV1 {
        OwnStateV1::new(DeviceKind::Rng, STATE_VERSION, &())
    }

    fn check(&self, own: &OwnStateV1, _offered: u64, _accepted: u64) -> Result<(), StateError> {
        own.parse(DeviceKind::Rng, STATE_VERSION)
    }

    fn restore(&self, _own: &OwnStateV1) -> io::Result<bool> {
        Ok(false)
    }
}

#[derive(Default)]
pub(crate) struct RngEngine {
    pub limiter: Arc<Limiter>,
}

impl Engine for RngEngine {
    fn serve(&mut self, queue: &mut Virtqueue, chain: &mut Chain, turn: &mut Turn<'_>) -> Result<Served, RingError> {
        serve_each(queue, chain, turn, |chain, _| {
            let mut bytes = [0; MAX_BYTES];
            let wanted = chain.writable.len().min(MAX_BYTES);
            self.limiter.take(wanted as u64)?;
            // It fails, or falls short, only while the host itself has no entropy yet: the driver then asks again.
            let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
            if got < wanted {
                self.limiter.traffic.failed.count();
            }
            Ok(chain.writable.copy_from(&bytes[..got]) as u32)
        })
    }

    fn limiters(&self) -> Vec<Arc<Limiter>> {
        vec![self.limiter.clone()]
    }
}
