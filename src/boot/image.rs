//! What of a kernel file goes where in guest memory.

use std::fs::File;
use std::io;
use std::ops::Range;

use super::error::{Flaw, Minimum};
use super::room::LowRam;
use super::sparse::read_to_guest;
use crate::memory::RamRegions;

/// Bytes of a file and the guest memory they belong in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub file: Range<u64>,
    /// Guest physical address.
    pub addr: u64,
    /// Bytes of guest memory, the part beyond the file's bytes being zero.
    pub size: u64,
}

/// How the kernel wants to be entered, and the guest physical address of its first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    Pvh(u64),
    Linux64(u64),
}

/// A kernel, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    spans: Vec<Span>,
    pub entry: Entry,
    /// Guest physical address of the first byte behind all of it.
    pub end: u64,
}

impl Image {
    /// Checks what does not depend on the machine: sizes add up, and the entry point is part of the kernel.
    pub fn new(spans: Vec<Span>, entry: Entry) -> Result<Self, Flaw> {
        let (mut end, mut total) = (0, 0u64);
        for Span { file, addr, size } in &spans {
            let file_bytes = file.end.checked_sub(file.start).ok_or(Flaw::ProgramHeaders)?;
            if file_bytes > *size {
                return Err(Flaw::ProgramHeaders);
            }
            end = addr.checked_add(*size).ok_or(Flaw::ProgramHeaders)?.max(end);
            total = total.saturating_add(*size);
        }
        // Spans that lie over each other would let a small file make us copy without end.
        if total > end {
            return Err(Flaw::ProgramHeaders);
        }
        let (Entry::Pvh(at) | Entry::Linux64(at)) = entry;
        if !spans.iter().any(|span| (span.addr..span.addr + span.size).contains(&at)) {
            return Err(Flaw::EntryPoint(at));
        }
        Ok(Self { spans, entry, end })
    }

    /// Checks that the machine has room for it, with an initrd of `initrd` bytes in mind when it says how much
    /// memory it would take.
    pub fn check_room(&self, low: LowRam, initrd: u64) -> Result<(), Minimum> {
        if LowRam::needed(self.end, 0) > low.end {
            return Err(Minimum::of(LowRam::needed(self.end, initrd)));
        }
        let fits = self.spans.iter().all(|span| low.is_free(&(span.addr..span.addr + span.size)));
        if fits { Ok(()) } else { Err(Minimum::Never) }
    }

    /// Copies it from `file` into RAM that has room for it and is still zero: a bss is not written.
    pub fn load(&self, file: &File, ram: &RamRegions) -> io::Result<()> {
        self.spans.iter().try_for_each(|span| read_to_guest(file, span.file.clone(), ram, span.addr))
    }
}
