//! The pages that were received with content, so that only those need clearing when they become zero.
//!
//! Invariant: a page is served by one channel alone, and channels divide memory by chunks, which are whole words
//! here: no word is written by two threads, so that plain loads and stores of atomics do.

use std::sync::atomic::{AtomicU64, Ordering};

use mig_core::bitmap::{PageRun, masks};

/// One bit for each page.
#[derive(Debug)]
pub(super) struct Filled {
    words: Vec<AtomicU64>,
}

impl Filled {
    pub(super) fn new(end_page: u64) -> Self {
        Self { words: (0..end_page.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether a page holds what was received.
    pub(super) fn contains(&self, page: u64) -> bool {
        self.words[(page / 64) as usize].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }

    pub(super) fn fill(&self, run: PageRun) {
        for (index, mask) in masks(run) {
            let word = &self.words[index];
            word.store(word.load(Ordering::Relaxed) | mask, Ordering::Relaxed);
        }
    }

    /// Gives `clear` each page of `run` that was filled, which it then no longer is.
    pub(super) fn unfill(&self, run: PageRun, mut clear: impl FnMut(u64)) {
        for (index, mask) in masks(run) {
            let word = self.words[index].load(Ordering::Relaxed);
            let mut filled = word & mask;
            if filled == 0 {
                continue;
            }
            self.words[index].store(word & !mask, Ordering::Relaxed);
            while filled != 0 {
                clear(index as u64 * 64 + u64::from(filled.trailing_zeros()));
                filled &= filled - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 700;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_filled_agrees_with_a_set_of_pages(
            steps in proptest::collection::vec((any::<bool>(), 0..PAGES, 1..200u64), 1..60)
        ) {
            let filled = Filled::new(PAGES);
            let mut oracle = BTreeSet::new();
            for (fill, first, count) in steps {
                let run = PageRun { first, count: count.min(PAGES - first) };
                if fill {
                    filled.fill(run);
                    oracle.extend(run.first..run.first + run.count);
                } else {
                    let mut cleared = Vec::new();
                    filled.unfill(run, |page| cleared.push(page));
                    let expected: Vec<u64> = oracle.range(run.first..run.first + run.count).copied().collect();
                    prop_assert_eq!(cleared, expected);
                    oracle.retain(|page| !(run.first..run.first + run.count).contains(page));
                }
            }
            for page in 0..PAGES {
                prop_assert_eq!(filled.contains(page), oracle.contains(&page));
            }
        }
    }
}
