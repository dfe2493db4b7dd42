//! ACPI tables for a hardware-reduced platform (ACPI 6.4, section 3.11.1): no PM timer, no SCI, no FACS.
//!
//! The guest finds the RSDP at [`layout::ACPI`]; everything it points to follows within the same area.

mod dsdt;
mod tables;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{self, MmioPlace};
use crate::memory::RamRegions;

/// What the tables say that is not the same for every VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of vCPUs; the APIC ID of each is its index.
    pub cpus: u16,
    pub pci: Option<PciTables>,
    pub virtio_mmio: Vec<MmioPlace>,
}

/// A PCI root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciTables {
    /// Where 64-bit BARs may go: guest physical start, and end (exclusive).
    pub window_64: Option<(u64, u64)>,
}

#[derive(Debug, Error)]
pub enum AcpiError {
    #[error("the ACPI tables take {needed} bytes, but there is room for {room} ({cpus} vCPUs)")]
    TooLarge { needed: usize, room: usize, cpus: u16 },
    #[error("the 64-bit PCI window {start:#x}..{end:#x} is empty")]
    EmptyWindow { start: u64, end: u64 },
    #[error("cannot write the ACPI tables to guest memory")]
    Ram(#[from] GuestMemoryError),
}

const ROOM: usize = (layout::ACPI_END - layout::ACPI) as usize;

/// Writes the tables to guest memory and returns the RSDP's address.
///
/// # Errors
/// When the tables do not fit or guest memory has a hole at [`layout::ACPI`].
pub fn write(ram: &RamRegions, config: &AcpiConfig) -> Result<u64, AcpiError> {
    let area = build(config)?;
    ram.write_slice(&area, GuestAddress(layout::ACPI))?;
    Ok(layout::ACPI)
}

/// The bytes from [`layout::ACPI`] on.
fn build(config: &AcpiConfig) -> Result<Vec<u8>, AcpiError> {
    let window = config.pci.as_ref().and_then(|pci| pci.window_64);
    if let Some((start, end)) = window.filter(|(start, end)| start >= end) {
        return Err(AcpiError::EmptyWindow { start, end });
    }
    let mut area = Area::new();
    let dsdt = area.place(&dsdt::build(config));
    let mut entries = vec![area.place(&tables::fadt(dsdt)), area.place(&tables::madt(config.cpus))];
    if config.pci.is_some() {
        entries.push(area.place(&tables::mcfg()));
    }
    let xsdt = area.place(&tables::xsdt(&entries));
    area.finish(xsdt, config.cpus)
}

/// Tables in a row, the RSDP's place kept free in front of them.
struct Area(Vec<u8>);

impl Area {
    /// The RSDP takes 36 bytes; a cache line is its nearest round size.
    const RSDP_ROOM: usize = 64;

    fn new() -> Self {
        let mut bytes = Vec::with_capacity(8192);
        bytes.resize(Self::RSDP_ROOM, 0);
        Self(bytes)
    }

    /// Appends a table and returns its guest physical address.
    fn place(&mut self, table: &[u8]) -> u64 {
        let at = self.0.len().next_multiple_of(16);
        self.0.resize(at, 0);
        self.0.extend_from_slice(table);
        layout::ACPI + at as u64
    }

    fn finish(self, xsdt: u64, cpus: u16) -> Result<Vec<u8>, AcpiError> {
        let Self(mut bytes) = self;
        if bytes.len() > ROOM {
            return Err(AcpiError::TooLarge { needed: bytes.len(), room: ROOM, cpus });
        }
        let rsdp = tables::rsdp(xsdt);
        bytes[..rsdp.len()].copy_from_slice(&rsdp);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
