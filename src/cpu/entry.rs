//! How the first vCPU enters the kernel.

/// The state the first vCPU starts in. The loader has put everything it points to into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// PVH (Xen's x86/HVM direct boot ABI): 32-bit protected mode without paging, EBX = start info.
    Pvh { rip: u64, start_info: u64 },
    /// Linux's 64-bit boot protocol: long mode, identity-mapped, RSI = zero page. Page tables with root at
    /// `layout::PAGE_TABLES`, GDT at `layout::GDT` (null, null, code64, data).
    Linux64 { rip: u64, zero_page: u64 },
}

impl EntryPoint {
    /// The GDT of the 64-bit entry: null, null, 64-bit code, data. Linux asks for the selectors below.
    pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    /// Selector of the code segment (`__BOOT_CS`).
    pub const CODE_SELECTOR: u16 = 0x10;
    /// Selector of the data segment (`__BOOT_DS`).
    pub const DATA_SELECTOR: u16 = 0x18;
}
