//! Pages as they were sent before, so that only what changed since has to be.
//!
//! Invariant: what the cache holds of a page is what the destination holds of it, once it has read all that this
//! channel has encoded so far. So whoever sends a page otherwise than from here has the cache forget it.
//!
//! A page has four places where it may be; which, follows from its index among the channel's pages, so that a stretch of
//! neighbours no longer than the cache is kept whole. A page stays while it is sent in every round: one that was not
//! sent in the round before makes room. Where nothing does, a page is not taken in: of a working set that is larger
//! than the cache a part is kept, rather than each page only until the next ones come.

use mig_core::domain::CHUNK_PAGES;

use super::delta::Page;
use crate::memory::PAGE;

/// Places that a page may be at.
const WAYS: usize = 4;

/// Where a page is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(usize);

#[derive(Debug, Clone, Copy)]
struct Entry {
    page: Option<u64>,
    /// The round in which its content was put here; what was put here in this round may not have been sent yet.
    round: u32,
    /// Where that is among the blocks; none before it is used for the first time.
    at: Option<u32>,
}

/// Pages for which memory is found together: less than a huge page, all of which the host would have to clear.
const BLOCK_PAGES: usize = 64;

/// A channel's pages.
pub(crate) struct Cache {
    channels: u64,
    slots: usize,
    /// None before the first page is taken in.
    entries: Vec<Entry>,
    /// How many pages of each of the channel's chunks are here.
    in_chunk: Vec<u16>,
    blocks: Vec<Vec<Page>>,
}

impl Cache {
    /// An empty cache of at most `bytes` for one of `channels` channels.
    pub(crate) fn new(bytes: usize, channels: usize) -> Self {
        let slots = bytes / PAGE / WAYS * WAYS;
        Self {
            channels: channels as u64,
            slots,
            entries: Vec::new(),
            in_chunk: Vec::new(),
            blocks: Vec::new(),
        }
    }

    /// Whether any page of the chunk of `page` is here.
    pub(crate) fn holds_near(&self, page: u64) -> bool {
        self.in_chunk.get(self.chunk(page)).is_some_and(|count| *count > 0)
    }

    /// Where a page is, if it is here.
    pub(crate) fn find(&self, page: u64) -> Option<Slot> {
        let first = self.set(page)?;
        let ways = &self.entries[first..first + WAYS];
        ways.iter().position(|entry| entry.page == Some(page)).map(|way| Slot(first + way))
    }

    /// Takes in a page that is not here, if something can go that makes room: `fill` puts its content there.
    pub(crate) fn take_in(&mut self, page: u64, round: u32, fill: impl FnOnce(&mut Page)) -> Option<Slot> {
        if self.entries.is_empty() {
            self.entries = vec![Entry { page: None, round: 0, at: None }; self.slots];
        }
        let first = self.set(page)?;
        let ways = &self.entries[first..first + WAYS];
        // of those that may go the one that was sent longest ago; what is forgotten goes before any other, and before
        // what has no memory yet
        let may_go = |entry: &Entry| match entry.page {
            None => entry.round < round,
            Some(_) => entry.round + 1 < round,
        };
        let candidates = ways.iter().enumerate().filter(|(_, entry)| may_go(entry));
        let (way, _) = candidates.min_by_key(|(_, e)| (e.page.is_some(), e.at.is_none(), e.round))?;
        let slot = Slot(first + way);
        fill(self.renew(slot, round));
        if let Some(gone) = self.entries[first + way].page.replace(page) {
            self.count(gone, |count| count - 1);
        }
        self.count(page, |count| count + 1);
        Some(slot)
    }

    /// Forgets a page, if it is here. Its bytes stay until the next round: they may be about to be sent.
    pub(crate) fn forget(&mut self, page: u64) {
        if let Some(Slot(at)) = self.find(page) {
            self.entries[at].page = None;
            self.count(page, |count| count - 1);
        }
    }

    /// What the destination holds of the page that is kept there.
    pub(crate) fn content(&self, Slot(entry): Slot) -> &Page {
        let at = self.entries[entry].at.expect("a slot is made with its content") as usize;
        &self.blocks[at / BLOCK_PAGES][at % BLOCK_PAGES]
    }

    /// The same, to be made what the destination is about to hold.
    pub(crate) fn renew(&mut self, Slot(entry): Slot, round: u32) -> &mut Page {
        let entry = &mut self.entries[entry];
        entry.round = round;
        let at = *entry.at.get_or_insert_with(|| next(&mut self.blocks)) as usize;
        &mut self.blocks[at / BLOCK_PAGES][at % BLOCK_PAGES]
    }

    /// A channel has every `channels`th chunk.
    fn chunk(&self, page: u64) -> usize {
        (page / CHUNK_PAGES / self.channels) as usize
    }

    fn count(&mut self, page: u64, change: impl FnOnce(u16) -> u16) {
        let chunk = self.chunk(page);
        if chunk >= self.in_chunk.len() {
            self.in_chunk.resize(chunk + 1, 0);
        }
        self.in_chunk[chunk] = change(self.in_chunk[chunk]);
    }

