//! The side of a device that its transport sees: who it is, what it offers, and who serves which queue.

use std::io;
use std::time::Duration;

use crate::virtio::device::read_config_bytes;
use crate::virtio::{DeviceKind, QueueResources, QueueState, StillBusy, VirtioDevice};

/// Serves some of a device's queues: a thread of ours, or the host's kernel.
pub trait QueueServer: Send {
    /// The index and largest size of each of its queues.
    fn queues(&self) -> &[(u16, u16)];

    /// See [`VirtioDevice::start_queue`].
    fn start(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()>;

    /// See [`VirtioDevice::stop_queue`].
    fn stop(&mut self, index: u16) -> Option<QueueState>;

    /// See [`VirtioDevice::stop_queue_within`].
    fn stop_within(&mut self, index: u16, _patience: Duration) -> Result<Option<QueueState>, StillBusy> {
        Ok(self.stop(index))
    }
}

/// A device's configuration space.
pub trait DeviceConfig: Send {
    /// Reads; bytes past the end stay zero.
    fn read(&self, offset: usize, data: &mut [u8]);
}

/// One that nothing changes.
impl DeviceConfig for Vec<u8> {
    fn read(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(self, offset, data);
    }
}

/// A device.
pub struct Front {
    kind: DeviceKind,
    name: String,
    features: u64,
    config: Box<dyn DeviceConfig>,
    servers: Vec<Box<dyn QueueServer>>,
    sizes: Vec<u16>,
    /// By queue: its server.
    server_of: Vec<usize>,
}

impl Front {
    /// # Panics
    /// If the servers' queues are not 0 to n, each once.
    #[must_use]
    pub fn new(
        kind: DeviceKind,
        name: String,
        features: u64,
        config: impl DeviceConfig + 'static,
        servers: Vec<Box<dyn QueueServer>>,
    ) -> Self {
        let mut queues: Vec<(u16, u16, usize)> = Vec::new();
        for (server, at) in servers.iter().zip(0..) {
            queues.extend(server.queues().iter().map(|&(index, size)| (index, size, at)));
        }
        queues.sort_unstable();
        assert!(queues.iter().zip(0..).all(|(queue, index)| queue.0 == index), "{name}: queues without a server");
        let sizes = queues.iter().map(|queue| queue.1).collect();
        let server_of = queues.iter().map(|queue| queue.2).collect();
        Self { kind, name, features, config: Box::new(config), servers, sizes, server_of }
    }

    fn server(&mut self, index: u16) -> Option<&mut (dyn QueueServer + 'static)> {
        let at = *self.server_of.get(usize::from(index))?;
        Some(&mut *self.servers[at])
    }
}

impl VirtioDevice for Front {
    fn kind(&self) -> DeviceKind {
        self.kind
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> io::Result<()> {
        self.server(index).ok_or(io::ErrorKind::InvalidInput)?.start(index, resources, state)
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.server(index)?.stop(index)
    }

    fn stop_queue_within(&mut self, index: u16, patience: Duration) -> Result<Option<QueueState>, StillBusy> {
        self.server(index).map_or(Ok(None), |server| server.stop_within(index, patience))
    }
}
