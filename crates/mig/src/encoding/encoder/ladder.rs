//! The compression level that pays best, found by trying its neighbours now and then on the same pages.

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
}

impl Ladder {
    /// The level to use.
    pub(super) fn level(&self) -> i32 {
        LEVELS[self.at]
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
}
