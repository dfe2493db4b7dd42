//! Writes down a real guest's accesses, as the input of the targets that replay them.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use super::machine::access;
use crate::cpu::{ExitHandler, VcpuFault};

/// Where to, in the environment.
const VARIABLE: &str = "TRANCHE_RECORD";

/// Seeds need not be long: a driver has done all it knows by then.
const MAX_BYTES: usize = 16 << 10;

struct Recorder {
    inner: Arc<dyn ExitHandler>,
    /// The file, and how many bytes more it may get.
    to: Mutex<(File, usize)>,
}

/// A handler that does as `inner` does, and writes it down if the environment names a file.
///
/// # Panics
/// If the file cannot be made.
pub fn recorded(inner: Arc<dyn ExitHandler>) -> Arc<dyn ExitHandler> {
    let Some(path) = std::env::var_os(VARIABLE) else { return inner };
    let file = File::create(&path).unwrap_or_else(|error| panic!("{VARIABLE}: {}: {error}", path.display()));
    Arc::new(Recorder { inner, to: Mutex::new((file, MAX_BYTES)) })
}

impl Recorder {
    fn record(&self, kind: u8, at: &[u8], data: &[u8]) {
        if !matches!(data.len(), 1 | 2 | 4 | 8) {
            return;
        }
        let written = if kind & access::WRITE != 0 { data } else { &[] };
        let entry = [&[kind | (data.len().ilog2() as u8) << access::WIDTH_SHIFT], at, written].concat();
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = to.1.checked_sub(entry.len())
            && to.0.write_all(&entry).is_ok()
        {
            to.1 = left;
        }
    }

    fn record_port(&self, kind: u8, port: u16, data: &[u8]) {
        // The serial port is no part of the machine that is fuzzed.
        if !(0x3f8..0x400).contains(&port) {
            self.record(kind | access::PORT, &port.to_le_bytes(), data);
        }
    }

    fn record_mmio(&self, kind: u8, addr: u64, data: &[u8]) {
        if let Ok(addr) = u32::try_from(addr) {
            self.record(kind | access::ADDRESS, &addr.to_le_bytes(), data);
        }
    }
}

impl ExitHandler for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.record_port(0, port, data);
        self.inner.port_read(port, data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.record_port(access::WRITE, port, data);
        self.inner.port_write(port, data);
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.record_mmio(0, addr, data);
        self.inner.mmio_read(addr, data);
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.record_mmio(access::WRITE, addr, data);
        self.inner.mmio_write(addr, data);
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }

    fn fault(&self, fault: VcpuFault) {
        self.inner.fault(fault);
    }

    fn first_entry(&self) {
        self.inner.first_entry();
    }

    fn all_parked(&self) {
        self.inner.all_parked();
    }
}
