//! Which pages are to be sent: one bit a page, by words.
//!
//! Invariant: bits that belong to no page of the domain are never set.

use crate::domain::Domain;

/// A run of pages with consecutive indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Index of the first page.
    pub first: u64,
    /// How many pages; not zero.
    pub count: u64,
}

/// One bit for each page of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    /// No page set.
    pub fn empty(domain: &Domain) -> Self {
        let words = usize::try_from(domain.end_page().div_ceil(64)).expect("MAX_PAGES / 64 fits");
        Self { words: vec![0; words] }
    }

    /// Every page of the domain set.
    pub fn full(domain: &Domain) -> Self {
        let mut bitmap = Self::empty(domain);
        for extent in domain.extents() {
            bitmap.set_run(PageRun { first: extent.first_page, count: extent.pages });
        }
        bitmap
    }

    /// The words, least significant bit first: page `64 * i + b` is bit `b` of word `i`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The words, to change; callers keep to the domain's pages.
    pub(crate) fn words_mut(&mut self) -> std::slice::IterMut<'_, u64> {
        self.words.iter_mut()
    }

    /// Sets one page.
    ///
    /// # Panics
    /// When the page is beyond the bitmap.
    pub fn set(&mut self, page: u64) {
        self.words[word_of(page)] |= 1 << (page % 64);
    }

    /// Whether a page is set; pages beyond the bitmap are not.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get(word_of(page)).is_some_and(|w| w >> (page % 64) & 1 == 1)
    }

    /// Sets a run of pages.
    ///
    /// # Panics
    /// When it reaches beyond the bitmap.
    pub fn set_run(&mut self, run: PageRun) {
        for (index, mask) in masks(run) {
            self.words[index] |= mask;
        }
    }

    /// Sets the pages whose bits are set in `words`, which start at page `first_page` (a multiple of 64).
    ///
    /// # Panics
    /// When `first_page` is no multiple of 64 or the words reach beyond the bitmap.
    pub fn or_words(&mut self, first_page: u64, words: &[u64]) {
        assert_eq!(first_page % 64, 0, "words start at a multiple of 64 pages");
        let at = word_of(first_page);
        for (to, from) in self.words[at..at + words.len()].iter_mut().zip(words) {
            *to |= from;
        }
    }

    /// How many pages are set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Unsets every page.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Takes the words of `pages` (both ends multiples of 64, the end cut to the bitmap's) into `into`,
    /// leaving them unset here; returns how many pages they held.
    ///
    /// # Panics
    /// When the range does not start at a multiple of 64.
    pub fn take_words(&mut self, pages: std::ops::Range<u64>, into: &mut Vec<u64>) -> u64 {
        assert_eq!(pages.start % 64, 0, "words start at a multiple of 64 pages");
        let end = word_of(pages.end.next_multiple_of(64)).min(self.words.len());
        let words = &mut self.words[word_of(pages.start).min(end)..end];
        into.clear();
        into.extend_from_slice(words);
        words.fill(0);
        into.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// The first set page at or after `from`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        let start = word_of(from);
        let first = self.words.get(start)? & (!0 << (from % 64));
        let rest = self.words.iter().skip(start + 1).copied();
        std::iter::once(first)
            .chain(rest)
            .zip(start as u64..)
            .find(|(word, _)| *word != 0)
            .map(|(word, index)| index * 64 + u64::from(word.trailing_zeros()))
    }
}

/// The runs of set bits in `words`, which start at page `first_page`.
pub fn runs(first_page: u64, words: &[u64]) -> Runs<'_> {
    Runs { words, first_page, at: 0 }
}

/// Iterator made by [`runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    words: &'a [u64],
    first_page: u64,
    at: u64,
}

impl Runs<'_> {
    /// The first bit at or after `from` that is set (or, inverted, unset).
    fn seek(&self, from: u64, invert: u64) -> Option<u64> {
        let mut index = word_of(from);
        let mut word = (self.words.get(index)? ^ invert) & (!0 << (from % 64));
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ invert;
        }
        Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let start = self.seek(self.at, 0)?;
        let end = self.seek(start, !0).unwrap_or(self.words.len() as u64 * 64);
        self.at = end;
        Some(PageRun { first: self.first_page + start, count: end - start })
    }
}

fn word_of(page: u64) -> usize {
    usize::try_from(page / 64).unwrap_or(usize::MAX)
}

