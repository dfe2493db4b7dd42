//! The compressed kernel inside a bzImage.
//!
//! A payload is a compressed stream followed by the size of what it unpacks to: four bytes, little endian, which
//! belong to the stream only in gzip's case (its own trailer ends with them). See "payload_offset" in Linux's
//! Documentation/arch/x86/boot.rst and scripts/Makefile.lib.

mod lz4;
mod xz;
mod zstd;

use std::fs::File;
use std::io::{self, Read};

use lzma_rust2::LzmaReader;
use thiserror::Error;

use super::error::Flaw;
use super::sparse::{CopyError, write_sparse};

/// Most bytes a payload may unpack to. Distribution kernels take about 64 MiB.
pub const MAX_UNPACKED: u64 = 1 << 30;

#[derive(Debug, Error)]
pub enum UnpackError {
    #[error("its compression is none of gzip, xz, lz4, zstd, lzma and bzip2")]
    UnknownFormat,
    #[error("the {format:?} stream is broken")]
    Stream { format: Format, source: io::Error },
    #[error("it does not unpack to the {declared} bytes it declares")]
    Size { declared: u32 },
    #[error("it declares an unpacked size of {0} bytes; {MAX_UNPACKED} are allowed")]
    TooLarge(u32),
    #[error("it is {0} bytes long, more than any kernel's")]
    PayloadTooLarge(u64),
    #[error("what it unpacks to is no kernel")]
    Content(#[source] Box<Flaw>),
    #[error("no room to unpack it")]
    Output(#[source] io::Error),
}

/// How a payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Gzip,
    Xz,
    Lz4,
    Zstd,
    Lzma,
    Bzip2,
}

impl Format {
    /// Recognizes a payload by its first bytes, as Linux's lib/decompress.c does.
    pub fn detect(payload: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Format); 6] = [
            (&[0x1f, 0x8b], Format::Gzip),
            (&xz::MAGIC, Format::Xz),
            (&lz4::MAGIC, Format::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Format::Zstd),
            (&[0x5d, 0x00], Format::Lzma),
            (b"BZh", Format::Bzip2),
        ];
        MAGIC.iter().find(|(magic, _)| payload.starts_with(magic)).map(|&(_, format)| format)
    }
}

/// Unpacks `payload` into memory of the host's that is a file: kernels are loaded from files. Blocks of zeroes
/// become holes. Returns it with its size in bytes.
pub fn unpack(payload: &[u8]) -> Result<(File, u64), UnpackError> {
    let format = Format::detect(payload).ok_or(UnpackError::UnknownFormat)?;
    let Some((stream, size)) = payload.split_last_chunk::<4>() else { return Err(UnpackError::UnknownFormat) };
    let declared = u32::from_le_bytes(*size);
    if u64::from(declared) > MAX_UNPACKED {
        return Err(UnpackError::TooLarge(declared));
    }
    let broken = |source| UnpackError::Stream { format, source };
    let mut source: Box<dyn Read + '_> = match format {
        Format::Gzip => Box::new(flate2::bufread::GzDecoder::new(payload)),
        Format::Xz => Box::new(xz::XzReader::new(stream, declared)),
        Format::Lz4 => Box::new(lz4::LegacyReader::new(stream)),
        Format::Zstd => Box::new(zstd::ZstdReader::new(stream, declared).map_err(broken)?),
        Format::Lzma => Box::new(lzma(stream, declared).map_err(broken)?),
        Format::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(stream)),
    };
    let memory = rustix::fs::memfd_create("unpacked-kernel", rustix::fs::MemfdFlags::CLOEXEC);
    let memory = memory.map(File::from).map_err(|error| UnpackError::Output(error.into()))?;
    match write_sparse(&mut *source, &memory, declared.into()) {
        Ok(written) if written == u64::from(declared) => Ok((memory, written)),
        Ok(_) | Err(CopyError::TooLong) => Err(UnpackError::Size { declared }),
        Err(CopyError::Source(source)) => Err(broken(source)),
        Err(CopyError::Output(source)) => Err(UnpackError::Output(source)),
    }
}

/// The `.lzma` format ("LZMA alone"): properties, dictionary size and unpacked size, all unchecked by anything.
fn lzma(stream: &[u8], unpacked: u32) -> io::Result<LzmaReader<&[u8]>> {
    let Some((header, data)) = stream.split_first_chunk::<13>() else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let [props, dict @ .., _, _, _, _, _, _, _, _] = *header;
    let [.., a, b, c, d, e, f, g, h] = *header;
    let size = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    LzmaReader::new_with_props(data, size, props, history(u32::from_le_bytes(dict), unpacked), None)
}

/// Bytes of history to keep for a stream that asks for `wanted`: nothing can refer to what lies before the start
/// of the output, so the declared size bounds the memory a stream makes us spend.
fn history(wanted: u32, unpacked: u32) -> u32 {
    wanted.min(unpacked).max(4096)
}

#[cfg(test)]
pub mod tests;
