//! What the host is to do with guest memory beyond holding it.

#![expect(unsafe_code, reason = "madvise and mlock work on raw addresses")]

use std::ffi::c_void;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise, mlock};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{MemoryError, RamRegions};
use crate::config::MemoryPolicy;

type Step = unsafe fn(*mut c_void, usize) -> Result<(), Errno>;

/// Has the host treat all of a VM's memory as its configuration says.
///
/// # Errors
/// When the host cannot, or does not let us.
pub fn apply(ram: &RamRegions, policy: MemoryPolicy) -> Result<(), MemoryError> {
    let steps: [(bool, &'static str, Step); 3] = [
        (policy.mergeable, "offer guest memory to be shared (KSM)", |start, len| {
            // SAFETY: see the caller; the advice changes no content.
            unsafe { madvise(start, len, Advice::LinuxMergeable) }
        }),
        (policy.prefault, "fill guest memory in advance", |start, len| {
            // SAFETY: see the caller; pages that are there keep their content.
            unsafe { madvise(start, len, Advice::LinuxPopulateWrite) }
        }),
        (policy.locked, "lock guest memory", |start, len| {
            // SAFETY: see the caller; locking changes no content.
            unsafe { mlock(start, len) }
        }),
    ];
    for (_, what, step) in steps.into_iter().filter(|(wanted, ..)| *wanted) {
        for region in ram.iter() {
            // SAFETY: the range is one mapping, and alive as long as `ram`.
            unsafe { step(region.as_ptr().cast(), region.len() as usize) }
                .map_err(|error| MemoryError::Policy { what, source: error.into() })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::small_pages;
    use vm_memory::GuestAddress;

    /// What the host says of the mapping of these bytes, or of the one they have become a part of.
    fn mapping(at: *mut u8, field: &str) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let is_it = |line: &str| {
            let (start, end) = line.split(' ').next()?.split_once('-')?;
            let [start, end] = [start, end].map(|end| usize::from_str_radix(end, 16));
            Some((start.ok()?..end.ok()?).contains(&(at as usize)))
        };
        let mut lines = maps.lines().skip_while(|line| is_it(line) != Some(true));
        lines.find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
    }

    #[test]
    fn the_host_does_as_it_is_told() {
        let size = 8 << 20;
        let of = |policy| {
            let ram = small_pages(&[(GuestAddress(0), size)]).unwrap();
            let applied = apply(&ram, policy);
            let at = ram.iter().next().unwrap().as_ptr();
            let resident: u64 = mapping(at, "Rss:").strip_suffix(" kB").unwrap().parse().unwrap();
            let flags = mapping(at, "VmFlags:");
            let has = |flag: &str| flags.split(' ').any(|known| known == flag);
            (applied, resident >= 8192, has("lo"), has("mg"))
        };
        let (_, resident, locked, mergeable) = of(MemoryPolicy::default());
        assert_eq!([resident, locked, mergeable], [false; 3]);
        assert!(of(MemoryPolicy { prefault: true, ..MemoryPolicy::default() }).1);
        let (applied, resident, locked, _) = of(MemoryPolicy { locked: true, ..MemoryPolicy::default() });
        // A user may lock as much as an administrator says, and hears it if that is less.
        assert_eq!([resident, locked], [applied.is_ok(); 2]);
        // A kernel may be without KSM.
        let (applied, _, _, mergeable) = of(MemoryPolicy { mergeable: true, ..MemoryPolicy::default() });
        assert_eq!(mergeable, applied.is_ok());
    }
}
