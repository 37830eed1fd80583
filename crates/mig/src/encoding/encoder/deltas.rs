//! Pages that were sent before, as what changed of them since.

use std::ops::Range;

use mig_core::bitmap::PageRun;

use super::{Moment, Origin, Settings};
use crate::encoding::Compress;
use crate::encoding::cache::{Cache, Slot};
use crate::encoding::delta::{self, Page};
use crate::encoding::reluctance::Reluctance;
use crate::memory::{PAGE, Pages};

/// How a page is to be sent.
pub(super) enum Sent {
    /// As what changed: this range of what was encoded.
    Encoded(Range<usize>),
    /// Otherwise, from there.
    From(Origin),
}

/// The cache, and what goes through it.
pub(super) struct Deltas {
    cache: Cache,
    reluctance: Reluctance,
    copy: Box<Page>,
}

impl Deltas {
    pub(super) fn new(settings: &Settings) -> Option<Self> {
        let Settings { compress, channels, cache_bytes } = *settings;
        (compress == Compress::Delta).then(|| Self {
            cache: Cache::new(cache_bytes, channels),
            reluctance: Reluctance::new(channels),
            copy: Box::new([0; PAGE]),
        })
    }

    /// Chooses how a page is sent, which is not zeros. What changed of it is appended to `encoded`.
    pub(super) fn page(&mut self, pages: &Pages, moment: Moment, page: u64, encoded: &mut Vec<u8>) -> Sent {
        let run = PageRun { first: page, count: 1 };
        if !self.reluctance.tries(page) {
            self.cache.forget(page);
            return Sent::From(None);
        }
        if let Some(slot) = self.cache.find(page) {
            // once: the guest may write between two looks at its memory
            pages.copy(run, &mut self.copy[..]);
            let start = encoded.len();
            let pays = delta::encode(self.cache.content(slot), &self.copy, encoded);
            self.reluctance.tried(page, pays);
            *self.cache.renew(slot, moment.round) = *self.copy;
            return if pays { Sent::Encoded(start..encoded.len()) } else { Sent::From(Some(slot)) };
        }
        if moment.is_last {
            return Sent::From(None);
        }
        Sent::From(self.cache.take_in(page, moment.round, |content| pages.copy(run, &mut content[..])))
    }

    /// Pages that are sent as zeros.
    pub(super) fn forget(&mut self, run: PageRun) {
        (run.first..run.first + run.count).for_each(|page| self.cache.forget(page));
    }

    /// What was kept of a page, and is what is sent of it.
    pub(super) fn content(&self, slot: Slot) -> &Page {
        self.cache.content(slot)
    }
}
