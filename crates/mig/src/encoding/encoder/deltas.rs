//! Pages that were sent before, as what changed of them since.

use std::time::{Duration, Instant};

use mig_core::bitmap::PageRun;
use mig_wire::hello::Capabilities;

use super::worth::{Budget, Link};
use super::{Moment, Origin, Settings};
use crate::encoding::Compress;
use crate::encoding::cache::{Cache, Slot};
use crate::encoding::delta::{self, Page};
use crate::encoding::reluctance::Reluctance;
use crate::memory::{PAGE, Pages};

/// The cache, and what goes through it.
pub(super) struct Deltas {
    cache: Cache,
    reluctance: Reluctance,
    budget: Budget,
    copy: Box<Page>,
    /// What the cache may have where it is found to pay, and among how many channels its chunks are shared.
    full: (usize, usize),
    is_full: bool,
    /// The round that is on its way.
    round: u32,
    /// Whether any page was met again, so that it is known how what changed pays.
    has_met: bool,
}

/// From this slowness of a link on, pages are kept before it is known whether that pays.
const CHEAP_SLOWNESS: f64 = 2.0;

/// What the cache has while it is not known to pay, on a link on which that is not to be expected.
const TRIED_BYTES: usize = 64 * PAGE;

impl Deltas {
    /// None where they are not wanted, or not understood.
    pub(super) fn new(settings: &Settings) -> Option<Self> {
        let Settings { compress, understood, channels, cache_bytes, .. } = *settings;
        let budget = match compress {
            Compress::Delta => Budget::Unbounded,
            Compress::Auto => Budget::earned(),
            Compress::Off | Compress::Zstd(_) => return None,
        };
        let is_full = matches!(budget, Budget::Unbounded);
        let bytes = if is_full { cache_bytes } else { TRIED_BYTES.min(cache_bytes) };
        understood.contains(Capabilities::DELTA).then(|| Self {
            cache: Cache::new(bytes, channels),
            reluctance: Reluctance::new(channels),
            budget,
            copy: Box::new([0; PAGE]),
            full: (cache_bytes, channels),
            is_full,
            round: 0,
            has_met: false,
        })
    }

    /// Between batches: gives the cache all that it may have once that is found to pay, or before that on a link so slow
    /// that it may well; takes it away where by the start of a round it is found not to pay. In the pause all stays.
    pub(super) fn fit(&mut self, moment: Moment, link: Link) {
        let starts = std::mem::replace(&mut self.round, moment.round) != moment.round;
        if moment.is_last {
            return;
        }
        let (pays, hopeful) = (self.budget.pays(link), !self.has_met && link.slowness() > 1.0);
        let (bytes, channels) = self.full;
        if !self.is_full && (pays || hopeful) {
            (self.cache, self.is_full) = (Cache::new(bytes, channels), true);
        } else if self.is_full && starts && !pays && !hopeful {
            (self.cache, self.is_full) = (Cache::new(TRIED_BYTES.min(bytes), channels), false);
        }
    }

    /// Time has passed, in which something may be tried.
    pub(super) fn allow_for(&mut self, passed: Duration, link: Link) {
        self.budget.allow_for(passed, link);
    }

    /// Chooses where each page of a run is sent from, none of which is zeros. What changed of them is appended to
    /// `encoded`. Pages are taken in as far as that pays, or may be tried; in the pause none, since nothing follows.
    /// Those that are here already were paid for.
    pub(super) fn choose(
        &mut self,
        pages: &Pages,
        moment: Moment,
        run: PageRun,
        link: Link,
        encoded: &mut Vec<u8>,
        origins: &mut Vec<Origin>,
    ) {
        let room = if self.is_cheap(link) { usize::MAX } else { self.budget.affords(link) };
        let mut room = if moment.is_last { 0 } else { room };
        if room == 0 && !self.cache.holds_near(run.first) {
            origins.resize(run.count as usize, Origin::Guest);
            return;
        }
        let (began, start) = (Instant::now(), encoded.len());
        origins.extend((run.first..run.first + run.count).map(|page| {
            if self.reluctance.tries(page) {
                self.page(pages, moment, page, &mut room, encoded)
            } else {
                self.cache.forget(page);
                Origin::Guest
            }
        }));
        let copied = origins.iter().filter(|origin| **origin != Origin::Guest).count();
        if copied > 0 {
            let changed = origins.iter().filter(|origin| origin.is_encoded()).count();
            let saved = (changed * PAGE).saturating_sub(encoded.len() - start);
            self.budget.settle(copied, began.elapsed(), saved, link);
        }
    }

    fn page(
        &mut self,
        pages: &Pages,
        moment: Moment,
        page: u64,
        room: &mut usize,
        encoded: &mut Vec<u8>,
    ) -> Origin {
        let run = PageRun { first: page, count: 1 };
        if let Some(slot) = self.cache.find(page) {
            self.has_met = true;
            // once: the guest may write between two looks at its memory
            pages.copy(run, &mut self.copy[..]);
            let start = encoded.len();
            let pays = delta::encode(self.cache.content(slot), &self.copy, encoded);
            self.reluctance.tried(page, pays);
            *self.cache.renew(slot, moment.round) = *self.copy;
            return if pays { Origin::Encoded(start..encoded.len()) } else { Origin::Cached(slot) };
        }
        if *room == 0 {
            return Origin::Guest;
        }
        *room -= 1;
        let taken_in = self.cache.take_in(page, moment.round, |content| pages.copy(run, &mut content[..]));
        taken_in.map_or(Origin::Guest, Origin::Cached)
    }

    /// Whether it costs next to nothing to keep pages until one of them is met again: a copy takes a fiftieth of what
    /// such a link takes for a page.
    fn is_cheap(&self, link: Link) -> bool {
        self.is_full && !self.has_met && link.slowness() >= CHEAP_SLOWNESS
    }

    /// Pages that are sent as zeros.
    pub(super) fn forget(&mut self, run: PageRun) {
        if self.cache.holds_near(run.first) {
            (run.first..run.first + run.count).for_each(|page| self.cache.forget(page));
        }
    }

    #[cfg(test)]
    pub(super) fn is_full(&self) -> bool {
        self.is_full
    }

    /// What was kept of a page, and is what is sent of it.
    pub(super) fn content(&self, slot: Slot) -> &Page {
        self.cache.content(slot)
    }
}
