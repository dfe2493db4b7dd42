//! MSI-X (PCI Local Bus 3.0, 6.8.2): the vector table, and how a device's signals become messages.
//!
//! Each vector has an eventfd that the device signals. While the vector is unmasked, KVM listens on it and sends
//! the message. While it is masked, KVM does not, and the eventfd's own counter *is* the pending bit: reading
//! the pending bits looks at the counters, and unmasking lets KVM find what is there.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{PciHost, VectorStateV1};
use crate::virtio::core::SharedRegisters;
use crate::virtio::signals::{Carrier, Signals, Source};

/// "No vector": the queue or the configuration raises no interrupt (virtio 1.2, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

const ENTRY: usize = 16;
const CONTROL_OFFSET: usize = 12;
const ENTRY_MASKED: u8 = 1;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

/// A message: what is written where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// The device's side: which vector each queue uses, and the eventfds behind the vectors.
pub struct MsixCarrier {
    vectors: Vec<EventFd>,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    registers: Arc<SharedRegisters>,
}

impl MsixCarrier {
    pub fn new(vectors: usize, queues: usize, registers: Arc<SharedRegisters>) -> io::Result<Self> {
        Ok(Self {
            vectors: (0..vectors).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?,
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            registers,
        })
    }

    pub fn vector(&self, source: Source) -> u16 {
        self.vector_register(source).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
    }

    /// Sets it; a vector that is not there becomes none, which the driver reads back.
    pub fn set_vector(&self, source: Source, vector: u16) {
        if let Some(register) = self.vector_register(source) {
            let vector = if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR };
            register.store(vector, Ordering::Release);
        }
    }

    /// After a reset of the device there is nothing left to tell (virtio 1.2, 2.4.1).
    pub fn reset(&self) {
        for register in self.queue_vectors.iter().chain([&self.config_vector]) {
            register.store(NO_VECTOR, Ordering::Release);
        }
        for fd in &self.vectors {
            let _ = fd.read();
        }
    }

    pub fn has_vector(&self, vector: u16) -> bool {
        vector == NO_VECTOR || usize::from(vector) < self.vectors.len()
    }

    fn vector_register(&self, source: Source) -> Option<&AtomicU16> {
        match source {
            Source::Config => Some(&self.config_vector),
            Source::Queue(index) => self.queue_vectors.get(usize::from(index)),
        }
    }

    fn fd(&self, source: Source) -> Option<&EventFd> {
        self.vectors.get(usize::from(self.vector(source)))
    }
}

impl Carrier for MsixCarrier {
    fn raise(&self, source: Source) {
        let fd = self.fd(source);
        // A change of the configuration is told both ways (virtio 1.2, 4.1.4.5.1).
        if fd.is_none() || source == Source::Config {
            self.registers.set_isr(source.isr());
        }
        if let Some(fd) = fd {
            // It fails only when the counter is full, and then the interrupt is long pending.
            let _ = fd.write(1);
        }
    }

    /// That of the queue's vector of now: drivers choose vectors before they let a queue run.
    fn interrupt_fd(&self, queue: u16) -> Option<EventFd> {
        self.fd(Source::Queue(queue))?.try_clone().ok()
    }
}

struct Vector {
    entry: [u8; ENTRY],
    route: u32,
    connected: Option<MsiMessage>,
}

/// The driver's side: the table and its masks.
pub struct MsixTable {
    vectors: Vec<Vector>,
    signals: Arc<Signals<MsixCarrier>>,
    host: Arc<dyn PciHost>,
    control: u16,
}

impl MsixTable {
    pub fn new(signals: Arc<Signals<MsixCarrier>>, host: Arc<dyn PciHost>) -> io::Result<Self> {
        let mut table = Self { vectors: Vec::new(), signals, host, control: 0 };
        for _ in 0..table.signals.carrier.vectors.len() {
            let mut entry = [0; ENTRY];
            entry[CONTROL_OFFSET] = ENTRY_MASKED;
            table.vectors.push(Vector { entry, route: table.host.allocate_route()?, connected: None });
        }
        Ok(table)
    }

