//! Documents of snapshots, as they were written.

use super::plant;
use crate::fuzzing::snapshots::{CONFIG, FILE, MANIFEST, STATE, bits, document, restore};

#[test]
fn documents_of_snapshots() {
    for which in [MANIFEST, CONFIG, STATE, FILE] {
        for pci in [true, false] {
            let first = which | bits::MENDED | if pci { bits::PCI } else { 0 };
            let seed = [&[first][..], &document(pci, which)].concat();
            assert!(seed.len() < 32768, "{} bytes are more than a fuzzer takes", seed.len());
            match restore(&seed).unwrap() {
                Ok(()) => {}
                // What else does not matter was found out by `tests/api/golden.rs`.
                Err(error) => assert!(error.contains("it ran on a CPU of"), "{error}"),
            }
            plant("snapshots", &format!("{which}-{}", if pci { "pci" } else { "mmio" }), &seed);
            let wrong = [&[first][..], &document(pci, which)[..50]].concat();
            assert!(restore(&wrong).unwrap().is_err());
        }
    }
    // Without the right checksum it is not even looked at.
    let seed = [&[STATE][..], &document(true, STATE)].concat();
    assert!(restore(&seed).unwrap().unwrap_err().contains("state.json is damaged"));
}
