//! A guest that writes its memory, and the tracker that finds what it wrote.
//!
//! A page is two halves, so that a read that a write overtakes is torn. The writer runs lazily: whoever looks
//! at memory first lets it run up to that instant.

use mig_core::policy::Throttle;
use mig_core::{Bitmap, Domain};

use crate::random::Random;
use crate::scenario::{Scenario, Tracking};
use crate::writer::Writer;

/// What a page holds; the default is a page of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Page {
    pub(crate) front: u32,
    pub(crate) back: u32,
}

impl Page {
    pub(crate) fn is_zero(self) -> bool {
        self == Self::default()
    }

    pub(crate) fn digest(self) -> u64 {
        (u64::from(self.front) << 32 | u64::from(self.back)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// The guest at the source.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) domain: Domain,
    pub(crate) memory: Vec<Page>,
    /// Counts writes; also what its saved state holds.
    pub(crate) writes: u32,
    pub(crate) runs: bool,
    pub(crate) tracked: bool,
    /// By how much it is slowed.
    pub(crate) throttle: Throttle,
    /// What the driver of the last migration left, for the mutant that keeps it.
    pub(crate) old_dirty: Option<Bitmap>,
    tracking: Tracking,
    /// Written since re-armed (ring: and not yet reported).
    written: Vec<u64>,
    /// Written and therefore not watched.
    unwatched: Vec<u64>,
    indices: Vec<u64>,
    writer: Writer,
    random: Random,
}

impl Guest {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        let domain = Domain::new(&scenario.regions).expect("scenarios have sound regions");
        let indices: Vec<u64> =
            domain.extents().iter().flat_map(|extent| extent.first_page..extent.end_page()).collect();
        let mut memory = vec![Page::default(); domain.end_page() as usize];
        for (&index, value) in indices.iter().zip(1..) {
            // every third page was never touched
            if index % 3 != 0 {
                memory[index as usize] = Page { front: value, back: value };
            }
        }
        let words = vec![0; domain.end_page().div_ceil(64) as usize];
        Self {
            domain,
            memory,
            writes: 1000,
            runs: true,
            tracked: false,
            throttle: Throttle::NONE,
            old_dirty: None,
            tracking: scenario.tracking,
            written: words.clone(),
            unwatched: words,
            indices,
            writer: Writer::new(scenario),
            random: Random::new(scenario.speed.latency),
        }
    }

    /// Lets the guest run until `now`.
    pub(crate) fn run_to(&mut self, now: u64) {
        let count = self.indices.len() as u64;
        while self.runs
            && let Some(at) = self.writer.next_until(now, count, self.throttle)
        {
            self.write(self.indices[at as usize]);
        }
    }

    fn write(&mut self, page: u64) {
        self.writes += 1;
        // now and then memory is zeroed
        let value = if self.writes.is_multiple_of(5) { 0 } else { self.writes };
        self.memory[page as usize] = Page { front: value, back: value };
        let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
        if self.tracked && self.unwatched[word] & bit == 0 {
            self.written[word] |= bit;
            self.unwatched[word] |= bit;
        }
    }

    /// A new run's clock starts near zero.
    pub(crate) fn restart_clock(&mut self) {
        self.writer.restart(0);
    }

    pub(crate) fn pause(&mut self, now: u64) {
        self.run_to(now);
        self.runs = false;
    }

    pub(crate) fn resume(&mut self, now: u64) {
        self.runs = true;
        self.writer.restart(now);
    }

    /// Devices that hold data back write it to memory as they are saved.
    pub(crate) fn save(&mut self, writes_memory: bool) -> u32 {
        if writes_memory {
            for _ in 0..2 {
                let at = self.random.within(0..self.indices.len() as u64);
                self.write(self.indices[at as usize]);
            }
        }
        self.writes
    }

    pub(crate) fn start_tracking(&mut self, now: u64) {
        self.run_to(now);
        self.tracked = true;
        self.written.fill(0);
        self.unwatched.fill(0);
    }

    pub(crate) fn sync(&mut self, now: u64, dirty: &mut Bitmap) {
        self.run_to(now);
        dirty.or_words(0, &self.written);
        match self.tracking {
            Tracking::ManualLog => {}
            Tracking::PlainLog => {
                self.written.fill(0);
                self.unwatched.fill(0);
            }
            Tracking::Ring => self.written.fill(0),
        }
    }

    pub(crate) fn rearm(&mut self, now: u64, first_page: u64, words: &[u64]) {
        self.run_to(now);
        let at = (first_page / 64) as usize;
        for (word, mask) in (at..).zip(words) {
            match self.tracking {
                Tracking::ManualLog => {
                    self.written[word] &= !mask;
                    self.unwatched[word] &= !mask;
                }
                Tracking::PlainLog => {}
                Tracking::Ring => self.unwatched[word] &= !mask,
            }
        }
    }
}

/// A digest of each chunk.
pub(crate) fn digests(domain: &Domain, memory: &[Page]) -> Vec<u64> {
    (0..domain.chunks())
        .map(|chunk| {
            domain
                .chunk_pages(chunk)
                .fold(7, |sum: u64, page| sum.wrapping_mul(31).wrapping_add(memory[page as usize].digest()))
        })
        .collect()
}
