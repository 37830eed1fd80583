//! Memory that is written and compared: pages with a pattern that is known from outside, and pages that carry a
//! checksum of themselves.

use std::time::Duration;

use crate::duty::{Check, Duty};
use crate::heap::Heap;
use crate::random::{Random, checksum, mix};
use crate::report::{Count, Fault, Report};

const WORDS: usize = 512;
type Page = [u64; WORDS];

/// A step compares this part of the memory, and rewrites that of what it compared. The second is odd, so that it
/// is other pages each time around.
const COMPARED: usize = 8;
const REWRITTEN: usize = 15;

/// Half of `bytes` with patterns, three eighths with checksums, the rest nodes of the heap.
pub(crate) fn start(duty: &mut Duty, bytes: usize) {
    duty.start(Patterns::new(bytes / 2 / size_of::<Page>()));
    duty.start(Pages::new(bytes * 3 / 8 / size_of::<Page>()));
    duty.start(Heap::new(bytes / 8 / Heap::NODE_BYTES));
}

/// Each word follows from its place and from how often its page was written, which is kept elsewhere.
struct Patterns {
    pages: Vec<Page>,
    written: Vec<u64>,
    steps: usize,
}

impl Patterns {
    fn new(pages: usize) -> Self {
        let mut patterns = Self { pages: vec![[0; WORDS]; pages], written: vec![0; pages], steps: 0 };
        (0..pages).for_each(|page| patterns.write(page));
        patterns
    }

    fn word(page: usize, written: u64, word: usize) -> u64 {
        mix((page as u64) << 32 ^ written).wrapping_add(word as u64)
    }

    fn write(&mut self, page: usize) {
        self.written[page] += 1;
        let first = Self::word(page, self.written[page], 0);
        for (word, i) in self.pages[page].iter_mut().zip(0..) {
            *word = first.wrapping_add(i);
        }
    }

    fn compare(&self, page: usize) -> Result<(), Fault> {
        let first = Self::word(page, self.written[page], 0);
        let wrong = self.pages[page].iter().zip(0..).find(|(word, i)| **word != first.wrapping_add(*i));
        let Some((found, i)) = wrong else { return Ok(()) };
        // An older page is what a lost write leaves.
        let older = (0..self.written[page]).rev().take(100).find(|n| Self::word(page, *n, 0) == *found - i);
        let found = match older {
            Some(n) => format!("{found:#x}, as it was {} writes before", self.written[page] - n),
            None => format!("{found:#x}"),
        };
        let expected = format!("{:#x} in word {i} of page {page}", first.wrapping_add(i));
        Err(Fault::new("pattern in memory", expected, found))
    }
}

impl Check for Patterns {
    const NAME: &'static str = "patterns";
    const PERIOD: Duration = Duration::from_millis(400);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        let mut result = Ok(());
        for _ in 0..self.pages.len().div_ceil(COMPARED) {
            self.steps += 1;
            let page = self.steps % self.pages.len();
            let compared = self.compare(page);
            if compared.is_err() || self.steps.is_multiple_of(REWRITTEN) {
                self.write(page);
            }
            report.checked(Count::Patterns, 1);
            result = result.and(compared);
        }
        result
    }
}

/// The last word of each page is the checksum of the others, which are random.
struct Pages {
    pages: Vec<Page>,
    random: Random,
}

impl Pages {
    fn new(pages: usize) -> Self {
        let mut new = Self { pages: vec![[0; WORDS]; pages], random: Random::new(pages as u64) };
        (0..pages).for_each(|page| new.write(page));
        new
    }

    fn write(&mut self, page: usize) {
        let (sum, words) = self.pages[page].split_last_mut().expect("a page has words");
        words.iter_mut().for_each(|word| *word = self.random.next());
        *sum = checksum(words);
    }

    fn compare(&self, page: usize) -> Result<(), Fault> {
        let (sum, words) = self.pages[page].split_last().expect("a page has words");
        match checksum(words) {
            found if found == *sum => Ok(()),
            found => {
                let expected = format!("checksum {sum:#x} of page {page}");
                Err(Fault::new("checksum of a page", expected, format!("{found:#x}")))
            }
        }
    }
}

impl Check for Pages {
    const NAME: &'static str = "pages";
    const PERIOD: Duration = Duration::from_millis(400);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        let mut result = Ok(());
        for i in 0..self.pages.len().div_ceil(COMPARED) {
            let page = self.random.below(self.pages.len());
            let compared = self.compare(page);
            if compared.is_err() || i.is_multiple_of(REWRITTEN) {
                self.write(page);
            }
            report.checked(Count::Pages, 1);
            result = result.and(compared);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(Duration::from_secs(5))
    }

    #[test]
    fn a_changed_word_of_a_pattern_is_found() {
        let mut patterns = Patterns::new(20);
        patterns.pages[7][100] ^= 1 << 40;
        let faults: Vec<Fault> = (0..COMPARED).filter_map(|_| patterns.step(&report()).err()).collect();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].expected.contains("word 100 of page 7"), "{faults:?}");
        assert!((0..COMPARED).all(|_| patterns.step(&report()).is_ok()), "it was mended");
    }

    #[test]
    fn a_page_whose_last_writes_were_lost_is_found_and_its_age_told() {
        let mut patterns = Patterns::new(3);
        let stale = patterns.pages[1];
        patterns.write(1);
        patterns.write(1);
        patterns.pages[1] = stale;
        let fault = patterns.compare(1).unwrap_err();
        assert!(fault.found.contains("2 writes before"), "{fault:?}");
    }

    #[test]
    fn pages_exchanged_are_found() {
        let mut patterns = Patterns::new(3);
        patterns.pages.swap(0, 2);
        assert!(patterns.compare(0).is_err() && patterns.compare(1).is_ok() && patterns.compare(2).is_err());
    }

    #[test]
    fn a_changed_word_of_a_page_with_a_checksum_is_found() {
        let mut pages = Pages::new(8);
        pages.pages[3][WORDS - 1] ^= 1;
        assert!(pages.compare(3).is_err() && pages.compare(2).is_ok());
        pages.pages[5][0] = 0;
        assert!(pages.compare(5).is_err());
        assert!((0..200).any(|_| pages.step(&report()).is_err()));
        for _ in 0..200 {
            let _found_or_not = pages.step(&report());
        }
        assert!((0..8).all(|page| pages.compare(page).is_ok()), "they were mended");
    }
}
