//! The static tables: RSDP, XSDT, FADT, MADT, MCFG (ACPI 6.4, section 5.2).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;

use crate::platform::layout;

const OEM: [u8; 6] = *b"TRNCHE";
const OEM_TABLE: [u8; 8] = *b"TRANCHE ";
const OEM_REVISION: u32 = 1;

/// A table of one header and `body`, checksum included.
pub(super) fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(*signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(body);
    bytes_of(&sdt)
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Section 5.2.5.3.
pub(super) fn rsdp(xsdt: u64) -> Vec<u8> {
    bytes_of(&Rsdp::new(OEM, xsdt))
}

/// Section 5.2.8.
pub(super) fn xsdt(entries: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    table(b"XSDT", 1, &body)
}

/// IA-PC boot architecture flags (section 5.2.9.3). "8042 present" stays clear although the reset command
/// works: a guest that looked for a keyboard would wait for one in vain.
mod boot_arch {
    pub const NO_VGA: u16 = 1 << 2;
    pub const NO_ASPM: u16 = 1 << 4;
    pub const NO_CMOS_RTC: u16 = 1 << 5;
}

/// Section 5.2.9, with what a hardware-reduced platform needs only.
pub(super) fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Buttons are devices of the DSDT, not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.fadt_minor_version = 4;
    fadt.iapc_boot_arch = (boot_arch::NO_VGA | boot_arch::NO_ASPM | boot_arch::NO_CMOS_RTC).into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    bytes_of(&fadt.finalize())
}

const ENABLED: u32 = 1;
/// 255 is the xAPIC's broadcast ID: from there on a CPU needs an x2APIC entry.
const FIRST_X2APIC_ID: u32 = 255;

/// Section 5.2.12. The flags stay zero: there is no 8259 that a guest would have to mask.
pub(super) fn madt(cpus: u16) -> Vec<u8> {
    let mut body = Vec::with_capacity(32 + 16 * usize::from(cpus));
    body.extend((layout::LAPIC as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for id in 0..u32::from(cpus) {
        match u8::try_from(id) {
            // Processor local APIC (5.2.12.2): type, length, UID, APIC ID, flags.
            Ok(id) if u32::from(id) < FIRST_X2APIC_ID => {
                body.extend([0, 8, id, id]);
                body.extend(ENABLED.to_le_bytes());
            }
            // Processor local x2APIC (5.2.12.12): type, length, reserved, x2APIC ID, flags, UID.
            _ => {
                body.extend([9, 16, 0, 0]);
                for word in [id, ENABLED, id] {
                    body.extend(word.to_le_bytes());
                }
            }
        }
    }
    // I/O APIC (5.2.12.3): type, length, ID, reserved, address, first GSI.
    body.extend([1, 12, 0, 0]);
    body.extend((layout::IOAPIC as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    table(b"APIC", 5, &body)
}

/// PCI firmware specification 3.3, section 4.1.2: one segment, one bus.
pub(super) fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    bytes_of(&mcfg)
}
