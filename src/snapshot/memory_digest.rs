//! The checksum of a memory file: the same whether zeroes are holes in it or not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use crate::memory::PAGE_SIZE;
use crate::memory::saved::Data;

/// Bytes that are read at once: a multiple of a page.
const CHUNK: usize = 256 << 10;

/// SHA-256 over each page that is not all zeroes: its number (64 bits, little endian), then its bytes.
pub fn digest(memory: &File) -> io::Result<String> {
    const PAGE: usize = PAGE_SIZE as usize;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let len = memory.metadata()?.len();
    for data in Data::new(memory, 0..len) {
        let data = data?;
        // Extents of a file begin and end where its file system likes; a page counts once.
        let (mut at, end) = (data.start - data.start % PAGE_SIZE, data.end.next_multiple_of(PAGE_SIZE).min(len));
        while at < end {
            let part = &mut chunk[..CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK))];
            memory.read_exact_at(part, at)?;
            for (page, number) in part.chunks(PAGE).zip(at / PAGE_SIZE..) {
                if page.iter().any(|&byte| byte != 0) {
                    hash.update(number.to_le_bytes());
                    hash.update(page);
                }
            }
            at += part.len() as u64;
        }
    }
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_are_the_same() {
        let [sparse, full] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        sparse.set_len(1 << 20).unwrap();
        full.write_all_at(&vec![0; 1 << 20], 0).unwrap();
        let empty = digest(&sparse).unwrap();
        for file in [&sparse, &full] {
            file.write_all_at(b"x", 0x8_0001).unwrap();
        }
        assert_eq!(digest(&sparse).unwrap(), digest(&full).unwrap());
        assert_ne!(digest(&sparse).unwrap(), empty);
        assert_eq!(empty, digest_of(b""));
        // The same page elsewhere is something else.
        let moved = tempfile::tempfile().unwrap();
        moved.set_len(1 << 20).unwrap();
        moved.write_all_at(b"x", 0x9_0001).unwrap();
        assert_ne!(digest(&sparse).unwrap(), digest(&moved).unwrap());
    }
}
