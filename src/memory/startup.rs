//! What keeps the program itself small.

#![expect(unsafe_code, reason = "linker symbols, madvise and mallopt")]

use rustix::mm::{Advice, madvise};

unsafe extern "C" {
    /// The program's first byte in memory, and the end of its code: provided by the linker.
    static __executable_start: u8;
    static etext: u8;
}

/// Lets go of the program's own code pages. Parsing, unpacking and building have run; what runs from now on is a
/// fraction of it, and comes back from the page cache as it is touched.
pub fn release_startup_code() {
    let start = (&raw const __executable_start).addr() & !0xfff;
    let len = (&raw const etext).addr().saturating_sub(start) & !0xfff;
    // SAFETY: from its start to the end of its code the program is mapped from its file, read-only and never
    // written (relocations are in the data behind it), so a page that is dropped comes back as it was.
    let _ = unsafe { madvise(std::ptr::without_provenance_mut(start), len, Advice::LinuxDontNeed) };
}

/// Makes all threads share one heap. They allocate next to nothing once the VM runs, and a heap for each would
/// cost address space, system calls at its thread's start, and pages.
pub fn share_one_heap() {
    // SAFETY: only a number is set, before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
