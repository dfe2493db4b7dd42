//! Guest RAM: regions, their backing, and dirty tracking.

mod dirty;
mod huge;
mod iobuf;
pub mod policy;
pub mod saved;
mod startup;
mod usage;
pub mod userfault;
pub mod written;

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

pub use dirty::DirtyBitmap;
pub use huge::huge_pages;
pub use iobuf::{IoBuf, IoBufError};
pub use startup::{release_startup_code, share_one_heap};
pub use usage::{MemoryUsage, keep_mappings, usage};

/// The regions of guest RAM, in ascending order. Every host write through it marks the page dirty.
pub type RamRegions = GuestMemoryMmap<DirtyBitmap>;

/// Guest RAM as devices and loaders hold it: shared, and alive for as long as anyone may still write to it.
pub type Ram = Arc<RamRegions>;

pub const PAGE_SIZE: u64 = 4096;

static PAGEMAP: OnceLock<File> = OnceLock::new();

/// What the host tells of this process's pages (Documentation/admin-guide/mm/pagemap.rst).
///
/// # Errors
/// The host's. Who cannot open files later on, asks for it before.
pub fn pagemap() -> io::Result<&'static File> {
    if let Some(pagemap) = PAGEMAP.get() {
        return Ok(pagemap);
    }
    let pagemap = File::open("/proc/self/pagemap")?;
    Ok(PAGEMAP.get_or_init(|| pagemap))
}
const HUGE_PAGE: usize = 2 << 20;

#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("cannot reserve {size} bytes of address space for guest memory")]
    Map { size: u64, source: MmapRegionError },
    #[error("the host has no memory to keep track of {size} bytes of guest memory")]
    Track { size: u64 },
    #[error(
        "the host has {free} huge pages of 2 MiB to give, and {needed} are needed: 'sysctl vm.nr_hugepages={reserve}' \
         reserves them"
    )]
    HugePages { needed: u64, free: u64, reserve: u64, source: MmapRegionError },
    #[error("guest memory ranges overlap or leave the address space")]
    Layout,
    #[error("the file of the saved memory has {len} bytes where the VM has {wanted}")]
    FileSize { wanted: u64, len: u64 },
    #[error("the host does not {what}")]
    Policy { what: &'static str, source: std::io::Error },
    #[error("cannot use the file of the saved memory")]
    File(#[source] std::io::Error),
}

/// Maps anonymous private memory for each `(guest address, bytes)` range.
///
/// Nothing is touched: the host pays for a page when the guest (or a loader) first writes it. Transparent huge
/// pages are asked for, as the guest's nested page walks gain most from them, but not for the first 2 MiB: every
/// start writes a few tables there, and would wait for the host to clear it all.
pub fn anonymous(ranges: &[(GuestAddress, u64)]) -> Result<Ram, MemoryError> {
    regions(ranges, |start, size| {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = map(size, flags)?.map_err(|source| MemoryError::Map { size, source })?;
        advise_huge_pages(&mapping, if start.0 == 0 { HUGE_PAGE } else { 0 });
        Ok(mapping)
    })
}

/// The same in small pages, of which each is asked for by itself.
pub fn small_pages(ranges: &[(GuestAddress, u64)]) -> Result<Ram, MemoryError> {
    regions(ranges, |_, size| {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        map(size, flags)?.map_err(|source| MemoryError::Map { size, source })
    })
}

/// RAM of a mapping for each range.
fn regions(
    ranges: &[(GuestAddress, u64)],
    mut map: impl FnMut(GuestAddress, u64) -> Result<MmapRegion<DirtyBitmap>, MemoryError>,
) -> Result<Ram, MemoryError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, size) in ranges {
        regions.push(GuestRegionMmap::new(map(start, size)?, start).ok_or(MemoryError::Layout)?);
    }
    GuestMemoryMmap::from_regions(regions).map(Arc::new).map_err(|_| MemoryError::Layout)
}

/// A mapping that keeps track of what is written; the inner error is `mmap`'s.
fn map(size: u64, flags: libc::c_int) -> Result<Result<MmapRegion<DirtyBitmap>, MmapRegionError>, MemoryError> {
    let bytes = usize::try_from(size).map_err(|_| MemoryError::Layout)?;
    let bitmap = DirtyBitmap::for_bytes(bytes).ok_or(MemoryError::Track { size })?;
    let region = MmapRegionBuilder::new_with_bitmap(bytes, bitmap).with_mmap_flags(flags);
    Ok(region.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build())
}

#[expect(unsafe_code, reason = "madvise works on raw addresses")]
fn advise_huge_pages(mapping: &MmapRegion<DirtyBitmap>, from: usize) {
    let Some(length) = mapping.size().checked_sub(from) else { return };
    let start = mapping.as_ptr().wrapping_add(from);
    // SAFETY: the range is the mapping from `from` to its end, and alive; the advice changes no content.
    // A kernel built without huge pages says no, which costs nothing but speed.
    let _ = unsafe { rustix::mm::madvise(start.cast(), length, rustix::mm::Advice::LinuxHugepage) };
}

/// Total bytes of RAM.
#[must_use]
pub fn total_bytes(ram: &RamRegions) -> u64 {
    ram.iter().map(GuestMemoryRegion::len).sum()
}

pub(crate) const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE as usize).expect("not zero");

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;
    use vm_memory::bitmap::Bitmap;

    #[test]
    fn host_writes_are_tracked_and_nothing_else() {
        let ram = anonymous(&[(GuestAddress(0), 0x10_0000), (GuestAddress(0x1_0000_0000), 0x10_0000)]).unwrap();
        ram.write_obj(1u64, GuestAddress(0x1_0000_3ffc)).unwrap();
        let region = ram.find_region(GuestAddress(0x1_0000_0000)).unwrap();
        let dirty: Vec<u64> = (0..16).filter(|p| region.bitmap().dirty_at((p * PAGE_SIZE) as usize)).collect();
        assert_eq!(dirty, [3, 4]);
        assert!(!ram.find_region(GuestAddress(0)).unwrap().bitmap().dirty_at(0));
        assert_eq!(total_bytes(&ram), 0x20_0000);
    }

    #[test]
    fn more_than_any_host_has_is_refused() {
        for size in [1 << 47, 1 << 60, !0xfff] {
            assert!(anonymous(&[(GuestAddress(0), size)]).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        assert!(anonymous(&[(GuestAddress(0), 0x2000), (GuestAddress(0x1000), 0x2000)]).is_err());
    }
}