/// The words that a run touches, by their indices, with the mask of its bits in each.
pub fn masks(run: PageRun) -> impl Iterator<Item = (usize, u64)> {
    let end = run.first + run.count;
    (run.first / 64..end.div_ceil(64)).map(move |word| {
        let low = run.first.max(word * 64) - word * 64;
        let high = end.min(word * 64 + 64) - word * 64;
        (word_of(word * 64), (!0 << low) & (!0 >> (64 - high)))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mig_wire::describe::Region;
    use proptest::prelude::*;

    use super::*;
    use crate::domain::PAGE_BYTES;

    fn domain(pages: u64) -> Domain {
        Domain::new(&[Region { guest_address: 0, bytes: pages * PAGE_BYTES }]).unwrap()
    }

    #[derive(Debug, Clone)]
    enum Operation {
        Set(u64),
        SetRun(u64, u64),
        OrWords(u64, Vec<u64>),
        Take(u64, u64),
        NextSet(u64),
        Runs,
        Clear,
    }

    const PAGES: u64 = 1000;
    const WORDS: u64 = PAGES.div_ceil(64);

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            8 => (0..PAGES).prop_map(Operation::Set),
            8 => (0..PAGES, 1..200u64).prop_map(|(f, c)| Operation::SetRun(f, c.min(PAGES - f))),
            4 => (0..WORDS - 2, proptest::collection::vec(any::<u64>(), 0..3)).prop_map(|(f, w)| Operation::OrWords(f * 64, w)),
            4 => (0..WORDS, 0..WORDS + 3).prop_map(|(a, b)| Operation::Take(a * 64, b.max(a) * 64)),
            4 => (0..PAGES + 100).prop_map(Operation::NextSet),
            4 => Just(Operation::Runs),
            1 => Just(Operation::Clear),
        ]
    }

    fn apply(bitmap: &mut Bitmap, oracle: &mut BTreeSet<u64>, operation: Operation) {
        match operation {
            Operation::Set(page) => {
                bitmap.set(page);
                oracle.insert(page);
            }
            Operation::SetRun(first, count) => {
                bitmap.set_run(PageRun { first, count });
                oracle.extend(first..first + count);
            }
            Operation::OrWords(first, words) => {
                bitmap.or_words(first, &words);
                let bits = words.iter().zip(0u64..).flat_map(|(w, i)| {
                    (0..64).filter(move |b| w >> b & 1 == 1).map(move |b| first + i * 64 + b)
                });
                oracle.extend(bits);
            }
            Operation::Take(start, end) => {
                let mut words = vec![1, 2, 3];
                let count = bitmap.take_words(start..end, &mut words);
                let taken: Vec<u64> = runs(start, &words).flat_map(|r| r.first..r.first + r.count).collect();
                let expected: Vec<u64> = oracle.range(start..end).copied().collect();
                assert_eq!((taken, count), (expected.clone(), expected.len() as u64));
                oracle.retain(|p| !(start..end).contains(p));
            }
            Operation::NextSet(from) => {
                assert_eq!(bitmap.next_set(from), oracle.range(from..).next().copied());
            }
            Operation::Runs => {
                let found: Vec<PageRun> = runs(0, bitmap.words()).collect();
                assert!(found.windows(2).all(|w| w[0].first + w[0].count < w[1].first), "runs are maximal");
                let pages: Vec<u64> = found.iter().flat_map(|r| r.first..r.first + r.count).collect();
                assert_eq!(pages, oracle.iter().copied().collect::<Vec<_>>());
            }
            Operation::Clear => {
                bitmap.clear();
                oracle.clear();
            }
        }
        assert_eq!(bitmap.count(), oracle.len() as u64);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        /// 100 cases of 100 operations: ten thousand.
        #[test]
        fn ten_thousand_random_operations_agree_with_a_set_of_pages(
            operations in proptest::collection::vec(operation(), 100)
        ) {
            let mut bitmap = Bitmap::empty(&domain(PAGES));
            let mut oracle = BTreeSet::new();
            for operation in operations {
                apply(&mut bitmap, &mut oracle, operation);
            }
            for page in 0..PAGES + 64 {
                prop_assert_eq!(bitmap.contains(page), oracle.contains(&page));
            }
        }
    }

    #[test]
    fn a_full_bitmap_holds_the_pages_of_every_region_and_no_gap() {
        let domain = Domain::new(&[
            Region { guest_address: 0, bytes: 70 * PAGE_BYTES },
            Region { guest_address: 1 << 32, bytes: 3 * PAGE_BYTES },
        ])
        .unwrap();
        let full = Bitmap::full(&domain);
        assert_eq!(full.count(), 73);
        assert!(full.contains(69) && !full.contains(70) && full.contains(512) && !full.contains(515));
    }
}
