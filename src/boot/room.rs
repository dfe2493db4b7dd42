//! Where kernel and initrd may lie, and how much memory they need.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::Minimum;
use crate::memory::{PAGE_SIZE, RamRegions};
use crate::platform::layout;

/// Bytes a kernel gets beside its own image and the initrd, for its first page tables, its memory map and its
/// per-CPU areas. Less, and it would be loaded only to die before its first line of output.
pub const WORKING_ROOM: u64 = 8 << 20;

/// The RAM below the gap, from address 0.
#[derive(Debug, Clone, Copy)]
pub struct LowRam {
    /// Address of the first byte behind it.
    pub end: u64,
}

impl LowRam {
    pub fn of(ram: &RamRegions) -> Self {
        let region = ram.find_region(GuestAddress(0));
        Self { end: region.map_or(0, |region| region.len().min(layout::GAP_START)) }
    }

    /// Whether a kernel may have `range` for itself: usable RAM that holds none of our own tables.
    pub fn is_free(&self, range: &Range<u64>) -> bool {
        let below = layout::CMDLINE + layout::CMDLINE_MAX..layout::LOW_RAM_END.min(self.end);
        let above = layout::HIGH_RAM..self.end;
        [below, above].iter().any(|free| free.start <= range.start && range.end <= free.end)
    }

    /// Bytes of low RAM needed by a kernel that ends at address `kernel_end`, with an initrd of `initrd` bytes.
    pub fn needed(kernel_end: u64, initrd: u64) -> u64 {
        page_up(kernel_end.max(layout::HIGH_RAM)).saturating_add(page_up(initrd)).saturating_add(WORKING_ROOM)
    }

    /// Where an initrd of `size` bytes goes: as high as the kernel can use it, so that the kernel has one large
    /// piece of memory around itself.
    ///
    /// `kernel_end` is the first address behind the kernel, `last` the highest address a byte of the initrd may
    /// have. Errors say how much memory it would take.
    pub fn place_initrd(&self, kernel_end: u64, size: u64, last: u64) -> Result<u64, Minimum> {
        let needed = Self::needed(kernel_end, size);
        if needed > self.end {
            return Err(Minimum::of(needed));
        }
        let top = last.saturating_add(1).min(self.end) & !(PAGE_SIZE - 1);
        match top.checked_sub(page_up(size)) {
            Some(start) if start >= page_up(kernel_end.max(layout::HIGH_RAM)) => Ok(start),
            _ => Err(Minimum::Never),
        }
    }
}

impl Minimum {
    /// For something that needs `bytes` of low RAM.
    pub fn of(bytes: u64) -> Self {
        if bytes <= layout::GAP_START { Self::Mib(bytes.div_ceil(1 << 20)) } else { Self::Never }
    }
}

fn page_up(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_kernel_stays_off_our_tables() {
        let low = LowRam { end: 64 << 20 };
        assert!(low.is_free(&(0x10_0000..64 << 20)));
        assert!(low.is_free(&(0x3_0000..0x9_0000)));
        for taken in [0..0x1000, 0x2_f000..0x3_1000, 0x9_0000..0xa_0000, 0xe_0000..0x10_1000, 0x10_0000..(64 << 20) + 1]
        {
            assert!(!low.is_free(&taken), "{taken:x?}");
        }
    }

    #[test]
    fn an_initrd_lies_below_its_limit() {
        let low = LowRam { end: 2 << 30 };
        assert_eq!(low.place_initrd(16 << 20, 5000, 0x37ff_ffff), Ok(0x37ff_e000));
        assert_eq!(low.place_initrd(16 << 20, 5000, u64::MAX), Ok((2 << 30) - 0x2000));
        assert_eq!(low.place_initrd(16 << 20, 0x3800_0000, 0x37ff_ffff), Err(Minimum::Never));
        assert_eq!(low.place_initrd(16 << 20, 3 << 30, u64::MAX), Err(Minimum::Never));
        assert_eq!(LowRam { end: 32 << 20 }.place_initrd(20 << 20, 5 << 20, u64::MAX), Err(Minimum::Mib(33)));
    }

    proptest! {
        #[test]
        fn the_minimum_named_is_the_one_that_fits(kernel_end in 0u64..8 << 30, size in 1u64..8 << 30, last in any::<u64>()) {
            let place = |mib: u64, last| LowRam { end: mib << 20 }.place_initrd(kernel_end, size, last);
            match place(0, last) {
                Err(Minimum::Mib(mib)) => {
                    let start = place(mib, u64::MAX).unwrap();
                    prop_assert!(start >= kernel_end && start + size <= mib << 20);
                    prop_assert!(place(mib - 1, last).is_err());
                }
                other => prop_assert_eq!(other, Err(Minimum::Never)),
            }
        }
    }
}
