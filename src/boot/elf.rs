//! ELF kernels: program headers, and the Xen note that tells of a PVH entry. See the System V ABI, chapters 4 and
//! 5, and Xen's docs/misc/pvh.pandoc.

use std::fs::File;
use std::os::unix::fs::FileExt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::error::{Flaw, KernelError};
use super::image::{Entry, Image, Span};

pub const MAGIC: [u8; 4] = *b"\x7fELF";
/// 64-bit, little endian, ELF version 1.
const CLASS_DATA_VERSION: [u8; 3] = [2, 1, 1];
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// More program headers than this is no kernel: Linux has 5.
const MAX_HEADERS: u16 = 512;
/// Most bytes of a note segment that are looked at. Linux has 512.
const MAX_NOTES: u64 = 0x1_0000;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the physical address of the PVH entry, in 4 or 8 bytes.
const PHYS32_ENTRY: u32 = 18;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FileHeader {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    size: U16,
    program_header_size: U16,
    program_header_count: U16,
    section_fields: [U16; 3],
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_addr: U64,
    physical_addr: U64,
    file_size: U64,
    memory_size: U64,
    align: U64,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NoteHeader {
    name_size: U32,
    content_size: U32,
    kind: U32,
}

/// Reads the headers of an ELF kernel. `head` is the start of the file (some KiB, so that the program headers are
/// usually among it), `file_size` in bytes.
pub fn parse(file: &File, head: &[u8], file_size: u64) -> Result<Image, KernelError> {
    let truncated = |expected| Flaw::Truncated { expected, actual: file_size };
    let (header, _) = FileHeader::ref_from_prefix(head).map_err(|_| truncated(size_of::<FileHeader>() as u64))?;
    let x86_64 = header.ident[..4] == MAGIC && header.ident[4..7] == CLASS_DATA_VERSION && header.machine == EM_X86_64;
    // A shared object is loaded at the physical addresses it has, like an executable.
    if !x86_64 || ![ET_EXEC, ET_DYN].contains(&header.kind.get()) {
        return Err(Flaw::ForeignElf.into());
    }
    let count = header.program_header_count.get();
    if count > MAX_HEADERS || usize::from(header.program_header_size.get()) != size_of::<ProgramHeader>() {
        return Err(if count == 0 { Flaw::NothingToLoad } else { Flaw::ProgramHeaders }.into());
    }
    let len = usize::from(count) * size_of::<ProgramHeader>();
    let table = read_at(file, head, file_size, header.program_headers.get(), len as u64)?;
    let table = <[ProgramHeader]>::ref_from_bytes(&table).map_err(|_| Flaw::ProgramHeaders)?;

    let mut spans = Vec::new();
    let mut pvh_entry = None;
    for segment in table {
        let (start, len) = (segment.offset.get(), segment.file_size.get());
        match segment.kind.get() {
            PT_LOAD if segment.memory_size != 0 => {
                let end = start.checked_add(len).ok_or(Flaw::ProgramHeaders)?;
                if len > 0 && end > file_size {
                    return Err(truncated(end).into());
                }
                let (addr, size) = (segment.physical_addr.get(), segment.memory_size.get());
                spans.push(Span { file: start..end, addr, size });
            }
            // No kernel asks for a dynamic linker.
            PT_INTERP => return Err(Flaw::Program.into()),
            PT_NOTE if pvh_entry.is_none() => {
                let notes = read_at(file, head, file_size, start, len.min(MAX_NOTES))?;
                pvh_entry = find_pvh_entry(&notes, if segment.align == 8 { 8 } else { 4 });
            }
            _ => {}
        }
    }
    if spans.is_empty() {
        return Err(Flaw::NothingToLoad.into());
    }
    // Position-independent code has no address of its own: what a static program or a library looks like.
    if header.kind == ET_DYN && spans.iter().any(|span| span.addr == 0) {
        return Err(Flaw::Program.into());
    }
    Ok(Image::new(spans, pvh_entry.map_or(Entry::Linux64(header.entry.get()), Entry::Pvh))?)
}

/// Bytes of the file, from its `head` if they are there. The caller bounds `len`.
fn read_at(file: &File, head: &[u8], file_size: u64, start: u64, len: u64) -> Result<Vec<u8>, KernelError> {
    let end = start.checked_add(len).ok_or(Flaw::ProgramHeaders)?;
    if end > file_size {
        return Err(Flaw::Truncated { expected: end, actual: file_size }.into());
    }
    if let Some(bytes) = usize::try_from(end).ok().and_then(|end| head.get(start as usize..end)) {
        return Ok(bytes.to_vec());
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes)
}

/// Walks the notes of a segment: each is a header, a name and a content, both padded to `align` bytes.
fn find_pvh_entry(mut notes: &[u8], align: usize) -> Option<u64> {
    loop {
        let (header, rest) = NoteHeader::ref_from_prefix(notes).ok()?;
        let name_size = header.name_size.get() as usize;
        let content_size = header.content_size.get() as usize;
        // The header's 12 bytes count for the padding of the name where that is to 8.
        let content_at = (size_of::<NoteHeader>() + name_size).next_multiple_of(align) - size_of::<NoteHeader>();
        let name = rest.get(..name_size)?;
        let content = rest.get(content_at..)?.get(..content_size)?;
        if name == b"Xen\0" && header.kind == PHYS32_ENTRY {
            return match *content {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Some(u32::from_le_bytes([a, b, c, d]).into()),
                _ => None,
            };
        }
        notes = rest.get((content_at + content_size).next_multiple_of(align)..)?;
    }
}
