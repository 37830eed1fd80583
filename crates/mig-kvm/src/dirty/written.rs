//! What this process wrote to guest memory: a bit a page, and a bit for each word of them that may hold one.
//!
//! `vm-memory` has a bitmap of its own; taking what it holds means an atomic swap of every word, a tenth of a
//! millisecond for 4 GiB, inside the pause. Here taking costs what was written, and a look at a word for
//! every 4096 pages.
//!
//! Invariant: a word that is not zero has its bit in the summary, or a writer is about to set it. A writer
//! sets the word's bit, then the summary's; who takes does it in the same order's reverse, the summary first.
//! All of it is sequentially consistent: a writer that finds the summary's bit set comes before the taking of
//! that bit, and so before the taking of the word.

use std::sync::atomic::{AtomicU64, Ordering};

use mig::domain::PAGE_BYTES;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// A bitmap of `vm-memory`'s whose marks can be taken while others are set.
///
/// A write is marked after its bytes are in memory. So a mark that is taken stands for bytes that a reader of
/// the page will see, and one that is not taken yet is there for the next time.
pub trait Written: Bitmap + Send + Sync + 'static {
    /// How many pages of [`PAGE_BYTES`] it counts; `None` when it counts others.
    fn pages(&self) -> Option<u64>;

    /// Takes every mark: `found` is given each word that holds one, with its index. Bit `b` of word `i` is
    /// page `64 * i + b`.
    fn take(&self, found: impl FnMut(usize, u64));
}

/// The pages that this process wrote, and a summary of where they are.
#[derive(Debug, Default)]
pub struct WrittenPages {
    words: Box<[AtomicU64]>,
    /// Bit `b` of entry `i` is word `64 * i + b`.
    summary: Box<[AtomicU64]>,
    pages: usize,
}

const PAGE: usize = PAGE_BYTES as usize;
const BITS: usize = 64;

