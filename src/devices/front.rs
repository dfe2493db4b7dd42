//! The side of a device that its transport sees: who it is, what it offers, and who serves which queue.

use std::io;
use std::time::Duration;

use crate::virtio::{DeviceKind, OwnStateV1, QueueResources, QueueState, StateError, StillBusy, VirtioDevice};

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

    /// See [`VirtioDevice::continue_queue`].
    fn go_on(&mut self, _index: u16) {}
}

/// A device's configuration space, and what else its driver tells it besides the queues.
pub trait DeviceConfig: Send {
    /// Reads; bytes past the end stay zero.
    fn read(&self, offset: usize, data: &mut [u8]);

    /// See [`VirtioDevice::reset`].
    fn reset(&self) {}

    /// See [`VirtioDevice::save`]; these features are offered.
    fn save(&self, offered: u64) -> OwnStateV1;

    /// See [`VirtioDevice::check`].
    fn check(&self, own: &OwnStateV1, offered: u64, accepted: u64) -> Result<(), StateError>;

    /// See [`VirtioDevice::restore`].
    fn restore(&self, own: &OwnStateV1) -> io::Result<bool>;
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
    without: Option<Without>,
    /// By queue: the server that it runs on.
    running: Vec<Option<usize>>,
}

/// Where queues are when a feature has not been negotiated.
struct Without {
    feature: u64,
    /// Those that keep their server.
    same: u16,
    /// The server of the one that comes then, and is the last.
    server: usize,
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
        let (sizes, server_of): (Vec<_>, Vec<_>) = queues.iter().map(|&(_, size, at)| (size, at)).unzip();
        let running = vec![None; queues.len()];
        Self { kind, name, features, config: Box::new(config), servers, sizes, server_of, without: None, running }
    }

    /// Of a device whose driver finds fewer queues if it does not take `feature`: the first `same` ones as they are,
    /// and then one more, the last, which a server takes under this index too.
    #[must_use]
    pub fn fewer_queues_without(mut self, feature: u64, same: u16, server: usize) -> Self {
        self.without = Some(Without { feature, same, server });
        self
    }

    /// The server of a queue, under the features that the driver accepted.
    fn server_of(&self, index: u16, features: u64) -> Option<usize> {
        match &self.without {
            Some(without) if features & without.feature == 0 && index >= without.same => {
                (index == without.same).then_some(without.server)
            }
            _ => self.server_of.get(usize::from(index)).copied(),
        }
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
        let server = self.server_of(index, resources.features).ok_or(io::ErrorKind::InvalidInput)?;
        if self.running[usize::from(index)].is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.servers[server].start(index, resources, state)?;
        self.running[usize::from(index)] = Some(server);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let server = self.running.get_mut(usize::from(index))?.take()?;
        self.servers[server].stop(index)
    }

    fn continue_queue(&mut self, index: u16) {
        if let Some(&Some(server)) = self.running.get(usize::from(index)) {
            self.servers[server].go_on(index);
        }
    }

    fn reset(&mut self) {
        self.config.reset();
    }

    fn save(&self) -> OwnStateV1 {
        self.config.save(self.features)
    }

    fn check(&self, state: &OwnStateV1, features: u64) -> Result<(), StateError> {
        self.config.check(state, self.features, features)
    }

    fn restore(&mut self, state: &OwnStateV1) -> io::Result<bool> {
        self.config.restore(state)
    }

    fn stop_queue_within(&mut self, index: u16, patience: Duration) -> Result<Option<QueueState>, StillBusy> {
        let Some(running) = self.running.get_mut(usize::from(index)) else { return Ok(None) };
        let Some(server) = *running else { return Ok(None) };
        let state = self.servers[server].stop_within(index, patience)?;
        *running = None;
        Ok(state)
    }
}
