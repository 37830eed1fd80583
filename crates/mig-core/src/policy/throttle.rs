//! How far a guest is slowed so that rounds shrink: step by step, never below what it is to keep.

use std::fmt;

/// The part of their time that vCPUs are held, in percent: 0 to [`Throttle::MOST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Throttle(u8);

impl Throttle {
    /// The guest has all its time.
    pub const NONE: Self = Self(0);
    /// The most: a guest that gets nothing done looks dead.
    pub const MOST: Self = Self(99);

    /// So many percent, at most [`Throttle::MOST`].
    pub fn of_percent(percent: u8) -> Self {
        Self(percent.min(Self::MOST.0))
    }

    /// Whether the guest has all its time.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// In percent.
    pub fn percent(self) -> u8 {
        self.0
    }

    /// What is left to the guest, in percent.
    pub fn kept_percent(self) -> u8 {
        100 - self.0
    }
}

impl fmt::Display for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// Rounds are to shrink to this part of the one before.
const AIM_PERCENT: u64 = 50;
/// A step takes no more than this at once: the guest's answer to it is not known before.
const STEP_PERCENT: u8 = 30;
/// A step takes no less: smaller ones are lost in the noise of a round.
const LEAST_STEP_PERCENT: u8 = 5;

/// The next step up from `now`, after a round that dirtied `dirtied` pages while it sent `sent`; none when the guest
/// keeps no more than `least_kept_percent` already.
///
/// What a guest dirties goes with the time it has, so that is cut by as much as rounds should shrink more.
pub(super) fn step_up(now: Throttle, least_kept_percent: u8, sent: u64, dirtied: u64) -> Option<Throttle> {
    let most = (100 - least_kept_percent.min(100)).min(Throttle::MOST.0);
    let aimed = u128::from(sent) * u128::from(AIM_PERCENT) * u128::from(now.kept_percent());
    let kept = u8::try_from(aimed / (100 * u128::from(dirtied.max(1)))).unwrap_or(100);
    let wanted = 100u8.saturating_sub(kept).clamp(now.0 + LEAST_STEP_PERCENT, now.0 + STEP_PERCENT).min(most);
    (wanted > now.0).then_some(Throttle::of_percent(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(now: u8, kept: u8, sent: u64, dirtied: u64) -> Option<u8> {
        step_up(Throttle::of_percent(now), kept, sent, dirtied).map(Throttle::percent)
    }

    #[test]
    fn the_guest_is_cut_by_as_much_as_rounds_should_shrink_more() {
        assert_eq!(step(0, 5, 1000, 600), Some(17), "0.6 of a round is to become half");
        assert_eq!(step(20, 5, 1000, 700), Some(43));
    }

    #[test]
    fn a_step_is_bounded_on_both_sides_and_by_what_the_guest_keeps() {
        assert_eq!(step(0, 5, 1000, 4000), Some(30), "however much it dirties");
        assert_eq!(step(30, 5, 1000, 4000), Some(60));
        assert_eq!(step(60, 5, 1000, 100), Some(65), "however little");
        assert_eq!(step(60, 20, 1000, 4000), Some(80));
        assert_eq!(step(80, 20, 1000, 4000), None);
        assert_eq!(step(80, 100, 1000, 4000), None);
    }

    #[test]
    fn extreme_figures_neither_overflow_nor_stop_the_guest() {
        for (sent, dirtied) in [(0, 0), (u64::MAX, 0), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            for now in 0..=99 {
                let next = step(now, 0, sent, dirtied);
                assert!(next.is_none_or(|next| next > now && next <= 99), "{now} {next:?}");
            }
        }
        assert_eq!(Throttle::of_percent(255), Throttle::MOST);
    }
}
