//! Guest RAM in huge pages that an administrator has reserved (Documentation/admin-guide/mm/hugetlbpage.rst).

use vm_memory::GuestAddress;

use super::{HUGE_PAGE, MemoryError, Ram, map, regions};

/// Maps huge pages of 2 MiB for each `(guest address, bytes)` range, whose bytes are a multiple of that.
///
/// They are taken out of the host's reserve here and now, so that no access can lack one later; cleared as they are
/// touched.
pub fn huge_pages(ranges: &[(GuestAddress, u64)]) -> Result<Ram, MemoryError> {
    let total = ranges.iter().try_fold(0u64, |sum, (_, size)| sum.checked_add(*size)).ok_or(MemoryError::Layout)?;
    regions(ranges, |_, size| {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        map(size, flags)?.map_err(|source| {
            let [reserved, free, promised] = ["nr", "free", "resv"].map(count);
            let (needed, free) = (total.div_ceil(HUGE_PAGE as u64), free.saturating_sub(promised));
            MemoryError::HugePages { needed, free, reserve: reserved + needed.saturating_sub(free), source }
        })
    })
}

/// A count that the host keeps of these pages; none where it has no such pages at all.
fn count(what: &str) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{what}_hugepages");
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn who_lacks_pages_is_told_how_to_get_them() {
        // More than any host has reserved: 16 TiB.
        let error = huge_pages(&[(GuestAddress(0), 1 << 30), (GuestAddress(4 << 30), 1 << 44)]).unwrap_err();
        let text = error.to_string();
        let needed = (1u64 << 44 | 1 << 30) >> 21;
        assert!(text.contains(&format!("{needed} are needed: 'sysctl vm.nr_hugepages=")), "{text}");
        assert!(error.source().is_some());
    }

    #[test]
    fn sizes_without_end_are_refused() {
        assert!(huge_pages(&[(GuestAddress(0), !0x1f_ffff), (GuestAddress(4 << 30), 1 << 30)]).is_err());
    }
}
