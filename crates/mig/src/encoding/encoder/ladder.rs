//! The compression level that pays best, found by trying its neighbours now and then on the same pages; what each takes
//! and saves is kept, for a link that is suddenly another.

use super::worth::{Cost, Link};

/// The levels there are to choose from, the cheapest first: that pays if any does, and pays for the comparisons.
const LEVELS: [i32; 4] = [-5, 1, 3, 6];
/// Full stretches compressed between two comparisons.
const BETWEEN: u32 = 16;
/// Comparisons before a step.
const COMPARISONS: u32 = 4;
/// Stretches of fewer pages say little.
const LEAST_PAGES: usize = 16;

/// Which level it is now, and how its neighbour does.
#[derive(Debug, Default)]
pub(super) struct Ladder {
    at: usize,
    downward: bool,
    stretches: u32,
    comparisons: u32,
    /// What the neighbour gained over the level, in nanoseconds.
    lead_ns: f64,
    /// What the levels are known to take and save.
    costs: [Cost; LEVELS.len()],
    tries_second: bool,
}

impl Ladder {
    /// The level to use.
    pub(super) fn level(&self) -> i32 {
        LEVELS[self.at]
    }

    /// The level to use on a link: as before while that pays, otherwise the best there is; none where none pays.
    pub(super) fn paying(&mut self, link: Link) -> Option<i32> {
        let pays = self.costs[self.at].net_ns(link).is_some_and(|net_ns| net_ns > 0.0);
        if !pays {
            let best = self.best(link)?;
            self.at = LEVELS.iter().position(|level| *level == best)?;
            (self.comparisons, self.lead_ns) = (0, 0.0);
        }
        Some(self.level())
    }

    /// The level to try next where none is known to pay: the cheapest, and the next one, in turn. Words hardly shrink
    /// by the cheapest.
    pub(super) fn next_try(&mut self) -> i32 {
        self.tries_second = !self.tries_second;
        LEVELS[usize::from(!self.tries_second)]
    }

    /// The level that pays most on a link as far as is known, if any does.
    pub(super) fn best(&self, link: Link) -> Option<i32> {
        let nets =
            self.costs.iter().zip(LEVELS).filter_map(|(cost, level)| Some((cost.net_ns(link)?, level)));
        let paying = nets.filter(|(net_ns, _)| *net_ns > 0.0);
        paying.max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, level)| level)
    }

    /// So many pages took so long at a level, and became so many bytes fewer.
    pub(super) fn settle(&mut self, level: i32, pages: usize, took_ns: f64, saved_bytes: usize) {
        for (cost, _) in self.costs.iter_mut().zip(LEVELS).filter(|(_, of)| *of == level) {
            cost.settle(pages, took_ns, saved_bytes);
        }
    }

    /// The level to compare with on a stretch of so many pages, if it is time for that.
    pub(super) fn rival(&mut self, pages: usize) -> Option<i32> {
        self.stretches += u32::from(pages >= LEAST_PAGES);
        if pages < LEAST_PAGES || self.stretches < BETWEEN {
            return None;
        }
        self.stretches = 0;
        Some(LEVELS[self.neighbour()])
    }

    /// The neighbour gained so much more than the level, or less.
    pub(super) fn judge(&mut self, lead_ns: f64) {
        self.lead_ns += lead_ns;
        self.comparisons += 1;
        if self.comparisons == COMPARISONS {
            // further in a direction that was right, back from one that was not
            if self.lead_ns > 0.0 {
                self.at = self.neighbour();
            } else {
                self.downward = !self.downward;
            }
            (self.comparisons, self.lead_ns) = (0, 0.0);
        }
    }

    fn neighbour(&self) -> usize {
        match self.at {
            0 => 1,
            at if self.downward || at + 1 == LEVELS.len() => at - 1,
            at => at + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Where a thousand comparisons lead, if each level nets so much.
    fn climbed(ladder: &mut Ladder, net_ns: fn(i32) -> f64) -> i32 {
        for _ in 0..1000 * BETWEEN {
            if let Some(rival) = ladder.rival(32) {
                let lead = net_ns(rival) - net_ns(ladder.level());
                ladder.judge(lead);
            }
        }
        ladder.level()
    }

    #[test]
    fn the_level_that_nets_most_is_found_wherever_it_is_and_again_when_the_link_changes() {
        let mut ladder = Ladder::default();
        assert_eq!(ladder.level(), -5);
        assert_eq!(climbed(&mut ladder, f64::from), 6);
        assert_eq!(climbed(&mut ladder, |level| -f64::from((level - 1).abs())), 1);
        assert_eq!(climbed(&mut ladder, |level| -f64::from(level)), -5);
        assert_eq!(climbed(&mut ladder, |level| -f64::from((level - 3).abs())), 3);
    }

    #[test]
    fn levels_are_compared_on_few_stretches_and_only_on_long_ones() {
        let mut ladder = Ladder::default();
        assert_eq!((0..320).filter(|_| ladder.rival(32).is_some()).count(), 20);
        assert_eq!((0..320).filter(|_| ladder.rival(3).is_some()).count(), 0);
    }

    #[test]
    fn where_none_is_known_to_pay_the_two_cheapest_are_tried_in_turn_and_what_pays_is_used() {
        let mut ladder = Ladder::default();
        let mut link = Link::default();
        (0..500).for_each(|_| link.written(1 << 20, Duration::from_millis(34), Duration::from_millis(34)));
        assert_eq!([(); 4].map(|()| ladder.next_try()), [-5, 1, -5, 1]);
        ladder.settle(-5, 4, 50e3, 0);
        assert_eq!(ladder.paying(link), None);
        ladder.settle(1, 4, 100e3, 8000);
        assert_eq!((ladder.paying(link), ladder.level()), (Some(1), 1));
        ladder.settle(1, 128, 100e6, 0);
        assert_eq!(ladder.paying(link), None);
    }

    #[test]
    fn the_best_level_follows_the_link_without_a_try_and_is_none_where_none_pays() {
        let mut ladder = Ladder::default();
        let link = |ns_per_byte: u64| {
            let mut link = Link::default();
            let took = Duration::from_nanos(ns_per_byte << 20);
            (0..500).for_each(|_| link.written(1 << 20, took, took));
            link
        };
        assert_eq!(ladder.best(link(32)), None, "nothing is known");
        for (level, took_us, saved_bytes) in [(-5, 64, 60_000), (1, 320, 80_000), (6, 1300, 100_000)] {
            ladder.settle(level, 32, f64::from(took_us) * 1e3, saved_bytes);
        }
        let best = [1, 2, 16, 64].map(|ns_per_byte| ladder.best(link(ns_per_byte)));
        assert_eq!(best, [None, Some(-5), Some(1), Some(6)]);
    }
}
