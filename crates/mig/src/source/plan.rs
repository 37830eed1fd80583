//! A round's plan: which pages go next, on which channel, re-armed before they are read.
//!
//! Invariant: a page always travels the channel of its chunk, so it needs no barrier to arrive in order.

use mig_core::Bitmap;
use mig_core::bitmap::{self, PageRun};
use mig_core::domain::{CHUNK_PAGES, Domain};

use crate::encoding::encoder::Moment;
use crate::guest::{BoxError, DirtyTracker};

/// Pages that are re-armed together. Large, because each call interrupts the vCPUs; small, because the
/// longer a page waits between re-arming and reading, the more often it is sent in vain.
const WINDOW_PAGES: u64 = 16 * CHUNK_PAGES;
/// Pages that a batch holds.
const BATCH_PAGES: u64 = CHUNK_PAGES;

/// What comes next in a round.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// These pages on this channel.
    Batch(usize, Vec<PageRun>),
    /// Nothing: the round is planned.
    Done,
}

/// The pages of a round, batch by batch.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) round: u32,
    /// Whether vCPUs run, so that pages must be watched again before they are read.
    pub(super) rearm: bool,
    channels: usize,
    /// Where the next window starts.
    cursor: u64,
    planned_pages: u64,
    total_pages: u64,
    batches: Vec<Batch>,
    /// Full batches of the window, the next one last.
    full: Vec<(usize, Vec<PageRun>)>,
    words: Vec<u64>,
}

#[derive(Debug, Default)]
struct Batch {
    runs: Vec<PageRun>,
    pages: u64,
}

impl Plan {
    pub(super) fn new(round: u32, rearm: bool, channels: usize, dirty: &Bitmap) -> Self {
        Self {
            round,
            rearm,
            channels,
            cursor: 0,
            planned_pages: 0,
            total_pages: dirty.count(),
            batches: (0..channels).map(|_| Batch::default()).collect(),
            full: Vec::new(),
            words: Vec::new(),
        }
    }

    /// When its pages are sent.
    pub(super) fn moment(&self) -> Moment {
        Moment { round: self.round, is_last: !self.rearm }
    }

    /// Pages planned so far, and in all.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.planned_pages, self.total_pages)
    }

    /// The next batch. Takes pages out of `dirty` and has `tracker` watch them; empty batches come from
    /// `spare`.
    pub(super) fn next(
        &mut self,
        domain: &Domain,
        dirty: &mut Bitmap,
        tracker: &mut dyn DirtyTracker,
        mut spare: impl FnMut() -> Vec<PageRun>,
    ) -> Result<Next, BoxError> {
        while self.full.is_empty() {
            let Some(page) = dirty.next_set(self.cursor) else { return Ok(self.rest()) };
            self.window(domain, page, dirty, tracker, &mut spare)?;
        }
        Ok(self.full.pop().map_or(Next::Done, |(channel, runs)| Next::Batch(channel, runs)))
    }

    /// Batches that no window filled.
    fn rest(&mut self) -> Next {
        for (channel, batch) in self.batches.iter_mut().enumerate() {
            if batch.pages > 0 {
                return Next::Batch(channel, std::mem::take(batch).runs);
            }
        }
        Next::Done
    }

    fn window(
        &mut self,
        domain: &Domain,
        page: u64,
        dirty: &mut Bitmap,
        tracker: &mut dyn DirtyTracker,
        spare: &mut impl FnMut() -> Vec<PageRun>,
    ) -> Result<(), BoxError> {
        let start = page - page % CHUNK_PAGES;
        let region_end = domain.extent_of(page).map_or(start + CHUNK_PAGES, |e| e.end_page());
        let end = (start + WINDOW_PAGES).min(region_end);
        let mut words = std::mem::take(&mut self.words);
        self.planned_pages += dirty.take_words(start..end, &mut words);
        if self.rearm {
            tracker.rearm(start, &words)?;
        }
        for run in bitmap::runs(start, &words) {
            self.add(run, spare);
        }
        // batches are popped from the end
        self.full.reverse();
        self.words = words;
        self.cursor = end.next_multiple_of(CHUNK_PAGES);
        Ok(())
    }

    /// Splits a run at chunk borders, since each chunk has its own channel.
    fn add(&mut self, run: PageRun, spare: &mut impl FnMut() -> Vec<PageRun>) {
        let (mut first, end) = (run.first, run.first + run.count);
        while first < end {
            let chunk = first / CHUNK_PAGES;
            let stop = end.min((chunk + 1) * CHUNK_PAGES);
            let channel = channel_of(first, self.channels);
            let batch = &mut self.batches[channel];
            let count = (stop - first).min(BATCH_PAGES - batch.pages);
            batch.runs.push(PageRun { first, count });
            batch.pages += count;
            first += count;
            if batch.pages == BATCH_PAGES {
                let next = Batch { runs: spare(), pages: 0 };
                let done = std::mem::replace(batch, next);
                self.full.push((channel, done.runs));
            }
        }
    }
}