    /// The first of the places for a page; none in a cache without places.
    fn set(&self, page: u64) -> Option<usize> {
        let sets = (self.entries.len() / WAYS) as u64;
        let index = self.chunk(page) as u64 * CHUNK_PAGES + page % CHUNK_PAGES;
        index.checked_rem(sets).map(|set| set as usize * WAYS)
    }
}

/// The next place that was not used.
fn next(blocks: &mut Vec<Vec<Page>>) -> u32 {
    if blocks.last().is_none_or(|last| last.len() == BLOCK_PAGES) {
        blocks.push(Vec::with_capacity(BLOCK_PAGES));
    }
    let full = blocks.len() - 1;
    blocks[full].push([0; PAGE]);
    u32::try_from(full * BLOCK_PAGES + blocks[full].len() - 1).expect("fewer than 2^32 pages are 16 TiB")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const SLOTS: usize = 32;

    fn put(cache: &mut Cache, page: u64, round: u32, content: u8) -> bool {
        match cache.find(page) {
            Some(slot) => cache.renew(slot, round).fill(content),
            None => return cache.take_in(page, round, |bytes| bytes.fill(content)).is_some(),
        }
        true
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_found_is_what_was_put_there_last(
            steps in proptest::collection::vec((0..60u64, 0..4u8, any::<u8>()), 1..200)
        ) {
            let mut cache = Cache::new(SLOTS * PAGE, 1);
            let mut oracle: BTreeMap<u64, (u8, u32)> = BTreeMap::new();
            let mut round = 1;
            for (page, how, content) in steps {
                match how {
                    0 => round += 1,
                    1 => {
                        cache.forget(page);
                        oracle.remove(&page);
                    }
                    _ => {
                        if put(&mut cache, page, round, content) {
                            oracle.insert(page, (content, round));
                        } else {
                            prop_assert!(!oracle.contains_key(&page));
                        }
                        oracle.retain(|page, (_, sent)| {
                            let kept = cache.find(*page).is_some();
                            assert!(kept || *sent + 1 < round, "page {page} was sent in the last round or this");
                            kept
                        });
                    }
                }
                prop_assert_eq!(cache.holds_near(0), !oracle.is_empty());
                for page in 0..60 {
                    let found = cache.find(page).map(|slot| cache.content(slot));
                    match oracle.get(&page) {
                        Some((content, _)) => prop_assert!(found.is_some_and(|p| p.iter().all(|b| b == content))),
                        None => prop_assert!(found.is_none()),
                    }
                }
            }
        }
    }

    #[test]
    fn a_stretch_of_neighbours_as_long_as_the_cache_is_kept_whole_whatever_the_channels() {
        for channels in [1, 3] {
            let mut cache = Cache::new(2 * CHUNK_PAGES as usize * PAGE, channels);
            let chunks = [5, 6].map(|n| n * channels as u64 + 1);
            let pages = || chunks.into_iter().flat_map(|c| c * CHUNK_PAGES..(c + 1) * CHUNK_PAGES);
            assert!(pages().all(|page| put(&mut cache, page, 1, page as u8)));
            let beside = (chunks[0] - channels as u64) * CHUNK_PAGES;
            assert!(pages().all(|page| cache.holds_near(page)) && !cache.holds_near(beside));
            assert!(pages().all(|page| cache.find(page).is_some_and(|s| cache.content(s)[7] == page as u8)));
        }
    }

    #[test]
    fn of_a_working_set_larger_than_the_cache_as_much_as_fits_is_kept_and_makes_room_when_it_cools() {
        let mut cache = Cache::new(SLOTS * PAGE, 1);
        for round in 1..5 {
            let kept = (0..100).filter(|page| put(&mut cache, *page, round, 1)).count();
            assert_eq!(kept, SLOTS, "the same ones each time");
        }
        assert!(
            (200..200 + SLOTS as u64).all(|page| !put(&mut cache, page, 5, 1)),
            "sent in the round before"
        );
        assert!((200..200 + SLOTS as u64).all(|page| put(&mut cache, page, 6, 1)));
    }

    #[test]
    fn what_was_put_in_this_round_keeps_its_bytes_even_if_it_is_forgotten() {
        let mut cache = Cache::new(WAYS * PAGE, 1);
        for page in 0..WAYS as u64 {
            assert!(put(&mut cache, page, 1, page as u8));
            cache.forget(page);
        }
        assert!(!put(&mut cache, 9, 1, 9));
        assert!(put(&mut cache, 9, 2, 9));
    }

    #[test]
    fn memory_is_found_for_what_is_kept_and_no_more() {
        let mut cache = Cache::new(10_000 * PAGE, 1);
        for round in 1..4 {
            assert!((0..100).all(|page| put(&mut cache, page, round, 1)));
        }
        assert_eq!(cache.blocks.len(), 2);
        (0..100).for_each(|page| cache.forget(page));
        assert!((0..100).all(|page| put(&mut cache, page, 5, 1)));
        assert_eq!(cache.blocks.len(), 2, "of what was forgotten it is used again");
    }

    #[test]
    fn a_cache_of_no_bytes_keeps_nothing() {
        let mut cache = Cache::new(PAGE, 1);
        assert!(!put(&mut cache, 1, 1, 1) && cache.find(1).is_none());
        cache.forget(1);
    }
}
