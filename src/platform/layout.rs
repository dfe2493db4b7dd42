//! The guest physical address space, in one place. Addresses and sizes in bytes.
//!
//! ```text
//! 0            real-mode area, zero page, page tables, command line
//! 0xe_0000     RSDP and ACPI tables; in the last 32 bytes the VM generation ID and the reset vector
//! 0x10_0000    kernel, initrd, RAM ...
//! 0xc000_0000  boot mark, event device, virtio over MMIO     ┐
//! 0xd000_0000  32-bit PCI window                            │ the gap: no RAM
//! 0xe000_0000  PCI configuration space (ECAM)               │
//! 0xfec0_0000  IOAPIC, LAPIC, KVM's own pages               ┘
//! 4 GiB        RAM beyond 3 GiB
//! ```

use vm_memory::GuestAddress;

use crate::virtio::mmio;

/// GDT for the 64-bit entry.
pub const GDT: u64 = 0x500;
/// PVH start info, its memory map and module list.
pub const PVH_INFO: u64 = 0x6000;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Identity-mapped page tables for the 64-bit entry: PML4, PDPT, then PDs for the first 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, its final NUL included.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// End of the RAM below the legacy hole.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI: the RSDP first, the other tables behind it.
pub const ACPI: u64 = 0xe_0000;
pub const ACPI_END: u64 = GENERATION_ID;
/// The VM generation ID, 16 bytes.
pub const GENERATION_ID: u64 = 0xf_ffe0;
/// Where a real-mode `ljmp $0xf000, $0xfff0` leads: what a PC's firmware starts with.
pub const RESET_VECTOR: u64 = 0xf_fff0;
pub const HIGH_RAM: u64 = 0x10_0000;

/// No RAM from here ...
pub const GAP_START: u64 = 0xc000_0000;
/// ... up to here.
pub const GAP_END: u64 = 0x1_0000_0000;

/// Boot mark: the guest writes the byte 123 when userspace starts.
pub const BOOT_MARK: u64 = 0xc000_0000;
/// Registers of the ACPI generic event device.
pub const EVENT_DEVICE: u64 = 0xc000_1000;
pub const EVENT_DEVICE_SIZE: u64 = 0x1000;

/// Virtio devices over MMIO, a page each.
pub const VIRTIO_MMIO: u64 = 0xc000_2000;
/// Their lines: all pins of the IOAPIC that nothing else uses and no PC has ever wired to something else.
const VIRTIO_MMIO_GSIS: [u32; 16] = [6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

pub const PCI_WINDOW: u64 = 0xd000_0000;
pub const PCI_WINDOW_SIZE: u64 = 0x1000_0000;
pub const ECAM: u64 = 0xe000_0000;
/// One bus: 1 MiB.
pub const ECAM_SIZE: u64 = 0x10_0000;

/// Devices of bus 0 a guest may see come and go; device 0 is the host bridge.
pub const PCI_HOTPLUG_SLOTS: std::ops::RangeInclusive<u8> = 1..=31;

pub const IOAPIC: u64 = 0xfec0_0000;
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages KVM needs on Intel, and one more for its identity map.
pub const KVM_TSS: u64 = 0xfffb_d000;
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Legacy interrupt lines (GSIs, through the IOAPIC).
pub const SERIAL_GSI: u32 = 4;
pub const EVENT_GSI: u32 = 5;
/// The IOAPIC has this many pins; MSI routes get the GSIs after them.
pub const IOAPIC_PINS: u32 = 24;

pub const SERIAL_PORT: u16 = 0x3f8;
pub const I8042_COMMAND_PORT: u16 = 0x64;
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
pub const RESET_PORT: u16 = 0x602;
pub const RESET_VALUE: u8 = 1;

/// Where a virtio device over MMIO is: address, GSI, and whether others use the same line.
///
/// With more devices than lines, each line is the next device's again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioPlace {
    pub address: u64,
    pub gsi: u32,
    pub shared: bool,
}

/// The places of `count` virtio devices over MMIO.
#[must_use]
pub fn virtio_mmio(count: usize) -> Vec<MmioPlace> {
    let lines = VIRTIO_MMIO_GSIS.len();
    let place = |index: usize| MmioPlace {
        address: VIRTIO_MMIO + index as u64 * mmio::REGISTERS_SIZE,
        gsi: VIRTIO_MMIO_GSIS[index % lines],
        shared: index >= lines || index + lines < count,
    };
    (0..count).map(place).collect()
}

/// Where `size` bytes of RAM go: around the gap.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(GAP_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(GAP_END), size - low));
    }
    ranges
}

/// Where 64-bit BARs may go, by the guest's physical address bits: the upper half of what Linux maps with four
/// levels of page tables. `None` where that half starts within reach of RAM.
#[must_use]
pub fn pci_window_64(address_bits: u8) -> Option<(u64, u64)> {
    let bits = address_bits.min(46);
    (bits >= 38).then(|| (1 << (bits - 1), 1 << bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_share_lines_only_when_there_are_too_many() {
        let places = virtio_mmio(31);
        assert!(places.is_sorted_by(|a, b| a.address + 0x1000 == b.address));
        assert!(places.last().unwrap().address < PCI_WINDOW);
        for count in [1, 16, 17, 31] {
            let places = virtio_mmio(count);
            for place in &places {
                let users = places.iter().filter(|other| other.gsi == place.gsi).count();
                assert_eq!(place.shared, users > 1, "{place:?} of {count}");
                assert!(![0, 2, SERIAL_GSI, EVENT_GSI].contains(&place.gsi) && place.gsi < IOAPIC_PINS);
            }
        }
    }

    #[test]
    fn ram_goes_around_the_gap() {
        assert_eq!(ram_ranges(128 << 20), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ram_ranges(GAP_START), [(GuestAddress(0), GAP_START)]);
        assert_eq!(ram_ranges(5 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }
}
