//! Neighbours, compressed together where that pays.

use std::ops::Range;
use std::time::Duration;

use mig_wire::hello::Capabilities;
use mig_wire::pages::MAX_ZSTD_PAGES;

use super::effort::{Effort, sharing};
use super::ladder::Ladder;
use super::worth::{Budget, Link, with_decoding_ns};
use super::{Moment, Settings, Stretch};
use crate::encoding::Compress;
use crate::encoding::reluctance::Reluctance;
use crate::encoding::zstd::Packer;
use crate::memory::PAGE;

/// Pages that are compressed to see whether it pays.
const PROBED_PAGES: usize = 16;

/// Compresses stretches of pages.
pub(super) struct Packing {
    packer: Packer,
    level: i32,
    /// Whether that level is not known to pay.
    is_try: bool,
    /// Where the level is chosen by what it saves.
    ladder: Option<Ladder>,
    budget: Budget,
    reluctance: Reluctance,
    copy: Vec<u8>,
    /// How many channels share a core.
    sharing: f64,
}

impl Packing {
    /// None where it is not wanted, or not understood, or there is no memory for it: then pages go raw.
    pub(super) fn new(settings: &Settings) -> Option<Self> {
        let (budget, ladder, level) = match settings.compress {
            Compress::Zstd(level) => (Budget::Unbounded, None, level.into()),
            Compress::Auto => (Budget::earned(), Some(Ladder::default()), Ladder::default().level()),
            Compress::Off | Compress::Delta => return None,
        };
        if !settings.understood.contains(Capabilities::ZSTD) {
            return None;
        }
        let packer = Packer::new(level).ok()?;
        let (reluctance, copy) = (Reluctance::new(settings.channels), vec![0; MAX_ZSTD_PAGES * PAGE]);
        let sharing = sharing(settings.channels);
        Some(Self { packer, level, is_try: false, ladder, budget, reluctance, copy, sharing })
    }

    /// Time has passed, in which something may be tried.
    pub(super) fn allow_for(&mut self, passed: Duration, link: Link) {
        self.budget.allow_for(passed, link);
    }

    /// How many pages to compress together now, from `page` on: as many as may be where it pays, a few where that is
    /// to be found out, or none. In the pause nothing is found out: what was before is applied to the link as it is then.
    pub(super) fn pages_together(&mut self, page: u64, moment: Moment, link: Link) -> usize {
        let paying = match &mut self.ladder {
            None => Some(self.level),
            Some(ladder) if moment.is_last => ladder.best(link),
            Some(ladder) => ladder.paying(link),
        };
        let may_try = !moment.is_last && self.budget.tries() >= PROBED_PAGES;
        if paying.is_none() && !may_try || !self.reluctance.tries(page) {
            return 0;
        }
        self.is_try = paying.is_none();
        let next = || self.ladder.as_mut().map(Ladder::next_try);
        self.level = paying.or_else(next).unwrap_or(self.level);
        if self.is_try { PROBED_PAGES } else { MAX_ZSTD_PAGES }
    }

    /// Appends a stretch to `encoded`, if that pays: which range of it that is.
    pub(super) fn pack(
        &mut self,
        stretch: &Stretch<'_>,
        moment: Moment,
        link: Link,
        encoded: &mut Vec<u8>,
    ) -> Option<Range<usize>> {
        let (effort, raw_bytes) = (Effort::begin(), stretch.origins.len() * PAGE);
        stretch.copy(&mut self.copy[..raw_bytes]);
        let start = encoded.len();
        let bytes = self.append(self.level, raw_bytes, encoded);
        let took = effort.took(self.sharing);
        self.settle(self.level, raw_bytes, took, bytes);
        self.budget.took(raw_bytes / PAGE, took, saved(raw_bytes, bytes), self.is_try);
        self.reluctance.tried(stretch.first, bytes.is_some());
        let ladder = self.ladder.as_mut().filter(|_| !moment.is_last);
        let rival = ladder.and_then(|ladder| ladder.rival(raw_bytes / PAGE));
        let Some((rival, bytes)) = rival.zip(bytes) else { return bytes.map(|bytes| start..start + bytes) };
        Some(self.compare(rival, raw_bytes, (bytes, took), link, encoded, start))
    }

    /// Compresses the same pages at another level; what is smaller stays.
    fn compare(
        &mut self,
        rival: i32,
        raw_bytes: usize,
        (bytes, took): (usize, Duration),
        link: Link,
        encoded: &mut Vec<u8>,
        start: usize,
    ) -> Range<usize> {
        let (effort, rival_start) = (Effort::begin(), encoded.len());
        let rival_bytes = self.append(rival, raw_bytes, encoded);
        let rival_took = effort.took(self.sharing);
        let smaller = rival_bytes.is_some_and(|rival_bytes| rival_bytes < bytes);
        if smaller {
            encoded.drain(start..rival_start);
        } else {
            encoded.truncate(rival_start);
        }
        let net = |bytes, took: Duration| link.ns(saved(raw_bytes, bytes)) - took.as_nanos() as f64;
        let lead = net(rival_bytes, rival_took) - net(Some(bytes), took);
        self.budget.spend(rival_took);
        self.settle(rival, raw_bytes, rival_took, rival_bytes);
        if let Some(ladder) = &mut self.ladder {
            ladder.judge(lead);
            self.level = ladder.level();
        }
        start..encoded.len()
    }

    /// What a level took and saved is known.
    fn settle(&mut self, level: i32, raw_bytes: usize, took: Duration, bytes: Option<usize>) {
        let (pages, saved_bytes) = (raw_bytes / PAGE, saved(raw_bytes, bytes));
        if let Some(ladder) = &mut self.ladder {
            ladder.settle(level, pages, with_decoding_ns(took), saved_bytes);
        }
    }

    /// Appends the copied pages, compressed at `level`, if they shrink enough.
    fn append(&mut self, level: i32, raw_bytes: usize, encoded: &mut Vec<u8>) -> Option<usize> {
        let start = encoded.len();
        encoded.resize(start + Packer::most_bytes(raw_bytes), 0);
        let bytes = self.packer.pack(level, &self.copy[..raw_bytes], &mut encoded[start..]);
        encoded.truncate(start + bytes.unwrap_or(0));
        bytes
    }
}

fn saved(raw_bytes: usize, bytes: Option<usize>) -> usize {
    bytes.map_or(0, |bytes| raw_bytes - bytes)
}
