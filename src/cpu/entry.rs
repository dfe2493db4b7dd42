//! How the first vCPU enters the kernel.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::CpuError;

/// The state the first vCPU starts in. The loader has put everything it points to into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// PVH (Xen's x86/HVM direct boot ABI): 32-bit protected mode without paging, EBX = start info.
    Pvh { rip: u64, start_info: u64 },
    /// Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode, RSI = zero page, `page_tables`
    /// the root of an identity mapping, `gdt` a copy of [`gdt::TABLE`].
    Linux64 { rip: u64, zero_page: u64, page_tables: u64, gdt: u64 },
}

/// The descriptor table of the 64-bit entry, as the boot protocol wants it.
pub mod gdt {
    /// Flat 64-bit code at 0x10 (`__BOOT_CS`), flat data at 0x18 (`__BOOT_DS`).
    pub const TABLE: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    pub const CODE: u16 = 0x10;
    pub const DATA: u16 = 0x18;
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 always reads as one; all flags clear, interrupts off.
const RFLAGS: u64 = 2;

/// Segment types (Intel SDM volume 3, 3.4.5): accessed, present, ring 0.
const CODE_EXECUTE_READ: u8 = 0xb;
const DATA_READ_WRITE: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

impl EntryPoint {
    /// Loads the registers of the first vCPU; all others wait for INIT and SIPI.
    pub fn load_registers(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        let mut sregs = vcpu.get_sregs().map_err(CpuError::at("read the system registers"))?;
        let regs = self.shape(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(CpuError::at("set the system registers"))?;
        vcpu.set_regs(&regs).map_err(CpuError::at("set the registers"))
    }

    fn shape(&self, sregs: &mut kvm_sregs) -> kvm_regs {
        let long = matches!(self, Self::Linux64 { .. });
        let (code, data) = (flat(gdt::CODE, CODE_EXECUTE_READ, long), flat(gdt::DATA, DATA_READ_WRITE, false));
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { type_: TSS_BUSY, present: 1, limit: 0x67, ..Default::default() };
        match *self {
            Self::Pvh { rip, start_info } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                kvm_regs { rip, rbx: start_info, rflags: RFLAGS, ..Default::default() }
            }
            Self::Linux64 { rip, zero_page, page_tables, gdt } => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = page_tables;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                sregs.gdt.base = gdt;
                sregs.gdt.limit = (size_of_val(&gdt::TABLE) - 1) as u16;
                kvm_regs { rip, rsi: zero_page, rflags: RFLAGS, ..Default::default() }
            }
        }
    }
}

/// A segment over all 4 GiB (or, for 64-bit code, all there is).
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        selector,
        limit: u32::MAX,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: long.into(),
        db: (!long).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pvh_enters_protected_mode_without_paging() {
        let mut sregs = kvm_sregs::default();
        let regs = EntryPoint::Pvh { rip: 0x100_0000, start_info: 0x6000 }.shape(&mut sregs);
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
        assert_eq!((sregs.cr0 & CR0_PG, sregs.cr0 & CR0_PE, sregs.cr4, sregs.efer), (0, 1, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.limit, sregs.cs.base), (1, 0, u32::MAX, 0));
    }

    #[test]
    fn the_64_bit_entry_is_in_long_mode_on_the_loaders_tables() {
        let mut sregs = kvm_sregs::default();
        let entry = EntryPoint::Linux64 { rip: 0x100_0200, zero_page: 0x7000, page_tables: 0x9000, gdt: 0x500 };
        let regs = entry.shape(&mut sregs);
        assert_eq!((regs.rip, regs.rsi), (0x100_0200, 0x7000));
        assert_eq!((sregs.cr3, sregs.gdt.base, sregs.gdt.limit), (0x9000, 0x500, 31));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.selector, sregs.ds.selector), (0, 1, 0x10, 0x18));
        assert_ne!(sregs.efer & EFER_LMA, 0);
    }
}
