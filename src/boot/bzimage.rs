//! The bzImage: Linux's setup header, its payload, and the entry into its own decompressor. See Linux's
//! Documentation/arch/x86/boot.rst; offsets in this file are those of its tables.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::error::{Flaw, KernelError};
use super::image::{Entry, Image, Span};
use super::payload::UnpackError;
use crate::platform::layout;

/// Where the setup header starts, in the file as in the zero page.
pub const HEADER_START: usize = 0x1f1;
/// The zero page has other things from here on.
pub const HEADER_LIMIT: usize = 0x290;
/// "HdrS", at offset 0x202.
pub const HEADER_MAGIC: [u8; 4] = *b"HdrS";
const SECTOR: u64 = 512;
/// Largest payload in bytes. Distribution kernels have 8 to 16 MiB.
const MAX_PAYLOAD: u64 = 256 << 20;

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point lies this many bytes behind the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

/// The setup header of a bzImage, as it is in the file.
#[derive(Debug, Clone)]
pub struct SetupHeader {
    /// From offset 0x1f1 on.
    bytes: Vec<u8>,
    version: u16,
}

impl SetupHeader {
    /// Recognizes a bzImage by the start of the file, of which `HEADER_LIMIT` bytes are enough.
    pub fn parse(head: &[u8]) -> Option<Result<Self, Flaw>> {
        if head.get(0x1fe..0x200)? != [0x55, 0xaa] || head.get(0x202..0x206)? != HEADER_MAGIC {
            return None;
        }
        let version = u16::from_le_bytes(*head.get(0x206..)?.first_chunk()?);
        // 2.08 brought payload_offset and payload_length.
        if version < 0x208 {
            return Some(Err(Flaw::OldProtocol(version)));
        }
        // Offset 0x201 has the distance from 0x202 to the end of the header.
        let end = (0x202 + usize::from(head[0x201])).clamp(0x250, HEADER_LIMIT);
        let Some(bytes) = head.get(HEADER_START..end) else {
            return Some(Err(Flaw::Truncated { expected: end as u64, actual: head.len() as u64 }));
        };
        let bytes = bytes.to_vec();
        let header = Self { bytes, version };
        if header.u8(0x211) & LOADED_HIGH == 0 {
            // A zImage, which nobody has built for decades.
            return Some(Err(Flaw::UnknownFormat));
        }
        Some(Ok(header))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The highest address a byte of the initrd may have.
    pub fn initrd_last(&self) -> u64 {
        self.u32(0x22c).into()
    }

    /// Bytes of command line the kernel takes, without the final NUL.
    pub fn cmdline_size(&self) -> u32 {
        self.u32(0x238)
    }

    /// Where in the file the protected-mode code starts. A setup_sects of 0 means 4.
    fn code_offset(&self) -> u64 {
        match self.u8(HEADER_START) {
            0 => 5 * SECTOR,
            sectors => (u64::from(sectors) + 1) * SECTOR,
        }
    }

    /// Reads the payload, the size behind the stream included. `file_size` in bytes.
    pub fn read_payload(&self, file: &File, file_size: u64) -> Result<Vec<u8>, KernelError> {
        let start = self.code_offset() + u64::from(self.u32(0x248));
        let len = u64::from(self.u32(0x24c));
        if start + len > file_size {
            return Err(Flaw::Truncated { expected: start + len, actual: file_size }.into());
        }
        if len > MAX_PAYLOAD {
            return Err(Flaw::Payload(UnpackError::PayloadTooLarge(len)).into());
        }
        let mut payload = vec![0; len as usize];
        file.read_exact_at(&mut payload, start)?;
        Ok(payload)
    }

    /// The kernel to be entered by its own 64-bit entry point, which unpacks the payload in the guest. `None` if it
    /// has no such entry.
    pub fn as_image(&self, file_size: u64) -> Option<Image> {
        // 2.12 brought xloadflags, 2.10 pref_address and init_size.
        if self.version < 0x20c || self.u16(0x236) & XLF_KERNEL_64 == 0 {
            return None;
        }
        let addr = self.u64(0x258).max(layout::HIGH_RAM);
        let file = self.code_offset()..file_size;
        // init_size: what the kernel needs from there, to the end of its own unpacking.
        let size = u64::from(self.u32(0x260)).max(file_size.saturating_sub(file.start));
        Image::new(vec![Span { file, addr, size }], Entry::Linux64(addr.checked_add(ENTRY_64)?)).ok()
    }

    fn u8(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.field(offset))
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.field(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.field(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.field(offset))
    }

    /// A field of the header; zero where the header is too short for it.
    fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.bytes.get(offset - HEADER_START..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
    }
}
