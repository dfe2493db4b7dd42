//! The memory map that the kernel is told, in either boot protocol.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::RamRegions;
use crate::platform::layout;

/// What a range is for. The numbers are those of E820, which PVH shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// A range of guest physical addresses; sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub addr: u64,
    pub size: u64,
    pub kind: Kind,
}

/// The map, in ascending order. What it does not name is free for devices.
pub fn memory_map(ram: &RamRegions) -> Vec<Range> {
    let mut map = vec![
        // Not memory to be reused: the reset vector behind the ACPI tables is for the guest's end.
        range(layout::ACPI, layout::HIGH_RAM, Kind::Reserved),
        // Linux uses PCI's memory-mapped configuration space only where the firmware reserves it.
        range(layout::ECAM, layout::ECAM + layout::ECAM_SIZE, Kind::Reserved),
    ];
    for region in ram.iter() {
        let start = region.start_addr().0;
        let end = start + region.len();
        // Below 1 MiB, a PC's kernel expects RAM up to the BIOS data area only.
        if start < layout::LOW_RAM_END {
            map.push(range(start, end.min(layout::LOW_RAM_END), Kind::Ram));
        }
        if end > layout::HIGH_RAM {
            map.push(range(start.max(layout::HIGH_RAM), end, Kind::Ram));
        }
    }
    map.sort_unstable_by_key(|range| range.addr);
    map
}

fn range(start: u64, end: u64, kind: Kind) -> Range {
    Range { addr: start, size: end - start, kind }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;

    #[test]
    fn the_map_goes_around_holes() {
        let ram = anonymous(&layout::ram_ranges(4 << 30)).unwrap();
        let expected = [
            (0, 0x9_fc00, Kind::Ram),
            (0xe_0000, 0x10_0000, Kind::Reserved),
            (0x10_0000, 3 << 30, Kind::Ram),
            (0xe000_0000, 0xe010_0000, Kind::Reserved),
            (4 << 30, 5 << 30, Kind::Ram),
        ];
        assert_eq!(memory_map(&ram), expected.map(|(start, end, kind)| range(start, end, kind)));
    }
}
