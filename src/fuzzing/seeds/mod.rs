//! What fuzzers begin with: what drivers, tools and users really say. Each seed has to do what it is meant to do, or
//! the fuzzer would begin far from it.
//!
//! With `TRANCHE_FUZZ_SEEDS=DIR` they are written to `DIR/TARGET`.

mod devices;
mod disks;
mod files;
mod messages;
mod snapshots;
mod states;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::tests::TARGETS;

/// Runs a seed's target, and writes the seed.
fn plant(target: &str, name: &str, seed: &[u8]) {
    let (_, run) = TARGETS.into_iter().find(|(name, _)| *name == target).expect("there is such a target");
    run(seed);
    if let Some(dir) = std::env::var_os("TRANCHE_FUZZ_SEEDS") {
        let dir = PathBuf::from(dir).join(target);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(name), seed).unwrap();
    }
}

/// The places of `bytes` that are not zero, up to a few zeroes between.
fn pieces(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    const GAP: usize = 32;
    const MOST: usize = 0x1000;
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(start) = bytes[at..].iter().position(|&byte| byte != 0).map(|skip| at + skip) {
        let mut end = start;
        for (i, &byte) in bytes.iter().enumerate().skip(start).take(MOST) {
            if byte != 0 {
                end = i + 1;
            } else if i - end > GAP {
                break;
            }
        }
        pieces.push((start, &bytes[start..end]));
        at = end;
    }
    pieces
}

/// A file as `memory_files::sparse` reads it.
fn sparse(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    sparse_bytes(&bytes)
}

fn sparse_bytes(bytes: &[u8]) -> Vec<u8> {
    let mut seed = (bytes.len() as u32).to_le_bytes().to_vec();
    for (at, piece) in pieces(bytes) {
        seed.extend_from_slice(&(at as u32).to_le_bytes());
        seed.extend_from_slice(&(piece.len() as u16).to_le_bytes());
        seed.extend_from_slice(piece);
    }
    seed
}

#[test]
fn a_file_with_holes_comes_back_as_it_was() {
    let mut bytes = vec![0; 100_000];
    bytes[5] = 1;
    bytes[30..60].fill(2);
    bytes[70_000..90_000].fill(3);
    bytes[99_999] = 4;
    let seed = sparse_bytes(&bytes);
    assert!(seed.len() < 21_000);
    let file = super::memory_files::sparse(&mut super::input::Input(&seed)).unwrap();
    let mut got = vec![9; 100_000];
    file.read_exact_at(&mut got, 0).unwrap();
    assert!(got == bytes && file.metadata().unwrap().len() == 100_000);
}
