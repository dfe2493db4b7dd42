//! Pages that were written since they were last asked for, and the file that has just those.
//!
//! What the host writes is in each region's [`DirtyBitmap`]; what the guest and KVM write, KVM tells ([`note`]).

use std::fs::File;
use std::io;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::saved::{own_pages, write_all};
use super::{DirtyBitmap, PAGE, RamRegions};

/// A set of pages: a bit for each, by region.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Written(Vec<Box<[u64]>>);

/// Adds to what the host has written to a region (by its number) what KVM has told of it.
pub fn note(ram: &RamRegions, region: usize, kvm: &[u64]) {
    if let Some(region) = ram.iter().nth(region) {
        bitmap(region).mark_words(kvm);
    }
}

impl Written {
    /// What was written, which counts as not written from now on.
    #[must_use]
    pub fn take(ram: &RamRegions) -> Self {
        Self(ram.iter().map(|region| bitmap(region).take_words()).collect())
    }

    /// It counts as written again: nobody has kept it.
    pub fn give_back(&self, ram: &RamRegions) {
        for (region, words) in ram.iter().zip(&self.0) {
            bitmap(region).mark_words(words);
        }
    }

    /// Writes these pages where they belong in a file that is as long as all of RAM. Nobody may write to RAM meanwhile.
    ///
    /// # Errors
    /// The host's.
    pub fn save(&self, ram: &RamRegions, file: &File) -> io::Result<()> {
        let mut start = 0;
        for (region, words) in ram.iter().zip(&self.0) {
            for pages in runs(words) {
                let (from, len) = (pages.start * PAGE.get(), pages.len() * PAGE.get());
                write_all(region, from, len, file, start + from as u64)?;
            }
            start += region.len();
        }
        Ok(())
    }
}

/// The same of all pages that may have been written since RAM came from its file, or was made: nobody has kept count.
///
/// # Errors
/// The host's.
pub fn save_own(ram: &RamRegions, file: &File) -> io::Result<()> {
    let mut start = 0;
    for region in ram.iter() {
        let host = region.as_ptr().addr();
        own_pages(host..host + region.size(), &mut |pages| {
            let at = pages.start - host;
            write_all(region, at, pages.len(), file, start + at as u64)
        })?;
        start += region.len();
    }
    Ok(())
}

fn bitmap(region: &GuestRegionMmap<DirtyBitmap>) -> &DirtyBitmap {
    let mapping: &MmapRegion<DirtyBitmap> = region;
    mapping.bitmap()
}

/// Runs of set bits.
fn runs(words: &[u64]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    let bits = words.len() * 64;
    let next = move |from: usize, set: bool| {
        let mut at = from;
        while at < bits {
            let word = if set { words[at / 64] } else { !words[at / 64] } >> (at % 64);
            if word != 0 {
                return at + word.trailing_zeros() as usize;
            }
            at = (at / 64 + 1) * 64;
        }
        bits
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = next(at, true);
        at = next(start, false);
        (start < bits).then_some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::saved::{map, save};
    use crate::memory::{PAGE_SIZE, anonymous};
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, GuestAddress};

    const RANGES: [(GuestAddress, u64); 2] =
        [(GuestAddress(0), 70 * PAGE_SIZE), (GuestAddress(0x1_0000_0000), 130 * PAGE_SIZE)];
    const LEN: u64 = 200 * PAGE_SIZE;

    fn address(page: u64) -> GuestAddress {
        if page < 70 { GuestAddress(page * PAGE_SIZE) } else { GuestAddress(0x1_0000_0000 + (page - 70) * PAGE_SIZE) }
    }

    fn fill(ram: &RamRegions, pages: &[(u64, u8)]) {
        for &(page, byte) in pages {
            ram.write_slice(&[byte; PAGE_SIZE as usize], address(page)).unwrap();
        }
    }

    /// As KVM does it: the host's bitmap knows nothing, the log does.
    fn fill_as_guest(ram: &RamRegions, pages: &[(u64, u8)]) {
        let before = Written::take(ram);
        fill(ram, pages);
        let mut log = Written::take(ram);
        before.give_back(ram);
        for (number, words) in log.0.iter_mut().enumerate() {
            // KVM's has just as many words as it needs.
            note(ram, number, &words[..[2, 3][number]]);
        }
    }

    fn pages() -> impl Strategy<Value = Vec<(u64, u8)>> {
        prop::collection::vec((0u64..200, 0u8..3), 0..40)
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        file
    }

    /// Lays the pages of one file over those of another.
    fn merge(base: &File, diff: &File) {
        crate::memory::saved::copy_data(diff, base, 0..LEN).unwrap();
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn full(ram: &RamRegions) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        save(ram, &file).unwrap();
        bytes(&file)
    }

    proptest! {
        /// A base and all that was written since are the whole, however it is counted.
        #[test]
        fn base_and_differences_are_the_whole(
            first in pages(),
            rounds in prop::collection::vec((pages(), pages(), any::<bool>()), 1..4),
            restored in any::<bool>(),
        ) {
            let mut ram = anonymous(&RANGES).unwrap();
            fill(&ram, &first);
            let base = tempfile::tempfile().unwrap();
            save(&ram, &base).unwrap();
            // Nobody has kept count of these.
            let since_base = tempfile::tempfile().unwrap();
            save(&ram, &since_base).unwrap();
            drop(Written::take(&ram));
            let copy = tempfile::tempfile().unwrap();
            save(&ram, &copy).unwrap();
            if restored {
                ram = map(&copy, &RANGES).unwrap();
            }
            for (by_host, by_guest, fails) in rounds {
                fill(&ram, &by_host);
                fill_as_guest(&ram, &by_guest);
                let written = Written::take(&ram);
                if fails {
                    written.give_back(&ram);
                } else {
                    let diff = file();
                    written.save(&ram, &diff).unwrap();
                    merge(&base, &diff);
                    prop_assert!(bytes(&base) == full(&ram));
                }
            }
            let own = file();
            save_own(&ram, &own).unwrap();
            merge(&since_base, &own);
            prop_assert!(bytes(&since_base) == full(&ram));
        }

        #[test]
        fn runs_are_the_bits(words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..5)) {
            let found: Vec<_> = runs(&words).collect();
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
            let bits: Vec<_> = found.into_iter().flatten().collect();
            let wanted: Vec<_> = (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0).collect();
            prop_assert_eq!(bits, wanted);
        }
    }

    #[test]
    fn what_was_taken_is_not_written_any_more() {
        let ram = anonymous(&RANGES).unwrap();
        fill(&ram, &[(69, 1), (70, 1), (199, 1)]);
        let written = Written::take(&ram);
        assert_eq!(Written::take(&ram), Written(vec![vec![0; 2].into(), vec![0; 3].into()]));
        written.give_back(&ram);
        assert_eq!(Written::take(&ram), written);
        // Bits beyond the last page mean nothing.
        note(&ram, 0, &[0, !0, !0]);
        note(&ram, 7, &[!0]);
        let region = ram.iter().next().unwrap();
        assert!(region.bitmap().dirty_at(69 * PAGE.get()) && !region.bitmap().dirty_at(70 * PAGE.get()));
        let diff = file();
        Written::take(&ram).save(&ram, &diff).unwrap();
        assert_eq!(diff.metadata().unwrap().len(), LEN);
    }
}
