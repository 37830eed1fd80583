//! What a migration would come to, before a byte is sent: from how a guest dirties its memory and what a link gives.
//!
//! The rounds are played through with the policy's own decisions. What a guest dirties is measured, not modelled: how
//! many different pages it had written after ever longer times. A guest that is slowed dirties in a second what it did
//! in the part of one that it has.

use std::time::Duration;

use crate::domain::PAGE_BYTES;
use crate::policy::{self, Decision, Policy, RoundContext, StopReason, Throttle};

/// How many different pages a guest had written after how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyCurve {
    /// In the order of time.
    samples: Vec<(Duration, u64)>,
    /// Pages of the guest.
    pages: u64,
}

impl DirtyCurve {
    /// From samples in any order, of a guest with so many pages.
    pub fn new(mut samples: Vec<(Duration, u64)>, pages: u64) -> Self {
        samples.retain(|(time, _)| !time.is_zero());
        samples.sort_unstable();
        Self { samples, pages }
    }

    /// Pages written within a time: between two samples in proportion, beyond the last at the rate of the last part,
    /// or of the whole where there is but one.
    pub fn within(&self, time: Duration) -> u64 {
        let zero = (Duration::ZERO, 0);
        let (mut before, mut last) = (zero, zero);
        for sample in &self.samples {
            (before, last) = (last, *sample);
            if time <= last.0 {
                break;
            }
        }
        let (over, gained) = ((last.0 - before.0).as_secs_f64(), last.1.saturating_sub(before.1) as f64);
        if over <= 0.0 {
            return 0;
        }
        let pages = before.1 as f64 + gained / over * (time.as_secs_f64() - before.0.as_secs_f64());
        (pages as u64).min(self.pages)
    }
}

/// What else is known before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prospect {
    /// What the link gives, or a cap leaves of it.
    pub bytes_per_second: u64,
    /// What it gives in the pause.
    pub pause_bytes_per_second: u64,
    /// Pages with content: what the first round sends.
    pub filled_pages: u64,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// The pause without its pages.
    pub fixed_pause: Duration,
    /// What the guest needs of its time to keep its speed, in percent.
    pub needed_percent: u8,
    /// Whether it can be slowed.
    pub can_throttle: bool,
}

/// What a migration would come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// The rule that ends pre-copy.
    pub stop_reason: StopReason,
    /// Whether the guest moves; it stays where the policy gives up.
    pub moves: bool,
    /// Whether the pause fits the limit.
    pub fits: bool,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// From the first page to the guest running.
    pub total: Duration,
    /// The pause.
    pub downtime: Duration,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// The most the guest is slowed by.
    pub most_throttle: Throttle,
}

/// Plays a migration through.
pub fn foresee(policy: &Policy, curve: &DirtyCurve, prospect: &Prospect) -> Forecast {
    let at = |pages: u64, rate: u64| {
        let bytes = pages.saturating_mul(PAGE_BYTES);
        Duration::try_from_secs_f64(bytes as f64 / rate.max(1) as f64).unwrap_or(Duration::MAX / 4)
    };
    let pause = |pages| prospect.fixed_pause.saturating_add(at(pages, prospect.pause_bytes_per_second));
    let mut throttle = Throttle::NONE;
    let mut most_throttle = Throttle::NONE;
    let (mut to_send, mut elapsed, mut sent_bytes, mut stalled_rounds) =
        (prospect.filled_pages, Duration::ZERO, 0u64, 0);
    let mut lately: Vec<Duration> = Vec::new();
    let mut round = 0;
    loop {
        let dirtied_in =
            |time: Duration| curve.within(time.mul_f64(speed(throttle, prospect.needed_percent)));
        let round_time = at(to_send, prospect.bytes_per_second).max(Duration::from_micros(100));
        let dirtied_pages = dirtied_in(round_time);
        elapsed = elapsed.saturating_add(round_time);
        sent_bytes = sent_bytes.saturating_add(to_send.saturating_mul(PAGE_BYTES));
        let next_round_time = at(dirtied_pages, prospect.bytes_per_second);
        stalled_rounds = if dirtied_pages >= to_send && dirtied_pages > 0 { stalled_rounds + 1 } else { 0 };
        let predicted = pause(dirtied_pages);
        let context = RoundContext {
            round,
            sent_pages: to_send,
            dirtied_pages,
            round_time,
            next_round_time,
            wire_bytes_per_second: prospect.bytes_per_second,
            total_sent_bytes: sent_bytes,
            ram_bytes: prospect.ram_bytes,
            elapsed,
            stalled_rounds,
            predicted,
            predicted_after_next: pause(dirtied_in(next_round_time)).min(predicted),
            lowest_lately: lately.iter().min().copied(),
            throttle,
            needed_percent: prospect.needed_percent,
            can_throttle: prospect.can_throttle,
        };
        lately.push(predicted);
        let ended = |stop_reason, moves| {
            let downtime = if moves { predicted } else { Duration::ZERO };
            let last_bytes = if moves { dirtied_pages.saturating_mul(PAGE_BYTES) } else { 0 };
            Forecast {
                stop_reason,
                moves,
                fits: predicted <= policy.downtime_limit,
                rounds: round + 1 + u32::from(moves),
                total: elapsed.saturating_add(downtime),
                downtime,
                sent_bytes: sent_bytes.saturating_add(last_bytes),
                most_throttle,
            }
        };
        match policy::decide(policy, &context) {
            Decision::Continue(_) => {}
            Decision::Throttle(more) => {
                (throttle, most_throttle) = (more, more);
                (stalled_rounds, lately) = (0, Vec::new());
            }
            Decision::SwitchOver(reason) => return ended(reason, true),
            Decision::Abort(reason) => return ended(reason, false),
        }
        to_send = dirtied_pages;
        round += 1;
    }
}

