//! How far a guest is slowed so that rounds shrink: step by step, never below what it is to keep.

use std::fmt;
use std::time::Duration;

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

/// Rounds are to shrink to this part of the one before, in percent.
const AIM_PERCENT: u128 = 50;
/// Of what the guest has, a step leaves it at most this, in percent: smaller steps are lost in the noise of a round.
const MOST_LEFT_PERCENT: u128 = 60;
/// And at least this: the guest's answer to a step is not known before.
const LEAST_LEFT_PERCENT: u128 = 40;

/// The next step up from `now`, after a round that took the first of `times`, with a next one that should take the
/// second; none when the guest keeps no more than `least_speed_percent` of its speed already.
///
/// What a guest dirties goes with the time it uses, so that is cut by as much as rounds should shrink more. It has its
/// full speed with `needed_percent` of its time, and in proportion less with less.
pub(super) fn step_up(
    now: Throttle,
    needed_percent: u8,
    least_speed_percent: u8,
    (this, next): (Duration, Duration),
) -> Option<Throttle> {
    let left_percent =
        (this.as_nanos() * AIM_PERCENT / next.as_nanos().max(1)).clamp(LEAST_LEFT_PERCENT, MOST_LEFT_PERCENT);
    let part = |whole: u8, percent: u128| u8::try_from(u128::from(whole) * percent / 100).unwrap_or(whole);
    let kept = part(now.kept_percent().min(needed_percent), left_percent);
    let least_kept = part(needed_percent, least_speed_percent.min(100).into());
    let wanted = Throttle::of_percent(100 - kept.max(least_kept).min(100));
    (wanted > now).then_some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(now: u8, kept: u8, this: u64, next: u64) -> Option<u8> {
        let times = (Duration::from_nanos(this), Duration::from_nanos(next));
        step_up(Throttle::of_percent(now), 100, kept, times).map(Throttle::percent)
    }

    #[test]
    fn the_guest_is_cut_by_as_much_as_rounds_should_shrink_more() {
        assert_eq!(step(0, 5, 1000, 1000), Some(50));
        assert_eq!(step(50, 5, 1000, 900), Some(73));
    }

    #[test]
    fn what_a_guest_has_to_spare_is_taken_at_once() {
        let second = Duration::from_secs(1);
        let step = |now, needed| step_up(Throttle::of_percent(now), needed, 20, (second, second));
        assert_eq!(step(0, 30), Some(Throttle::of_percent(85)), "half of what it needs");
        assert_eq!(step(85, 30), Some(Throttle::of_percent(93)));
        assert_eq!(step(94, 30), None, "a fifth of what it needs");
        assert_eq!(step(0, 0), Some(Throttle::MOST));
    }

    #[test]
    fn a_step_is_bounded_on_both_sides_and_by_what_the_guest_keeps() {
        assert_eq!(step(0, 5, 1000, 4000), Some(60), "however much it dirties");
        assert_eq!(step(60, 5, 1000, 4000), Some(84));
        assert_eq!(step(60, 5, 1000, 100), Some(76), "however little");
        assert_eq!(step(60, 20, 1000, 4000), Some(80));
        assert_eq!(step(80, 20, 1000, 4000), None);
        assert_eq!(step(80, 100, 1000, 4000), None);
    }

    #[test]
    fn extreme_figures_neither_overflow_nor_stop_the_guest() {
        for (this, next) in [(0, 0), (u64::MAX, 0), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            for now in 0..=99 {
                let next = step(now, 0, this, next);
                assert!(next.is_none_or(|next| next > now && next <= 99), "{now} {next:?}");
            }
        }
        assert_eq!(Throttle::of_percent(255), Throttle::MOST);
    }
}
