//! The legacy LZ4 frame, which is what `lz4 -l` writes and Linux's build uses: the magic number, then blocks, each
//! preceded by its compressed size (32 bits, little endian). See "Legacy frame" in LZ4's frame format description.

use std::io::{self, Read};

pub const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Bytes a block unpacks to: as many, but for the last block.
const BLOCK: usize = 8 << 20;

/// Unpacks a legacy frame, or several in a row.
pub struct LegacyReader<'a> {
    packed: &'a [u8],
    block: Vec<u8>,
    /// The part of `block` that has not been handed out yet.
    left: std::ops::Range<usize>,
}

impl<'a> LegacyReader<'a> {
    pub fn new(packed: &'a [u8]) -> Self {
        Self { packed, block: Vec::new(), left: 0..0 }
    }

    /// Unpacks the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let size = loop {
            if self.packed.is_empty() {
                return Ok(false);
            }
            let (word, rest) = self.packed.split_first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
            self.packed = rest;
            if *word != MAGIC {
                break u32::from_le_bytes(*word) as usize;
            }
        };
        let packed = self.packed.split_off(..size).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.block.resize(BLOCK, 0);
        let n = lz4_flex::block::decompress_into(packed, &mut self.block)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.left = 0..n;
        Ok(true)
    }
}

impl Read for LegacyReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let n = out.len().min(self.left.len());
        out[..n].copy_from_slice(&self.block[self.left.start..][..n]);
        self.left.start += n;
        Ok(n)
    }
}
