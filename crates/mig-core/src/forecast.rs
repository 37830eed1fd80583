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

    /// Pages that it is known to write: all that it had written at the last look.
    fn working_set(&self) -> u64 {
        self.samples.last().map_or(0, |(_, pages)| *pages)
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
    let mut play = Play::new(policy, curve, prospect);
    loop {
        let context = play.round();
        play.lately.push(context.predicted);
        match policy::decide(policy, &context) {
            Decision::Continue(_) => {}
            Decision::HoldBack { pages } => play.hold_back(pages),
            Decision::Throttle(throttle) => play.throttle(throttle),
            Decision::SwitchOver(reason) => return play.ended(reason, true, &context),
            Decision::Abort(reason) => return play.ended(reason, false, &context),
        }
        play.go_on(&context);
    }
}

/// A migration as far as it has been played.
struct Play<'a> {
    policy: &'a Policy,
    curve: &'a DirtyCurve,
    prospect: &'a Prospect,
    round: u32,
    /// Pages that the round sends.
    to_send: u64,
    /// Pages that it holds back, and whether any are.
    held_pages: u64,
    holding: bool,
    /// Pages that the round before left, but for those of the first one, in which all are sent.
    left_before: u64,
    elapsed: Duration,
    sent_bytes: u64,
    stalled_rounds: u32,
    lately: Vec<Duration>,
    throttle: Throttle,
    most_throttle: Throttle,
}

impl<'a> Play<'a> {
    fn new(policy: &'a Policy, curve: &'a DirtyCurve, prospect: &'a Prospect) -> Self {
        Self {
            policy,
            curve,
            prospect,
            round: 0,
            to_send: prospect.filled_pages,
            held_pages: 0,
            holding: false,
            left_before: 0,
            elapsed: Duration::ZERO,
            sent_bytes: 0,
            stalled_rounds: 0,
            lately: Vec::new(),
            throttle: Throttle::NONE,
            most_throttle: Throttle::NONE,
        }
    }

    /// Sends a round, and says what the policy would see then.
    fn round(&mut self) -> RoundContext {
        let prospect = self.prospect;
        let round_time = sending(self.to_send, prospect.bytes_per_second).max(Duration::from_micros(100));
        let dirtied_meanwhile = self.dirtied_in(round_time, self.held_pages);
        let dirtied_pages = dirtied_meanwhile.saturating_add(self.held_pages);
        self.elapsed = self.elapsed.saturating_add(round_time);
        self.sent_bytes = self.sent_bytes.saturating_add(self.to_send.saturating_mul(PAGE_BYTES));
        let stalled = dirtied_meanwhile >= self.to_send && dirtied_pages > 0;
        self.stalled_rounds = if stalled { self.stalled_rounds + 1 } else { 0 };
        let hot_pages = self.hot(dirtied_meanwhile).saturating_add(self.held_pages);
        let held_pages = if self.holding { hot_pages.min(self.holdable()) } else { 0 };
        let next_round_time = sending(dirtied_pages - held_pages, prospect.bytes_per_second);
        let left_after_next = self.dirtied_in(next_round_time, held_pages).saturating_add(held_pages);
        let predicted = self.pause(dirtied_pages);
        RoundContext {
            round: self.round,
            sent_pages: self.to_send,
            dirtied_pages,
            hot_pages,
            holdable_pages: self.holdable(),
            holding: self.holding,
            round_time,
            next_round_time,
            wire_bytes_per_second: prospect.bytes_per_second,
            total_sent_bytes: self.sent_bytes,
            ram_bytes: prospect.ram_bytes,
            elapsed: self.elapsed,
            stalled_rounds: self.stalled_rounds,
            predicted,
            predicted_after_next: self.pause(left_after_next).min(predicted),
            lowest_lately: self.lately.iter().min().copied(),
            throttle: self.throttle,
            needed_percent: prospect.needed_percent,
            can_throttle: prospect.can_throttle,
        }
    }

    fn hold_back(&mut self, pages: u64) {
        (self.holding, self.held_pages) = (true, pages);
        self.changed();
    }

    fn throttle(&mut self, throttle: Throttle) {
        (self.throttle, self.most_throttle) = (throttle, throttle);
        self.changed();
    }

    /// What rounds were like before does not count any more.
    fn changed(&mut self) {
        (self.stalled_rounds, self.lately) = (0, Vec::new());
    }

    fn go_on(&mut self, context: &RoundContext) {
        if self.holding {
            self.held_pages = context.may_hold_pages();
        }
        self.to_send = context.dirtied_pages - self.held_pages;
        self.left_before = context.dirtied_pages;
        self.round += 1;
    }

    fn ended(&self, stop_reason: StopReason, moves: bool, context: &RoundContext) -> Forecast {
        let downtime = if moves { context.predicted } else { Duration::ZERO };
        let last_bytes = if moves { context.dirtied_pages.saturating_mul(PAGE_BYTES) } else { 0 };
        Forecast {
            stop_reason,
            moves,
            fits: context.predicted <= self.policy.downtime_limit,
            rounds: self.round + 1 + u32::from(moves),
            total: self.elapsed.saturating_add(downtime),
            downtime,
            sent_bytes: self.sent_bytes.saturating_add(last_bytes),
            most_throttle: self.most_throttle,
        }
    }

    fn pause(&self, pages: u64) -> Duration {
        self.prospect.fixed_pause.saturating_add(sending(pages, self.prospect.pause_bytes_per_second))
    }

    /// What the guest dirties in so long a time, while so many of the pages that it writes are held back.
    fn dirtied_in(&self, time: Duration, held_pages: u64) -> u64 {
        let written = self.curve.within(time.mul_f64(speed(self.throttle, self.prospect.needed_percent)));
        part(written, self.curve.working_set().saturating_sub(held_pages), self.curve.working_set())
    }

    /// How many of the pages that a round leaves the one before left, too: as many as if the guest wrote those that it
    /// writes at random. Who writes some more than others has more of them.
    fn hot(&self, dirtied_pages: u64) -> u64 {
        let others = |pages: u64| pages.saturating_sub(self.held_pages);
        part(dirtied_pages, others(self.left_before), others(self.curve.working_set())).min(dirtied_pages)
    }

    fn holdable(&self) -> u64 {
        let seconds = self.policy.for_held_pages(self.prospect.fixed_pause).as_secs_f64();
        (seconds * self.prospect.pause_bytes_per_second as f64 / PAGE_BYTES as f64) as u64
    }
}

fn sending(pages: u64, bytes_per_second: u64) -> Duration {
    let bytes = pages.saturating_mul(PAGE_BYTES);
    Duration::try_from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64).unwrap_or(Duration::MAX / 4)
}

/// `number * part / whole`.
fn part(number: u64, part: u64, whole: u64) -> u64 {
    (u128::from(number) * u128::from(part) / u128::from(whole.max(1))).try_into().unwrap_or(u64::MAX)
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
