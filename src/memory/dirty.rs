//! One bit per guest page, set by every write the host makes.
//!
//! Like `vm_memory`'s atomic bitmap, but its words come zeroed from the kernel on first use: a VM with much
//! unused memory pays neither time nor memory for the bits that say so.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use zerocopy::FromZeros;

use super::PAGE;

#[derive(Debug, Default)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: usize,
}

/// An allocation of this size is a mapping of its own, whose pages are not there before they are used. The heap
/// would write its zeroes.
const LAZY_WORDS: usize = (128 << 10) / size_of::<AtomicU64>();

impl DirtyBitmap {
    /// A clean bitmap for `bytes` of memory, rounded up to whole pages.
    ///
    /// `None` where the host has no room for a 32768th of that.
    #[must_use]
    pub fn for_bytes(bytes: usize) -> Option<Self> {
        let pages = bytes.div_ceil(PAGE.get());
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(pages.div_ceil(64).max(LAZY_WORDS)).ok()?;
        Some(Self { words, pages })
    }

    /// Marks pages by the bits of `words`; those beyond the last page mean nothing.
    pub fn mark_words(&self, words: &[u64]) {
        let last = self.pages.div_ceil(64);
        for (number, (word, &bits)) in self.words[..last].iter().zip(words).enumerate() {
            let bits = match self.pages - number * 64 {
                pages @ ..64 => bits & ((1 << pages) - 1),
                _ => bits,
            };
            if bits != 0 {
                word.fetch_or(bits, Ordering::SeqCst);
            }
        }
    }

    /// All words, which are clean from then on.
    pub fn take_words(&self) -> Box<[u64]> {
        let take = |word: &AtomicU64| match word.load(Ordering::Acquire) {
            // Without making it the kernel's to give a page for.
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        self.words[..self.pages.div_ceil(64)].iter().map(take).collect()
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> Self {
        Self::for_bytes(len).expect("a size that fits")
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE;
        let last = (offset.saturating_add(len - 1) / PAGE).min(self.pages.saturating_sub(1));
        for page in first..=last {
            let (word, bit) = (&self.words[page / 64], 1 << (page % 64));
            // Most writes hit a page that is dirty already: a plain load keeps its cache line shared.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        page < self.pages && self.words[page / 64].load(Ordering::Acquire) & (1 << (page % 64)) != 0
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn marks_exactly_the_pages_touched(offset in 0usize..0x50_0000, len in 0usize..0x50_0000) {
            let bytes = 0x40_0000;
            let bitmap = DirtyBitmap::for_bytes(bytes).unwrap();
            bitmap.mark_dirty(offset, len);
            for page in 0..bytes / 4096 + 2 {
                let (start, end) = (page * 4096, (page + 1) * 4096);
                let touched = len > 0 && offset < end && offset + len > start && start < bytes;
                prop_assert_eq!(bitmap.dirty_at(start), touched);
            }
        }
    }
}