/// The channel that a page travels.
pub(crate) fn channel_of(page: u64, channels: usize) -> usize {
    usize::try_from(page / CHUNK_PAGES % channels as u64).expect("less than the channels")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use mig_wire::describe::Region;
    use proptest::prelude::*;

    use super::*;

    /// Remembers what it was told to watch.
    #[derive(Default)]
    struct Watched(Mutex<BTreeSet<u64>>);

    impl DirtyTracker for Watched {
        fn start(&mut self) -> Result<(), BoxError> {
            Ok(())
        }
        fn sync(&mut self, _: &mut Bitmap) -> Result<(), BoxError> {
            Ok(())
        }
        fn rearm(&self, first_page: u64, words: &[u64]) -> Result<(), BoxError> {
            let pages = bitmap::runs(first_page, words).flat_map(|r| r.first..r.first + r.count);
            self.0.lock().unwrap().extend(pages);
            Ok(())
        }
        fn stop(&mut self) -> Result<(), BoxError> {
            Ok(())
        }
    }

    fn domain() -> Domain {
        Domain::new(&[
            Region { guest_address: 0, bytes: 20_000 * 4096 },
            Region { guest_address: 1 << 32, bytes: 3000 * 4096 },
        ])
        .unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_dirty_page_is_planned_once_on_its_channel_after_it_was_watched(
            seeds in proptest::collection::vec((any::<u64>(), 1..900u64), 0..60), channels in 1..5usize
        ) {
            let domain = domain();
            let mut dirty = Bitmap::empty(&domain);
            for (seed, count) in seeds {
                let extent = domain.extents()[(seed % 2) as usize];
                let first = extent.first_page + seed / 2 % extent.pages;
                dirty.set_run(PageRun { first, count: count.min(extent.end_page() - first) });
            }
            let expected: Vec<u64> = (0..domain.end_page()).filter(|p| dirty.contains(*p)).collect();
            let mut watched = Watched::default();
            let mut plan = Plan::new(3, true, channels, &dirty);
            let mut sent = BTreeSet::new();
            while let Next::Batch(channel, runs) = plan.next(&domain, &mut dirty, &mut watched, Vec::new).unwrap() {
                let pages: Vec<u64> = runs.iter().flat_map(|r| r.first..r.first + r.count).collect();
                prop_assert!(!pages.is_empty() && pages.len() as u64 <= BATCH_PAGES);
                for page in pages {
                    prop_assert_eq!(channel_of(page, channels), channel);
                    prop_assert!(watched.0.lock().unwrap().contains(&page), "watched before it is read");
                    prop_assert!(sent.insert(page), "sent once");
                }
            }
            prop_assert_eq!(sent.into_iter().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(plan.progress(), (expected.len() as u64, expected.len() as u64));
            prop_assert_eq!(dirty.count(), 0);
        }
    }
}
