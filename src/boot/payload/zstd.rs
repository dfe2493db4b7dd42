//! Zstandard frames (RFC 8878), by `ruzstd`, with limits and the checksum looked at.

use std::io::{self, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// Largest window in bytes: `zstd --ultra -22`, as Linux's build calls it, uses 2^27.
const MAX_WINDOW: u64 = 1 << 27;

pub struct ZstdReader<'a> {
    decoder: StreamingDecoder<&'a [u8], FrameDecoder>,
}

impl<'a> ZstdReader<'a> {
    /// `unpacked` is the declared size in bytes. The decoder keeps a whole window of output in memory, however
    /// large, so a frame that asks for more than it can need is refused.
    pub fn new(stream: &'a [u8], unpacked: u32) -> io::Result<Self> {
        let window = window_size(stream).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        if window > MAX_WINDOW.max(unpacked.into()) {
            return Err(invalid(format!("it wants a window of {window} bytes")));
        }
        StreamingDecoder::new(stream).map(|decoder| Self { decoder }).map_err(invalid)
    }
}

impl Read for ZstdReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.decoder.read(out)?;
        let frame = &self.decoder.decoder;
        if n == 0 && !out.is_empty() {
            match (frame.get_checksum_from_data(), frame.get_calculated_checksum()) {
                (Some(stored), Some(calculated)) if stored != calculated => {
                    return Err(invalid("its checksum is wrong"));
                }
                _ => {}
            }
        }
        Ok(n)
    }
}

/// How much history in bytes a frame asks for (RFC 8878, 3.1.1.1): its window descriptor, or the size of its content.
fn window_size(stream: &[u8]) -> Option<u64> {
    let descriptor = *stream.get(4)?;
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let window = *stream.get(5)?;
        let base = 1u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    let dictionary_id = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let field = stream.get(5 + dictionary_id..)?;
    Some(match descriptor >> 6 {
        0 => u64::from(*field.first()?),
        1 => u64::from(u16::from_le_bytes(*field.first_chunk()?)) + 256,
        2 => u64::from(u32::from_le_bytes(*field.first_chunk()?)),
        _ => u64::from_le_bytes(*field.first_chunk()?),
    })
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
