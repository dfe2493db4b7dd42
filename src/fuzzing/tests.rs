//! What fuzzers once found, again.

use std::path::Path;

use super::*;

/// A target of `fuzz/`, and what it drives.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 12] = [
    ("queues", queues),
    ("pci", pci),
    ("mmio", mmio),
    ("states", states),
    ("snapshots", snapshots),
    ("kernel", kernel),
    ("package", package),
    ("qcow2", qcow2),
    ("root", root),
    ("layout", layout),
    ("options", options),
    ("http", http),
];

fn fuzz(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(path)
}

/// Each is a file in `fuzz/regressions/TARGET`, named for what was wrong.
#[test]
fn what_was_found_stays_mended() {
    for (name, target) in TARGETS {
        for found in std::fs::read_dir(fuzz("regressions").join(name)).into_iter().flatten() {
            let path = found.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(path).unwrap());
        }
    }
}

#[test]
fn every_target_is_one_of_cargo_fuzz() {
    let manifest = std::fs::read_to_string(fuzz("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let source = std::fs::read_to_string(fuzz("fuzz_targets").join(format!("{name}.rs"))).unwrap();
        assert!(source.contains(&format!("fuzzing::{name}(input)")), "{name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    // However short the input.
    for (_, target) in TARGETS {
        for len in 0..16 {
            target(&vec![0xff; len]);
        }
    }
}