    pub fn set_control(&mut self, control: u16) {
        if control != self.control {
            self.control = control;
            (0..self.vectors.len()).for_each(|index| self.update(index));
        }
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((index, at)) = locate(offset, data.len())
            && let Some(vector) = self.vectors.get(index)
        {
            data.copy_from_slice(&vector.entry[at..at + data.len()]);
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((index, at)) = locate(offset, data.len())
            && let Some(vector) = self.vectors.get_mut(index)
        {
            vector.entry[at..at + data.len()].copy_from_slice(data);
            self.update(index);
        }
    }

    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (index, (vector, fd)) in self.vectors.iter().zip(&self.signals.carrier.vectors).enumerate() {
            let byte = (index / 8) as u64;
            if vector.connected.is_none() && (offset..offset + data.len() as u64).contains(&byte) && is_signalled(fd) {
                data[(byte - offset) as usize] |= 1 << (index % 8);
            }
        }
    }

    /// All vectors, while the device is silent.
    pub fn save(&self) -> Vec<VectorStateV1> {
        let vectors = self.vectors.iter().zip(&self.signals.carrier.vectors);
        let save = |(vector, fd): (&Vector, &EventFd)| {
            let [address, rest] = vector.words();
            let pending = vector.connected.is_none() && is_signalled(fd);
            VectorStateV1 { address, data: rest as u32, control: (rest >> 32) as u32, pending }
        };
        vectors.map(save).collect()
    }

    /// Takes up as many vectors as there are here.
    ///
    /// # Errors
    /// When the host does not take a message.
    pub fn restore(&mut self, vectors: &[VectorStateV1], control: u16) -> io::Result<()> {
        for ((vector, fd), saved) in self.vectors.iter_mut().zip(&self.signals.carrier.vectors).zip(vectors) {
            vector.entry[..8].copy_from_slice(&saved.address.to_le_bytes());
            vector.entry[8..12].copy_from_slice(&saved.data.to_le_bytes());
            vector.entry[12..].copy_from_slice(&saved.control.to_le_bytes());
            if saved.pending {
                fd.write(1)?;
            }
        }
        self.control = control;
        (0..self.vectors.len()).try_for_each(|index| self.try_update(index))
    }

    fn update(&mut self, index: usize) {
        if let Err(error) = self.try_update(index) {
            let message = self.vectors[index].message();
            crate::observe::guest_warning!("MSI-X message {message:x?} is refused: {error}");
        }
    }

    /// Makes KVM listen exactly to what is unmasked, with the message of now.
    fn try_update(&mut self, index: usize) -> io::Result<()> {
        let vector = &mut self.vectors[index];
        let on = self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE;
        let wanted = (on && vector.entry[CONTROL_OFFSET] & ENTRY_MASKED == 0).then(|| vector.message());
        if wanted == vector.connected {
            return Ok(());
        }
        let fd = &self.signals.carrier.vectors[index];
        if vector.connected.take().is_some() {
            self.host.disconnect(vector.route, fd);
        }
        if let Some(message) = wanted {
            self.host.connect(vector.route, message, fd)?;
            vector.connected = wanted;
        }
        Ok(())
    }
}

impl Drop for MsixTable {
    fn drop(&mut self) {
        self.set_control(0);
        self.vectors.iter().for_each(|vector| self.host.release_route(vector.route));
    }
}

impl Vector {
    fn message(&self) -> MsiMessage {
        let [address, rest] = self.words();
        MsiMessage { address: address & !3, data: rest as u32 }
    }

    /// The address; the data, and the vector control in the upper half.
    fn words(&self) -> [u64; 2] {
        [0, 8].map(|at| u64::from_le_bytes(self.entry[at..at + 8].try_into().expect("8 bytes")))
    }
}

/// Entry and offset of an access: aligned words or double words (6.8.2), so none spans two entries.
fn locate(offset: u64, len: usize) -> Option<(usize, usize)> {
    let offset = usize::try_from(offset).ok()?;
    ([4, 8].contains(&len) && offset.is_multiple_of(len)).then_some((offset / ENTRY, offset % ENTRY))
}

/// Is the counter not zero? It is taken out and put back: nobody else reads it while KVM does not listen.
fn is_signalled(fd: &EventFd) -> bool {
    fd.read().is_ok_and(|count| fd.write(count).is_ok())
}
