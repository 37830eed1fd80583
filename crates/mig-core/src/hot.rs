//! Hot pages: those that the guest writes in round after round, so that sending them before the pause is in vain.
//!
//! Invariant: a page that is held back is dirty again as soon as the dirty log has been read, and before the last round.

use crate::bitmap::Bitmap;
use crate::domain::Domain;

/// Which pages are hot, and which of them the round under way leaves out.
#[derive(Debug)]
pub struct Hot {
    /// What was to be sent after the dirty log was read last.
    before: Bitmap,
    /// What was to be sent then, and the time before.
    hot: Bitmap,
    held: Bitmap,
    held_pages: u64,
}

impl Hot {
    /// None.
    pub fn new(domain: &Domain) -> Self {
        let none = || Bitmap::empty(domain);
        Self { before: none(), hot: none(), held: none(), held_pages: 0 }
    }

    /// The dirty log was read into `dirty`, to which the pages that were held back are added: they were not watched
    /// meanwhile, and are not known to be as they were sent. Returns how many pages are hot now.
    pub fn synced(&mut self, dirty: &mut Bitmap) -> u64 {
        self.release(dirty);
        let words = dirty.words().iter().zip(self.before.words_mut());
        let mut hot_pages = 0;
        for ((now, before), hot) in words.zip(self.hot.words_mut()) {
            *hot = now & *before;
            *before = *now;
            hot_pages += u64::from(hot.count_ones());
        }
        hot_pages
    }

    /// Adds what is held back to `dirty`, and holds nothing back any more: what the last round needs of
    /// [`Self::synced`].
    pub fn release(&mut self, dirty: &mut Bitmap) {
        if self.held_pages > 0 {
            dirty.or_words(0, self.held.words());
            self.held_pages = 0;
        }
    }

    /// A round begins: takes so many of the hot pages out of `dirty`, or all where they are fewer. Those that were held
    /// back before come first, for nobody has seen that they are hot no more.
    pub fn hold_back(&mut self, dirty: &mut Bitmap, pages: u64) {
        let mut left = pages;
        for (held, hot) in self.held.words_mut().zip(self.hot.words()) {
            *held = lowest(*held & hot, &mut left);
        }
        let all = dirty.words_mut().zip(self.hot.words());
        for ((dirty, hot), held) in all.zip(self.held.words_mut()) {
            *held |= lowest(hot & !*held, &mut left);
            *dirty &= !*held;
        }
        self.held_pages = pages - left;
    }
}

/// The lowest bits of a word, as many as are left.
fn lowest(word: u64, left: &mut u64) -> u64 {
    let mut rest = word;
    while *left > 0 && rest != 0 {
        rest &= rest - 1;
        *left -= 1;
    }
    word & !rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mig_wire::describe::Region;
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 200;

    fn domain() -> Domain {
        Domain::new(&[Region { guest_address: 0, bytes: PAGES * 4096 }]).unwrap()
    }

    fn bitmap(pages: &BTreeSet<u64>) -> Bitmap {
        let mut bitmap = Bitmap::empty(&domain());
        pages.iter().for_each(|page| bitmap.set(*page));
        bitmap
    }

    fn set(bitmap: &Bitmap) -> BTreeSet<u64> {
        (0..PAGES).filter(|page| bitmap.contains(*page)).collect()
    }

    /// The slow oracle: sets of pages.
    #[derive(Default)]
    struct Slow {
        before: BTreeSet<u64>,
        hot: BTreeSet<u64>,
        held: BTreeSet<u64>,
    }

    impl Slow {
        fn synced(&mut self, dirty: &mut BTreeSet<u64>) -> u64 {
            dirty.extend(&self.held);
            self.hot = dirty.intersection(&self.before).copied().collect();
            self.before = dirty.clone();
            self.hot.len() as u64
        }

        fn hold_back(&mut self, dirty: &mut BTreeSet<u64>, pages: u64) {
            let (mut choice, fresh): (Vec<u64>, Vec<u64>) =
                self.hot.iter().partition(|page| self.held.contains(page));
            choice.extend(fresh);
            self.held = choice.into_iter().take(pages as usize).collect();
            dirty.retain(|page| !self.held.contains(page));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pages_are_held_back_as_a_slow_oracle_holds_them_and_none_is_ever_lost(
            rounds in proptest::collection::vec(
                (proptest::collection::btree_set(0..PAGES, 0..120), 0..150u64), 1..8
            )
        ) {
            let (mut hot, mut slow) = (Hot::new(&domain()), Slow::default());
            for (written, hold) in rounds {
                let held = slow.held.clone();
                let (mut dirty, mut slow_dirty) = (bitmap(&written), written.clone());
                prop_assert_eq!(hot.synced(&mut dirty), slow.synced(&mut slow_dirty));
                prop_assert_eq!(set(&dirty), &written | &held);
                hot.hold_back(&mut dirty, hold);
                slow.hold_back(&mut slow_dirty, hold);
                prop_assert_eq!(set(&dirty), slow_dirty.clone());
                prop_assert_eq!(hot.held_pages, slow.held.len() as u64);
                let mut last = dirty.clone();
                Hot { held: hot.held.clone(), ..Hot { held_pages: hot.held_pages, ..Hot::new(&domain()) } }
                    .release(&mut last);
                prop_assert_eq!(set(&last), &written | &held);
            }
        }
    }

    #[test]
    fn what_the_first_round_dirtied_is_not_hot_since_every_page_was_sent_in_it() {
        let mut hot = Hot::new(&domain());
        let written = BTreeSet::from([3, 64, 199]);
        assert_eq!(hot.synced(&mut bitmap(&written)), 0);
        assert_eq!(hot.synced(&mut bitmap(&written)), 3);
    }
}
