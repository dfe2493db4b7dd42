//! The tables a processor needs to be in 64-bit mode when the kernel is entered there: Intel SDM volume 3, sections
//! 3.4.5 (descriptors) and 4.5 (4-level paging).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::IntoBytes;

use crate::cpu::gdt;
use crate::memory::RamRegions;
use crate::platform::layout;

const ENTRIES: usize = 512;
const TABLE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
/// Page directories: one per GiB.
const DIRECTORIES: usize = 4;

/// Writes the GDT, and page tables that map the first 4 GiB to themselves.
pub fn write_tables(ram: &RamRegions) -> Result<(), GuestMemoryError> {
    const { assert!(layout::PAGE_TABLES + (2 + DIRECTORIES as u64) * TABLE <= layout::CMDLINE) };
    let mut tables = vec![[0u64; ENTRIES]; 2 + DIRECTORIES];
    tables[0][0] = (layout::PAGE_TABLES + TABLE) | PRESENT_WRITABLE;
    for (i, entry) in tables[1][..DIRECTORIES].iter_mut().enumerate() {
        *entry = (layout::PAGE_TABLES + (2 + i as u64) * TABLE) | PRESENT_WRITABLE;
    }
    for (i, entry) in tables[2..].as_flattened_mut().iter_mut().enumerate() {
        *entry = (i as u64 * LARGE_PAGE) | PRESENT_WRITABLE | LARGE;
    }
    ram.write_slice(tables.as_bytes(), GuestAddress(layout::PAGE_TABLES))?;
    ram.write_slice(gdt::TABLE.as_bytes(), GuestAddress(layout::GDT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;

    #[test]
    fn every_address_below_4_gib_maps_to_itself() {
        let ram = anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&ram).unwrap();
        let entry = |table: u64, index: u64| -> u64 { ram.read_obj(GuestAddress(table + index * 8)).unwrap() };
        for addr in [0, 0x1234, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff_u64] {
            let pdpt = entry(layout::PAGE_TABLES, addr >> 39 & 511) & !0xfff;
            let pd = entry(pdpt, addr >> 30 & 511) & !0xfff;
            let page = entry(pd, addr >> 21 & 511);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) + (addr & 0x1f_ffff), addr);
        }
        assert_eq!(entry(layout::GDT, 2), gdt::TABLE[2]);
    }
}