/// The part of its speed that a guest keeps.
fn speed(throttle: Throttle, needed_percent: u8) -> f64 {
    (f64::from(throttle.kept_percent()) / f64::from(needed_percent.clamp(1, 100))).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{OnStall, Priority};

    const GBIT: u64 = 125_000_000;
    const MS: Duration = Duration::from_millis(1);

    /// Dirties a page it never dirtied before at each write, so many a second, for ever.
    fn steady(pages_per_second: u64) -> DirtyCurve {
        DirtyCurve::new(vec![(1000 * MS, pages_per_second)], 1 << 40)
    }

    fn prospect() -> Prospect {
        Prospect {
            bytes_per_second: GBIT,
            pause_bytes_per_second: GBIT,
            filled_pages: 1 << 18,
            ram_bytes: 1 << 30,
            fixed_pause: MS,
            needed_percent: 100,
            can_throttle: true,
        }
    }

    #[test]
    fn between_samples_pages_grow_in_proportion_and_beyond_the_last_as_in_the_last_part() {
        let curve = DirtyCurve::new(vec![(100 * MS, 1000), (10 * MS, 400), (Duration::ZERO, 7)], 1500);
        let within = |ms| curve.within(ms * MS);
        assert_eq!([within(0), within(5), within(10), within(55), within(100)], [0, 200, 400, 700, 1000]);
        assert_eq!((within(145), within(100_000)), (1300, 1500), "no more than there are");
        assert_eq!(DirtyCurve::new(Vec::new(), 9).within(MS), 0);
    }

    #[test]
    fn an_idle_guest_moves_in_the_time_of_its_memory() {
        let forecast = foresee(&Policy::default(), &steady(10), &prospect());
        assert!(forecast.moves && forecast.fits && forecast.most_throttle.is_none());
        let whole = Duration::from_secs_f64((1u64 << 30) as f64 / GBIT as f64);
        assert!(forecast.total >= whole && forecast.total < whole + 100 * MS, "{forecast:?}");
    }

    /// The slow oracle: memory times the sum of r^n, until what is left fits.
    #[test]
    fn rounds_are_a_geometric_series_where_a_guest_dirties_steadily() {
        let policy = Policy { shorten: crate::policy::Shorten::Never, ..Policy::default() };
        for percent in [20u64, 40, 60] {
            let forecast = foresee(&policy, &steady(GBIT / PAGE_BYTES * percent / 100), &prospect());
            let (r, mut left, mut sent, mut rounds) = (percent as f64 / 100.0, (1u64 << 30) as f64, 0.0, 0);
            while left / GBIT as f64 + 0.001 > 0.3 {
                (sent, left, rounds) = (sent + left, left * r, rounds + 1);
            }
            assert_eq!(forecast.rounds, rounds + 1, "{percent}");
            let total = (sent + left) / GBIT as f64;
            assert!((forecast.total.as_secs_f64() / total - 1.0).abs() < 0.01, "{forecast:?} {total}");
        }
    }

    #[test]
    fn a_guest_faster_than_the_link_is_foreseen_to_be_slowed_to_stay_or_to_be_paused_for_long() {
        let fast = DirtyCurve::new(vec![(1000 * MS, GBIT / PAGE_BYTES * 3 / 2)], 1 << 17);
        let balanced = foresee(&Policy::default(), &fast, &prospect());
        assert!(balanced.moves && balanced.fits && balanced.most_throttle.percent() >= 50, "{balanced:?}");
        let left_alone = Policy { least_kept_percent: 100, ..Policy::default() };
        let paused = foresee(&left_alone, &fast, &prospect());
        assert!(paused.moves && !paused.fits && paused.downtime > 1000 * MS, "{paused:?}");
        let never = Policy { on_stall: OnStall::Abort, ..left_alone };
        let stays = foresee(&never, &fast, &prospect());
        assert!(!stays.moves && !stays.fits && stays.downtime.is_zero(), "{stays:?}");
    }

    #[test]
    fn every_forecast_ends_whatever_the_figures() {
        let extremes = [0, 1, u64::MAX / 8192];
        for pages in extremes {
            for rate in [0, 1, GBIT, u64::MAX] {
                for priority in Priority::ALL {
                    let curve = DirtyCurve::new(vec![(MS, pages), (1000 * MS, pages)], u64::MAX);
                    let prospect = Prospect {
                        bytes_per_second: rate,
                        pause_bytes_per_second: rate,
                        filled_pages: pages,
                        needed_percent: 0,
                        ..prospect()
                    };
                    assert!(foresee(&priority.policy(), &curve, &prospect).rounds <= 31);
                }
            }
        }
    }
}