impl WrittenPages {
    fn mark_word(&self, index: usize, mask: u64) {
        // Not a look first: it is the atomic operation that puts the bytes before the mark.
        self.words[index].fetch_or(mask, Ordering::SeqCst);
        let (entry, bit) = (&self.summary[index / BITS], 1 << (index % BITS));
        if entry.load(Ordering::SeqCst) & bit == 0 {
            entry.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

impl Written for WrittenPages {
    fn pages(&self) -> Option<u64> {
        Some(self.pages as u64)
    }

    fn take(&self, mut found: impl FnMut(usize, u64)) {
        for (at, entry) in self.summary.iter().enumerate() {
            if entry.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut left = entry.swap(0, Ordering::SeqCst);
            while left != 0 {
                let index = at * BITS + left.trailing_zeros() as usize;
                left &= left - 1;
                let word = self.words[index].swap(0, Ordering::SeqCst);
                if word != 0 {
                    found(index, word);
                }
            }
        }
    }
}

impl NewBitmap for WrittenPages {
    fn with_len(bytes: usize) -> Self {
        let pages = bytes.div_ceil(PAGE);
        let zeros = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>();
        let words = zeros(pages.div_ceil(BITS));
        let summary = zeros(words.len().div_ceil(BITS));
        Self { words, summary, pages }
    }
}

impl<'a> WithBitmapSlice<'a> for WrittenPages {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WrittenPages {
    /// What lies beyond the end is ignored, as `vm-memory`'s own bitmap does.
    fn mark_dirty(&self, offset: usize, len: usize) {
        let first = offset / PAGE;
        let end = offset.saturating_add(len).div_ceil(PAGE).min(self.pages);
        if len == 0 || first >= end {
            return;
        }
        for index in first / BITS..=(end - 1) / BITS {
            let low = first.max(index * BITS) % BITS;
            let high = end.min((index + 1) * BITS) - index * BITS;
            self.mark_word(index, (!0 << low) & (!0 >> (BITS - high)));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        page < self.pages && self.words[page / BITS].load(Ordering::SeqCst) >> (page % BITS) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// For memory that is `vm-memory`'s own to the end: every word is swapped, and a list of them allocated.
impl Written for AtomicBitmap {
    fn pages(&self) -> Option<u64> {
        (self.len() == self.byte_size().div_ceil(PAGE)).then_some(self.len() as u64)
    }

    fn take(&self, mut found: impl FnMut(usize, u64)) {
        let words = self.get_and_reset();
        words.into_iter().enumerate().filter(|(_, word)| *word != 0).for_each(|(at, word)| found(at, word));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A summary of two entries and a bit, a last word of three bits.
    const PAGES: usize = (2 * BITS + 1) * BITS + 3;

    fn taken(bitmap: &impl Written) -> Vec<(usize, u64)> {
        let mut words = Vec::new();
        bitmap.take(|at, word| words.push((at, word)));
        words
    }

    #[derive(Debug, Clone)]
    enum Operation {
        Mark { offset: usize, len: usize },
        Take,
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let offsets = 0..(PAGES + 10) * PAGE;
        prop_oneof![
            6 => (offsets.clone(), 0..3 * PAGE).prop_map(|(offset, len)| Operation::Mark { offset, len }),
            2 => (offsets, 0..200 * PAGE).prop_map(|(offset, len)| Operation::Mark { offset, len }),
            1 => Just(Operation::Mark { offset: (PAGES - 1) * PAGE, len: usize::MAX }),
            3 => Just(Operation::Take),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn random_marks_and_takings_agree_with_the_bitmap_that_swaps_every_word(
            operations in proptest::collection::vec(operation(), 60)
        ) {
            let (ours, oracle) = (WrittenPages::with_len(PAGES * PAGE), AtomicBitmap::with_len(PAGES * PAGE));
            prop_assert_eq!(Written::pages(&ours), Written::pages(&oracle));
            for operation in operations.into_iter().chain([Operation::Take]) {
                match operation {
                    Operation::Mark { offset, len } => {
                        ours.slice_at(offset / 2).mark_dirty(offset - offset / 2, len);
                        oracle.mark_dirty(offset, len);
                        let near = (offset.saturating_sub(PAGE)..offset + 2 * PAGE).step_by(PAGE);
                        for at in near.chain([offset.saturating_add(len)]) {
                            prop_assert_eq!(ours.dirty_at(at), oracle.dirty_at(at));
                        }
                    }
                    Operation::Take => prop_assert_eq!(taken(&ours), taken(&oracle)),
                }
            }
        }
    }

    #[test]
    fn no_mark_is_lost_or_found_twice_with_three_writers_and_a_taker_at_once() {
        let bitmap = WrittenPages::with_len(PAGES * PAGE);
        let mut found = vec![0u32; PAGES];
        let mut take = |bitmap: &WrittenPages| {
            for (at, word) in taken(bitmap) {
                (0..BITS).filter(|b| word >> b & 1 == 1).for_each(|b| found[at * BITS + b] += 1);
            }
        };
        const TIMES: u32 = 400;
        // Neighbours in a word, and a word's only page, whose mark no other would bring back.
        for apart in [1, BITS].into_iter().cycle().take(TIMES as usize) {
            std::thread::scope(|scope| {
                let writers = [0, 1, 2].map(|writer| {
                    let bitmap = &bitmap;
                    scope.spawn(move || {
                        for page in (writer * apart..PAGES).step_by(3 * apart) {
                            bitmap.mark_dirty(page * PAGE, 1);
                        }
                    })
                });
                while !writers.iter().all(|w| w.is_finished()) {
                    take(&bitmap);
                }
            });
            take(&bitmap);
        }
        let often = |page: usize| if page.is_multiple_of(BITS) { TIMES } else { TIMES / 2 };
        assert!(found.iter().enumerate().all(|(page, times)| *times == often(page)), "{found:?}");
    }
}
