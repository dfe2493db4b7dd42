//! The .xz container, as far as Linux's build uses it: LZMA2, with or without the x86 branch filter before it.
//! See "The .xz File Format", version 1.2.
//!
//! The container is read here rather than by the LZMA crate because a block may ask for 4 GiB of history, which
//! that would allocate, and because the usual 64 MiB would be cleared even for a small kernel.

use std::io::{self, Read};

use flate2::Crc;
use lzma_rust2::Lzma2Reader;
use lzma_rust2::filter::bcj::BcjReader;

use super::history;

pub const MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const STREAM_HEADER: usize = 12;
const FILTER_X86: u64 = 0x04;
const FILTER_LZMA2: u64 = 0x21;
const CHECK_CRC32: u8 = 1;

/// Unpacks the first stream of a .xz file.
///
/// Of the integrity checks only CRC32 is verified, the one kind Linux itself supports and its build asks for; the
/// others are skipped.
pub struct XzReader<'a> {
    state: State<'a>,
    /// Size of the whole output in bytes, as declared outside of the container.
    unpacked: u32,
    check: u8,
    crc: Crc,
}

enum State<'a> {
    StreamHeader(&'a [u8]),
    /// In front of a block header or the index. Blocks start at multiples of four bytes.
    Between(&'a [u8]),
    Block {
        decoder: Box<Decoder<'a>>,
        /// Bytes from the start of the block's data to the end of the file.
        len: usize,
    },
    End,
}

enum Decoder<'a> {
    Plain(Lzma2Reader<&'a [u8]>),
    X86(BcjReader<Lzma2Reader<&'a [u8]>>),
}

impl<'a> XzReader<'a> {
    pub fn new(stream: &'a [u8], unpacked: u32) -> Self {
        Self { state: State::StreamHeader(stream), unpacked, check: 0, crc: Crc::new() }
    }

    /// Section 2.1.1: magic, flags, CRC32 of the flags.
    fn stream_header(&mut self, stream: &'a [u8]) -> io::Result<&'a [u8]> {
        let (header, rest) = stream.split_at_checked(STREAM_HEADER).ok_or_else(eof)?;
        let (flags, stored) = (&header[6..8], &header[8..]);
        if header[..6] != MAGIC || flags[0] != 0 || flags[1] > 0xf || !crc_is(flags, stored) {
            return Err(invalid("bad stream header"));
        }
        self.check = flags[1];
        Ok(rest)
    }

    /// Section 3.1: the header of a block, or `None` in front of the index.
    fn block(&mut self, at: &'a [u8]) -> io::Result<Option<State<'a>>> {
        let units = usize::from(*at.first().ok_or_else(eof)?);
        if units == 0 {
            return Ok(None);
        }
        let (header, data) = at.split_at_checked((units + 1) * 4).ok_or_else(eof)?;
        let (fields, stored) = header.split_at(header.len() - 4);
        if !crc_is(fields, stored) {
            return Err(invalid("bad block header"));
        }
        let (flags, mut fields) = (fields[1], &fields[2..]);
        // Packed and unpacked size of the block, if given: LZMA2 knows its end, the caller the whole size.
        for size_given in [flags & 0x40, flags & 0x80] {
            if size_given != 0 {
                number(&mut fields)?;
            }
        }
        let mut branches = None;
        for left in (0..=flags & 3).rev() {
            let (id, size) = (number(&mut fields)?, number(&mut fields)?);
            let properties = usize::try_from(size).ok().and_then(|size| fields.split_off(..size)).ok_or_else(eof)?;
            match (id, properties, left) {
                (FILTER_X86, &[], 1) => branches = Some(0),
                (FILTER_X86, &[a, b, c, d], 1) => branches = Some(u32::from_le_bytes([a, b, c, d])),
                (FILTER_LZMA2, &[bits], 0) => {
                    let lzma = Lzma2Reader::new(data, history(dictionary_size(bits)?, self.unpacked), None);
                    let decoder = Box::new(match branches {
                        None => Decoder::Plain(lzma),
                        Some(start) => Decoder::X86(BcjReader::new_x86(lzma, start as usize)),
                    });
                    self.crc.reset();
                    return Ok(Some(State::Block { decoder, len: data.len() }));
                }
                _ => return Err(invalid("a filter that Linux does not use")),
            }
        }
        Err(invalid("no LZMA2 filter"))
    }

    /// Sections 3.3 and 3.4: what follows a block's data.
    fn block_end(&self, rest: &'a [u8], packed: usize) -> io::Result<&'a [u8]> {
        let padding = packed.wrapping_neg() % 4;
        let check = match self.check {
            0 => 0,
            // Kinds 1 to 3 take 4 bytes, 4 to 6 take 8, and so on.
            kind => 4 << ((kind - 1) / 3),
        };
        let (check, rest) = rest.get(padding..).and_then(|rest| rest.split_at_checked(check)).ok_or_else(eof)?;
        if self.check == CHECK_CRC32 && self.crc.sum().to_le_bytes() != *check {
            return Err(invalid("wrong checksum"));
        }
        Ok(rest)
    }
}

impl Read for XzReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            // An error leaves the reader at its end.
            self.state = match std::mem::replace(&mut self.state, State::End) {
                State::End => return Ok(0),
                State::StreamHeader(stream) => State::Between(self.stream_header(stream)?),
                State::Between(at) => self.block(at)?.unwrap_or(State::End),
                State::Block { mut decoder, len } => {
                    let n = match &mut *decoder {
                        Decoder::Plain(lzma) => lzma.read(out)?,
                        Decoder::X86(filter) => filter.read(out)?,
                    };
                    if n > 0 || out.is_empty() {
                        self.crc.update(&out[..n]);
                        self.state = State::Block { decoder, len };
                        return Ok(n);
                    }
                    let rest = match *decoder {
                        Decoder::Plain(lzma) => lzma.into_inner(),
                        Decoder::X86(filter) => filter.into_inner().into_inner(),
                    };
                    State::Between(self.block_end(rest, len - rest.len())?)
                }
            };
        }
    }
}

/// Section 1.2: seven bits per byte, the lowest first, at most nine bytes.
fn number(bytes: &mut &[u8]) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = *bytes.split_off_first().ok_or_else(eof)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(invalid("a number of more than 63 bits"))
}

/// Section 5.3.1: a one-byte float with one bit of mantissa.
fn dictionary_size(bits: u8) -> io::Result<u32> {
    match bits {
        0..40 => Ok((2 | u32::from(bits & 1)) << (bits / 2 + 11)),
        40 => Ok(u32::MAX),
        _ => Err(invalid("bad dictionary size")),
    }
}

fn crc_is(bytes: &[u8], stored: &[u8]) -> bool {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes() == *stored
}

fn eof() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
