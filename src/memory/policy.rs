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

    /// What the host says of the mapping of these bytes.
    fn mapping(at: *mut u8, field: &str) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", at as usize);
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        lines.find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
    }

    #[test]
    fn the_host_does_as_it_is_told() {
        let size = 8 << 20;
        let of = |policy| {
            let ram = small_pages(&[(GuestAddress(0), size)]).unwrap();
            apply(&ram, policy).unwrap();
            let at = ram.iter().next().unwrap().as_ptr();
            (mapping(at, "Rss:"), mapping(at, "Locked:"), mapping(at, "VmFlags:"), ram)
        };
        let (rss, locked, flags, _ram) = of(MemoryPolicy::default());
        assert_eq!((&*rss, &*locked, flags.contains("mg")), ("0 kB", "0 kB", false));
        let (rss, locked, ..) = of(MemoryPolicy { prefault: true, ..MemoryPolicy::default() });
        assert_eq!((&*rss, &*locked), ("8192 kB", "0 kB"));
        if rustix::process::geteuid().is_root() {
            let (rss, _, flags, _ram) = of(MemoryPolicy { locked: true, ..MemoryPolicy::default() });
            assert!(rss == "8192 kB" && flags.split(' ').any(|flag| flag == "lo"), "{rss} {flags}");
        }
        let ram = small_pages(&[(GuestAddress(0), size)]).unwrap();
        match apply(&ram, MemoryPolicy { mergeable: true, ..MemoryPolicy::default() }) {
            Ok(()) => assert!(mapping(ram.iter().next().unwrap().as_ptr(), "VmFlags:").contains("mg")),
            // A kernel without KSM.
            Err(error) => assert!(matches!(error, MemoryError::Policy { .. }), "{error}"),
        }
    }
}
