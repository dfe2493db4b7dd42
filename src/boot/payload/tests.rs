use super::*;

use std::io::Write;
use std::os::unix::fs::FileExt;

use lzma_rust2::{CheckType, FilterType, LzmaOptions, LzmaWriter, XzOptions, XzWriter};
use proptest::prelude::*;

pub const FORMATS: [Format; 6] = [Format::Gzip, Format::Xz, Format::Lz4, Format::Zstd, Format::Lzma, Format::Bzip2];

/// Something like a kernel: calls (for the branch filter), text, noise and zeroes.
pub fn sample(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match state >> 28 {
            0..4 => {
                bytes.push(0xe8);
                bytes.extend_from_slice(&(state >> 8 & 0xffff).to_le_bytes());
            }
            4..8 => bytes.extend_from_slice(b"a string "),
            8 => bytes.resize(bytes.len() + (state >> 16 & 0xfff) as usize * 8, 0),
            _ => bytes.push((state >> 13) as u8),
        }
    }
    bytes.truncate(len);
    bytes
}

/// Packs as Linux's build does: the stream, then the size (which gzip has already).
pub fn pack(format: Format, bytes: &[u8]) -> Vec<u8> {
    let mut packed = match format {
        Format::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(bytes).unwrap();
            return encoder.finish().unwrap();
        }
        Format::Xz => xz(bytes, CheckType::Crc32, true, None),
        Format::Lz4 => {
            let mut packed = lz4::MAGIC.to_vec();
            for block in bytes.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
                packed.extend_from_slice(&block);
            }
            packed
        }
        Format::Zstd => ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest),
        Format::Lzma => {
            let options = LzmaOptions::with_preset(1);
            let mut encoder = LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Format::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
    };
    packed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    packed
}

fn xz(bytes: &[u8], check: CheckType, filter: bool, block: Option<u64>) -> Vec<u8> {
    let mut options = XzOptions::with_preset(1);
    options.lzma_options.dict_size = 4096;
    options.set_check_sum_type(check);
    options.set_block_size(block.and_then(std::num::NonZeroU64::new));
    if filter {
        options.prepend_pre_filter(FilterType::BcjX86, 0);
    }
    let mut encoder = XzWriter::new(Vec::new(), options).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn unpacked(payload: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let (file, len) = unpack(payload)?;
    assert_eq!(file.metadata().unwrap().len(), len);
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    Ok(bytes)
}

#[test]
fn every_format_comes_back_as_it_was() {
    for len in [1, 4095, 1_000_003] {
        let bytes = sample(len);
        for format in FORMATS {
            let packed = pack(format, &bytes);
            assert_eq!(Format::detect(&packed), Some(format));
            assert!(unpacked(&packed).unwrap() == bytes, "{format:?} of {len} bytes");
        }
    }
}

#[test]
fn lz4_has_several_blocks_and_frames() {
    let bytes = sample((8 << 20) + 12345);
    let mut packed = pack(Format::Lz4, &bytes);
    assert!(unpacked(&packed).unwrap() == bytes);
    packed.truncate(packed.len() - 4);
    let mut twice = [&packed[..], &packed[..]].concat();
    twice.extend_from_slice(&(2 * bytes.len() as u32).to_le_bytes());
    assert!(unpacked(&twice).unwrap() == [&bytes[..], &bytes[..]].concat());
}

#[test]
fn xz_with_any_check_and_several_blocks() {
    let bytes = sample(100_000);
    for check in [CheckType::None, CheckType::Crc32, CheckType::Crc64, CheckType::Sha256] {
        for (filter, block) in [(false, None), (true, None), (false, Some(30_000)), (true, Some(30_000))] {
            let mut packed = xz(&bytes, check, filter, block);
            packed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            assert!(unpacked(&packed).unwrap() == bytes, "{check:?} {filter} {block:?}");
        }
    }
}

#[test]
fn a_wrong_size_or_checksum_is_noticed() {
    let bytes = sample(50_000);
    for format in FORMATS {
        let packed = pack(format, &bytes);
        for wrong in [bytes.len() as u32 - 1, bytes.len() as u32 + 1, 0] {
            let mut packed = packed.clone();
            *packed.last_chunk_mut().unwrap() = wrong.to_le_bytes();
            let error = unpack(&packed).unwrap_err();
            // gzip looks at the size itself.
            assert!(matches!(error, UnpackError::Size { .. } | UnpackError::Stream { .. }), "{format:?}: {error}");
        }
        assert!(unpack(&packed[..packed.len() / 2]).is_err(), "half of {format:?}");
    }
    let mut packed = xz(&bytes, CheckType::Crc32, false, None);
    // The check stands before the index (8 bytes here) and the footer (12).
    let check = packed.len() - 24;
    packed[check] ^= 1;
    packed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    assert!(matches!(unpack(&packed), Err(UnpackError::Stream { format: Format::Xz, .. })));
}

#[test]
fn greedy_streams_are_refused() {
    assert!(matches!(unpack(&[0x1f, 0x8b, 0xff, 0xff, 0xff, 0xff]), Err(UnpackError::TooLarge(u32::MAX))));
    assert!(matches!(unpack(b"\x89LZO\x00\x0d\x0a\x1a\x0a"), Err(UnpackError::UnknownFormat)));
    assert!(matches!(unpack(b""), Err(UnpackError::UnknownFormat)));
    // A zstd frame with a window of 2^41 bytes; an LZMA one with 4 GiB of dictionary, which costs nothing.
    let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xf8, 1, 0, 0, 1, 0, 0, 0];
    assert!(matches!(unpack(&zstd), Err(UnpackError::Stream { format: Format::Zstd, .. })));
    let mut lzma = pack(Format::Lzma, &sample(5000));
    lzma[1..5].fill(0xff);
    lzma[1] = 0;
    assert!(unpacked(&lzma).unwrap() == sample(5000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn broken_streams_never_panic(
        format in proptest::sample::select(&FORMATS[..]),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        cut_it in any::<bool>(),
    ) {
        let mut packed = pack(format, &sample(20_000));
        for (at, byte) in damage {
            let at = at.index(packed.len());
            packed[at] = byte;
        }
        if cut_it {
            packed.truncate(cut.index(packed.len()));
        }
        // Keep the declared size small: what is asked here is that it holds.
        if let Some(size) = packed.last_chunk_mut::<4>() {
            size[3] = 0;
        }
        let _ = unpack(&packed);
    }

    #[test]
    fn garbage_behind_a_magic_number_never_panics(
        magic in proptest::sample::select(vec![&[0x1f, 0x8b, 8][..], &xz::MAGIC, &lz4::MAGIC, &[0x28, 0xb5, 0x2f, 0xfd],
            &[0x5d, 0, 0], b"BZh9\x31\x41\x59\x26\x53\x59"]),
        garbage in proptest::collection::vec(any::<u8>(), 0..2000),
    ) {
        let mut payload = [magic, &garbage[..]].concat();
        if let Some(size) = payload.last_chunk_mut::<4>() {
            size[3] = 0;
        }
        let _ = unpack(&payload);
    }
}
