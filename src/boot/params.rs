//! What the kernel is told in memory: PVH's start info, or the zero page of Linux's own boot protocol.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::{Immutable, IntoBytes};

use super::bzimage::{HEADER_MAGIC, HEADER_START, SetupHeader};
use super::memory_map::{Range, memory_map};
use crate::memory::RamRegions;
use crate::platform::layout;

/// What both protocols tell. Addresses are guest physical, sizes in bytes.
pub struct Params<'a> {
    /// The setup header of the bzImage the kernel comes from.
    pub header: Option<&'a SetupHeader>,
    /// Address and size.
    pub initrd: Option<(u64, u64)>,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
}

impl Params<'_> {
    /// Writes `struct hvm_start_info`, version 1, with its lists. See Xen's public/arch-x86/hvm/start_info.h.
    pub fn write_start_info(&self, ram: &RamRegions) -> Result<(), GuestMemoryError> {
        const MODULES: u64 = layout::PVH_INFO + 0x40;
        const MEMORY_MAP: u64 = layout::PVH_INFO + 0x80;
        let map: Vec<_> = memory_map(ram)
            .iter()
            .map(|&Range { addr, size, kind }| MapEntry { addr, size, kind: kind as u32, reserved: 0 })
            .collect();
        let modules: Vec<_> =
            self.initrd.iter().map(|&(addr, size)| Module { addr, size, cmdline: 0, reserved: 0 }).collect();
        let info = StartInfo {
            magic: 0x336e_c578,
            version: 1,
            flags: 0,
            modules: modules.len() as u32,
            module_list: if modules.is_empty() { 0 } else { MODULES },
            cmdline: layout::CMDLINE,
            rsdp: self.rsdp,
            memory_map: MEMORY_MAP,
            memory_map_entries: map.len() as u32,
            reserved: 0,
        };
        ram.write_slice(info.as_bytes(), GuestAddress(layout::PVH_INFO))?;
        ram.write_slice(modules.as_bytes(), GuestAddress(MODULES))?;
        ram.write_slice(map.as_bytes(), GuestAddress(MEMORY_MAP))
    }

    /// Writes `struct boot_params`. See Linux's Documentation/arch/x86/zero-page.rst; offsets are from there and,
    /// for the setup header, from boot.rst.
    pub fn write_zero_page(&self, ram: &RamRegions) -> Result<(), GuestMemoryError> {
        let mut page = ZeroPage(Box::new([0; 4096]));
        match self.header {
            Some(header) => page.put(HEADER_START, header.bytes()),
            None => {
                page.put(0x1fe, &0xaa55_u16.to_le_bytes());
                page.put(0x202, &HEADER_MAGIC);
                page.put(0x206, &0x20f_u16.to_le_bytes());
                page.put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
                page.put(0x238, &super::cmdline::ELF_LIMIT.to_le_bytes());
            }
        }
        page.put(0x210, &[0xff]); // type_of_loader: none of the registered ones
        page.put(0x211, &[1]); // loadflags: LOADED_HIGH, and no heap
        page.put(0x228, &(layout::CMDLINE as u32).to_le_bytes());
        page.put(0x250, &[0; 8]); // setup_data: a kernel file has no say in it
        page.put(0x070, &self.rsdp.to_le_bytes());
        let (addr, size) = self.initrd.unwrap_or_default();
        for (value, low, high) in [(addr, 0x218, 0x0c0), (size, 0x21c, 0x0c4)] {
            page.put(low, &(value as u32).to_le_bytes());
            page.put(high, &((value >> 32) as u32).to_le_bytes());
        }
        // The table has room for 128 entries; a machine has a few.
        let map = memory_map(ram);
        for (i, range) in map.iter().take(128).enumerate() {
            let entry = 0x2d0 + i * 20;
            page.put(entry, &range.addr.to_le_bytes());
            page.put(entry + 8, &range.size.to_le_bytes());
            page.put(entry + 16, &(range.kind as u32).to_le_bytes());
        }
        page.put(0x1e8, &[map.len().min(128) as u8]);
        ram.write_slice(&*page.0, GuestAddress(layout::ZERO_PAGE))
    }
}

struct ZeroPage(Box<[u8; 4096]>);

impl ZeroPage {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    addr: u64,
    size: u64,
    cmdline: u64,
    reserved: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}
