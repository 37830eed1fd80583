//! The stop policy: after each round, another one, the switchover, or the end.
//!
//! Pure: [`decide`] looks at a [`RoundContext`] and nothing else, so every decision can be replayed.

mod limits;
mod priority;
mod throttle;

use std::time::Duration;

pub use limits::{StopReason, nearest_rule};
use limits::{limit_reached, traffic_limit};
pub use priority::{LEAST_KEPT_PERCENT, Priority};
pub use throttle::Throttle;

/// What a user may set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Policy {
    /// The longest pause the guest's owner accepts.
    pub downtime_limit: Duration,
    /// The most rounds before the pause; at least 1.
    pub max_rounds: u32,
    /// With at most this many dirty pages another round is not worth it.
    pub few_pages: u64,
    /// Rounds in a row that dirtied as much as they sent, after which pre-copy has failed.
    pub no_progress_rounds: u32,
    /// The most bytes sent before the pause, in multiples of guest memory.
    pub traffic_factor: u64,
    /// The longest time before the pause; `None` for no limit.
    pub timeout: Option<Duration>,
    /// Whether rounds go on within the budget as long as they shorten the pause much.
    pub shorten: Shorten,
    /// How much of its speed the guest keeps at least while it is slowed so that rounds shrink, in percent; 100 to
    /// leave it alone. Speed is what it uses of the processors: one that used a tenth of them has that of a tenth of its
    /// time. Where that is not known, it is taken to need all of its time.
    pub least_kept_percent: u8,
    /// What to do when pre-copy did not converge, for all that.
    pub on_stall: OnStall,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            max_rounds: 30,
            few_pages: 50,
            no_progress_rounds: 2,
            traffic_factor: 3,
            timeout: None,
            shorten: Shorten::AtFullSpeed,
            least_kept_percent: 20,
            on_stall: OnStall::StopAndCopy,
        }
    }
}

impl Policy {
    /// What sending pages that are held back may take of the pause, of which the rest takes `besides`: half of what is
    /// left, since they may have grown cold meanwhile.
    pub fn for_held_pages(&self, besides: Duration) -> Duration {
        self.downtime_limit.saturating_sub(besides) / 2
    }
}

/// When a pause within the budget is made shorter by further rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shorten {
    /// The first that fits is taken.
    Never,
    /// While the guest has all its time: one that was slowed to get there has paid enough.
    AtFullSpeed,
    /// Whatever it takes.
    Always,
}

/// What to do when a rule ends pre-copy although the prediction is over the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnStall {
    /// Switch over all the same: the pause will be longer than asked for.
    StopAndCopy,
    /// Leave the guest where it is.
    Abort,
}

/// What the policy may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundContext {
    /// The round that has ended.
    pub round: u32,
    /// Pages sent in it.
    pub sent_pages: u64,
    /// Pages that remain: dirtied meanwhile, or held back.
    pub dirtied_pages: u64,
    /// Those of them that remained after the round before, too.
    pub hot_pages: u64,
    /// How many may be held back at most: what the pause sends in [`Policy::for_held_pages`].
    pub holdable_pages: u64,
    /// Whether hot pages are held back by now.
    pub holding: bool,
    /// How long it took.
    pub round_time: Duration,
    /// How long the next one should.
    pub next_round_time: Duration,
    /// Bytes on the wire in a second of it.
    pub wire_bytes_per_second: u64,
    /// Bytes sent in all rounds.
    pub total_sent_bytes: u64,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// Time since the first round began.
    pub elapsed: Duration,
    /// Rounds in a row, this one included, that dirtied at least as much as they sent.
    pub stalled_rounds: u32,
    /// The downtime of a switchover now.
    pub predicted: Duration,
    /// The downtime of a switchover after one more round.
    pub predicted_after_next: Duration,
    /// The shortest that was predicted after one of the last rounds, this one excepted.
    pub lowest_lately: Option<Duration>,
    /// By how much the guest was slowed in the round.
    pub throttle: Throttle,
    /// What it needs of its time to keep its speed, in percent.
    pub needed_percent: u8,
    /// Whether it can be.
    pub can_throttle: bool,
}

impl RoundContext {
    /// How many pages may be held back in the next round.
    pub fn may_hold_pages(&self) -> u64 {
        self.hot_pages.min(self.holdable_pages)
    }

    /// How many are: none as long as no decision was taken to.
    pub fn held_pages(&self) -> u64 {
        if self.holding { self.may_hold_pages() } else { 0 }
    }
}

/// What the policy answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Send another round.
    Continue(Why),
    /// Send another round, and hold so many hot pages back from now on.
    HoldBack {
        /// At least 1.
        pages: u64,
    },
    /// Slow the guest by so much, and send another round.
    Throttle(Throttle),
    /// Pause the guest and switch over.
    SwitchOver(StopReason),
    /// Give up; the guest stays.
    Abort(StopReason),
}

/// Why rounds go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// The pause would fit the limit, and the next round shortens it much.
    Shortens,
    /// The pause would not fit yet; it should after about so many more rounds.
    FitsIn {
        /// At least 1.
        rounds: u32,
    },
    /// The pause would not fit yet, and rounds have not shrunk so far; no rule has fired.
    OverBudget,
    /// Rounds would not shrink; those of the pages that the guest writes in every round may be few enough to be held back.
    FindsHotPages,
    /// Rounds do not shrink, but the pause has been shorter lately: they go on for a moment until it is again.
    QuieterMoment,
}

/// Hot pages are held back where they are at least this part of what remains, a quarter: fewer do not turn a guest that
/// is too fast into one that is not, and a round is lost before it is slowed.
const LEAST_HELD_PART: u64 = 4;
/// A pause fits with this part of itself to spare, three percent: by so much pauses that are made of pages turn out longer
/// than predicted.
const PART_TO_SPARE: u32 = 32;
/// A shortening of less than this is never worth a round.
const SMALLEST_GAIN: Duration = Duration::from_micros(500);
/// How many rounds a guest whose pages never get fewer is watched for a quieter moment.
const QUIETER_ROUNDS: u32 = 6;

/// Answers a round.
pub fn decide(policy: &Policy, context: &RoundContext) -> Decision {
    let fits = context.predicted + context.predicted / PART_TO_SPARE <= policy.downtime_limit;
    if context.dirtied_pages <= policy.few_pages {
        return Decision::SwitchOver(StopReason::FewPages);
    }
    let may_shorten = match policy.shorten {
        Shorten::Never => false,
        Shorten::AtFullSpeed => context.throttle.is_none() && !context.holding,
        Shorten::Always => true,
    };
    if fits && !(may_shorten && shortens(context)) {
        return Decision::SwitchOver(StopReason::WithinBudget);
    }
    let limit = limit_reached(policy, context);
    if !fits
        && matches!(limit, None | Some(StopReason::NoProgress))
        && does_not_converge(policy, context)
        && let Some(help) = help(policy, context)
    {
        return help;
    }
    match limit {
        None if fits => Decision::Continue(Why::Shortens),
        None => Decision::Continue(outlook(policy, context)),
        Some(StopReason::NoProgress) if !fits && may_get_quieter(policy, context) => {
            Decision::Continue(Why::QuieterMoment)
        }
        Some(reason) if !fits && policy.on_stall == OnStall::Abort => Decision::Abort(reason),
        Some(reason) => Decision::SwitchOver(reason),
    }
}

/// Whether another round shortens the pause much.
fn shortens(context: &RoundContext) -> bool {
    let gain = context.predicted.saturating_sub(context.predicted_after_next);
    gain > (context.predicted / 10).max(SMALLEST_GAIN)
}

/// When the pause fits, if each round is to the one before as the next one is to this.
fn outlook(policy: &Policy, context: &RoundContext) -> Why {
    let shrink = (context.next_round_time.as_secs_f64() / context.round_time.as_secs_f64()).ln();
    let wanted = (policy.downtime_limit.as_secs_f64() / context.predicted.as_secs_f64()).ln();
    let rounds = (wanted / shrink).ceil();
    // of the first round little is learnt: it is the longest, and the working set bounds what it can dirty
    if context.round > 0 && shrink < 0.0 && rounds <= f64::from(policy.max_rounds) {
        Why::FitsIn { rounds: (rounds as u32).max(1) }
    } else {
        Why::OverBudget
    }
}

/// What a first round must leave for the guest to be taken for too fast: in percent of its time, to send it. It says
/// too little rather than too much, since the working set bounds what it can dirty.
const TOO_FAST_AT_ONCE_PERCENT: u32 = 70;

/// Whether rounds as they are would not shrink to nothing before the traffic limit: if each is to the one before as the
/// next one is to this, they add up to the next one over `1 - next / this`.
fn does_not_converge(policy: &Policy, context: &RoundContext) -> bool {
    let (this, next) = (context.round_time, context.next_round_time);
    if context.round == 0 {
        return next >= this * TOO_FAST_AT_ONCE_PERCENT / 100;
    }
    let Some(shrinks_by) = this.checked_sub(next).filter(|by| !by.is_zero()) else { return true };
    let time_to_come = next.as_secs_f64() * this.as_secs_f64() / shrinks_by.as_secs_f64();
    let to_come = time_to_come * context.wire_bytes_per_second as f64;
    context.total_sent_bytes as f64 + to_come > traffic_limit(policy, context) as f64
}

/// What makes rounds shrink: to hold hot pages back costs the guest nothing, so it comes first where it is enough to
/// count on. After the first round nobody knows which those are, and a round so short is worth finding out.
fn help(policy: &Policy, context: &RoundContext) -> Option<Decision> {
    let is_enough = |pages: u64| pages.saturating_mul(LEAST_HELD_PART) >= context.dirtied_pages;
    if !context.holding && policy.shorten != Shorten::Always {
        if context.round == 0 && is_enough(context.holdable_pages) {
            return Some(Decision::Continue(Why::FindsHotPages));
        }
        if is_enough(context.may_hold_pages()) {
            return Some(Decision::HoldBack { pages: context.may_hold_pages() });
        }
    }
    more_throttle(policy, context).map(Decision::Throttle)
}

fn more_throttle(policy: &Policy, context: &RoundContext) -> Option<Throttle> {
    let times = (context.round_time, context.next_round_time);
    let step =
        || throttle::step_up(context.throttle, context.needed_percent, policy.least_kept_percent, times);
    let may = context.can_throttle && policy.least_kept_percent < 100;
    may.then(step).flatten()
}

/// Whether it is worth waiting for the bottom of a dirtying cycle: the pause has been shorter lately.
fn may_get_quieter(policy: &Policy, context: &RoundContext) -> bool {
    let waited = context.stalled_rounds.saturating_sub(policy.no_progress_rounds);
    let lower = context.lowest_lately.is_some_and(|lowest| lowest + lowest / 10 < context.predicted);
    lower && waited < QUIETER_ROUNDS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A round that makes good progress and is far from every limit.
    fn progressing() -> RoundContext {
        RoundContext {
            round: 1,
            sent_pages: 100_000,
            dirtied_pages: 10_000,
            hot_pages: 0,
            holdable_pages: 0,
            holding: false,
            round_time: Duration::from_secs(1),
            next_round_time: Duration::from_millis(100),
            wire_bytes_per_second: 409_600_000,
            total_sent_bytes: 1 << 30,
            ram_bytes: 1 << 30,
            elapsed: Duration::from_secs(1),
            stalled_rounds: 0,
            predicted: Duration::from_millis(100),
            predicted_after_next: Duration::from_millis(10),
            lowest_lately: None,
            throttle: Throttle::NONE,
            needed_percent: 100,
            can_throttle: false,
        }
    }

    fn decide_default(context: &RoundContext) -> Decision {
        decide(&Policy::default(), context)
    }

    fn goes_on(decision: Decision) -> bool {
        matches!(decision, Decision::Continue(_))
    }

    #[test]
    fn it_says_when_the_pause_should_fit() {
        let over = |dirtied_pages, predicted_ms| {
            let predicted = Duration::from_millis(predicted_ms);
            decide_default(&RoundContext { predicted, can_throttle: false, ..dirtying(dirtied_pages) })
        };
        // 3 s are ten times the limit: at half each round 3.3 rounds away, at a tenth one
        assert_eq!(over(50_000, 3000), Decision::Continue(Why::FitsIn { rounds: 4 }));
        assert_eq!(over(10_000, 2999), Decision::Continue(Why::FitsIn { rounds: 1 }));
        assert_eq!(over(99_999, 3000), Decision::Continue(Why::OverBudget), "more than may be sent");
        assert_eq!(over(150_000, 3000), Decision::Continue(Why::OverBudget));
    }

    #[test]
    fn rounds_go_on_within_the_budget_while_they_shorten_the_pause() {
        assert_eq!(decide_default(&progressing()), Decision::Continue(Why::Shortens));
    }

    #[test]
    fn a_pause_fits_with_a_little_to_spare() {
        let at = |predicted_ms| {
            let predicted = Duration::from_millis(predicted_ms);
            decide_default(&RoundContext { predicted, predicted_after_next: predicted, ..progressing() })
        };
        assert_eq!(at(290), Decision::SwitchOver(StopReason::WithinBudget));
        assert!(goes_on(at(291)), "300 with the thirty-second part of it");
    }

    #[test]
    fn a_pause_within_the_budget_that_another_round_would_hardly_shorten_is_taken() {
        let context = RoundContext { predicted_after_next: Duration::from_millis(95), ..progressing() };
        assert_eq!(decide_default(&context), Decision::SwitchOver(StopReason::WithinBudget));
        let tiny = RoundContext {
            predicted: Duration::from_micros(900),
            predicted_after_next: Duration::from_micros(500),
            ..progressing()
        };
        assert_eq!(decide_default(&tiny), Decision::SwitchOver(StopReason::WithinBudget));
    }

    #[test]
    fn fifty_dirty_pages_are_few_and_fifty_one_are_not() {
        let at = |dirtied_pages| decide_default(&RoundContext { dirtied_pages, ..progressing() });
        assert_eq!(at(50), Decision::SwitchOver(StopReason::FewPages));
        assert_eq!(at(51), Decision::Continue(Why::Shortens));
    }

    #[test]
    fn each_limit_ends_pre_copy_under_its_own_name() {
        let over = RoundContext { predicted: Duration::from_secs(2), ..progressing() };
        let policy = Policy { timeout: Some(Duration::from_secs(9)), ..Policy::default() };
        let cases = [
            (RoundContext { stalled_rounds: 2, ..over.clone() }, StopReason::NoProgress),
            (RoundContext { round: 29, ..over.clone() }, StopReason::RoundLimit),
            (RoundContext { total_sent_bytes: 3 << 30, ..over.clone() }, StopReason::TrafficLimit),
            (RoundContext { elapsed: Duration::from_secs(9), ..over.clone() }, StopReason::Timeout),
        ];
        assert_eq!(decide(&policy, &over), Decision::Continue(Why::FitsIn { rounds: 1 }));
        for (context, reason) in cases {
            assert_eq!(decide(&policy, &context), Decision::SwitchOver(reason));
            assert_eq!(nearest_rule(&policy, &context), reason);
            let abort = Policy { on_stall: OnStall::Abort, ..policy.clone() };
            assert_eq!(decide(&abort, &context), Decision::Abort(reason));
            let fits = RoundContext { predicted: Duration::from_millis(200), ..context };
            assert_eq!(
                decide(&abort, &fits),
                Decision::SwitchOver(reason),
                "within the budget nothing aborts"
            );
        }
    }

    #[test]
    fn a_slowed_guest_is_paused_as_soon_as_that_fits_unless_the_pause_is_all_that_counts() {
        let context = RoundContext { throttle: Throttle::of_percent(40), ..progressing() };
        assert_eq!(decide_default(&context), Decision::SwitchOver(StopReason::WithinBudget));
        assert!(goes_on(decide(&Priority::ShortestPause.policy(), &context)));
    }

    #[test]
    fn who_is_to_be_done_soonest_takes_the_first_pause_that_fits() {
        let policy = Priority::SoonestDone.policy();
        assert_eq!(decide(&policy, &progressing()), Decision::SwitchOver(StopReason::WithinBudget));
    }

    /// A round over the budget that dirtied so many pages of 100 000 that it sent.
    fn dirtying(dirtied_pages: u64) -> RoundContext {
        let predicted = Duration::from_secs(2);
        let next_round_time = Duration::from_micros(10 * dirtied_pages);
        RoundContext { dirtied_pages, next_round_time, predicted, can_throttle: true, ..progressing() }
    }

    #[test]
    fn a_guest_is_slowed_when_rounds_would_not_shrink_before_the_traffic_limit_and_not_sooner() {
        // of 1 GiB, 1 is sent: 2 more may come, which are 524 288 pages; d / (1 - d / 100 000) is more from 83 984
        assert!(goes_on(decide_default(&dirtying(83_900))));
        assert_eq!(decide_default(&dirtying(84_100)), Decision::Throttle(Throttle::of_percent(41)));
        let first = |dirtied_pages| decide_default(&RoundContext { round: 0, ..dirtying(dirtied_pages) });
        assert!(goes_on(first(69_900)), "of the first round little is learnt");
        assert_eq!(first(100_000), Decision::Throttle(Throttle::of_percent(50)));
    }

    #[test]
    fn a_guest_that_fits_the_budget_or_cannot_be_slowed_or_is_to_be_left_alone_is_not_slowed() {
        let fits = RoundContext { predicted: Duration::from_millis(290), ..dirtying(200_000) };
        let cannot = RoundContext { can_throttle: false, ..dirtying(200_000) };
        let slowed = RoundContext { throttle: Throttle::of_percent(80), ..dirtying(200_000) };
        for context in [fits, cannot, slowed] {
            assert!(goes_on(decide_default(&context)));
        }
        let alone = Policy { least_kept_percent: 100, ..Policy::default() };
        assert!(goes_on(decide(&alone, &dirtying(200_000))));
    }

    #[test]
    fn a_guest_with_time_to_spare_keeps_its_speed_with_less_of_it() {
        let throttle = Throttle::of_percent(80);
        let spare =
            |needed_percent| decide_default(&RoundContext { needed_percent, throttle, ..dirtying(200_000) });
        assert!(goes_on(spare(100)));
        assert_eq!(spare(50), Decision::Throttle(Throttle::of_percent(90)), "a fifth of half");
        let alone = Policy { least_kept_percent: 100, ..Policy::default() };
        let idle = RoundContext { needed_percent: 1, ..dirtying(200_000) };
        assert!(goes_on(decide(&alone, &idle)));
        let first = RoundContext { needed_percent: 50, ..dirtying(100_000) };
        assert_eq!(
            decide_default(&first),
            Decision::Throttle(Throttle::of_percent(75)),
            "half of what it needs"
        );
    }

    #[test]
    fn a_stalled_guest_is_slowed_step_by_step_to_what_it_keeps_before_the_stall_counts() {
        for priority in Priority::ALL {
            let policy = priority.policy();
            let mut context = RoundContext { stalled_rounds: 9, ..dirtying(150_000) };
            let mut steps = 0;
            while let Decision::Throttle(throttle) = decide(&policy, &context) {
                assert!(throttle > context.throttle);
                context.throttle = throttle;
                steps += 1;
            }
            assert!((2..=5).contains(&steps), "{steps}");
            assert_eq!(context.throttle.kept_percent(), policy.least_kept_percent);
            let end = match policy.on_stall {
                OnStall::Abort => Decision::Abort(StopReason::NoProgress),
                OnStall::StopAndCopy => Decision::SwitchOver(StopReason::NoProgress),
            };
            assert_eq!(decide(&policy, &context), end);
        }
    }

    #[test]
    fn hot_pages_are_held_back_before_a_guest_is_slowed_where_they_are_a_quarter_of_what_remains() {
        let hot = |pages, dirtied_pages| RoundContext {
            hot_pages: pages,
            holdable_pages: 60_000,
            ..dirtying(dirtied_pages)
        };
        assert_eq!(decide_default(&hot(25_000, 100_000)), Decision::HoldBack { pages: 25_000 });
        assert!(matches!(decide_default(&hot(24_999, 100_000)), Decision::Throttle(_)));
        assert!(goes_on(decide_default(&hot(50_000, 50_000))), "rounds shrink");
        let holding = RoundContext { holding: true, ..hot(50_000, 100_000) };
        assert!(matches!(decide_default(&holding), Decision::Throttle(_)), "that was not enough");
        let shortest = Priority::ShortestPause.policy();
        assert!(matches!(decide(&shortest, &hot(50_000, 100_000)), Decision::Throttle(_)));
        let cannot = RoundContext { can_throttle: false, stalled_rounds: 2, ..hot(50_000, 100_000) };
        assert_eq!(decide_default(&cannot), Decision::HoldBack { pages: 50_000 });
        let held_to_the_limit = RoundContext { holdable_pages: 30_000, ..hot(50_000, 100_000) };
        assert_eq!(decide_default(&held_to_the_limit), Decision::HoldBack { pages: 30_000 });
        let first = RoundContext { round: 0, ..hot(0, 100_000) };
        assert_eq!(decide_default(&first), Decision::Continue(Why::FindsHotPages));
        assert!(matches!(
            decide_default(&RoundContext { holdable_pages: 24_999, ..first }),
            Decision::Throttle(_)
        ));
        let fits = RoundContext { holding: true, ..progressing() };
        assert_eq!(
            decide_default(&fits),
            Decision::SwitchOver(StopReason::WithinBudget),
            "the first that fits"
        );
    }

    #[test]
    fn hard_limits_hold_also_for_a_guest_that_could_be_slowed() {
        let last = RoundContext { round: 29, ..dirtying(200_000) };
        assert_eq!(decide_default(&last), Decision::SwitchOver(StopReason::RoundLimit));
    }

    #[test]
    fn a_stalled_guest_is_switched_over_at_the_bottom_of_its_cycle_if_that_comes_soon() {
        let lowest_lately = Some(Duration::from_secs(1));
        let stalled = |stalled_rounds, predicted| {
            let predicted = Duration::from_millis(predicted);
            let can_throttle = false;
            decide_default(&RoundContext {
                stalled_rounds,
                predicted,
                lowest_lately,
                can_throttle,
                ..dirtying(200_000)
            })
        };
        let now = Decision::SwitchOver(StopReason::NoProgress);
        assert_eq!(stalled(2, 1200), Decision::Continue(Why::QuieterMoment));
        assert_eq!(stalled(2, 1050), now);
        assert_eq!(stalled(7, 1200), Decision::Continue(Why::QuieterMoment));
        assert_eq!(stalled(8, 1200), now, "it was waited for long enough");
    }

    #[test]
    fn one_stalled_round_is_not_enough() {
        let over = RoundContext { predicted: Duration::from_secs(2), stalled_rounds: 1, ..progressing() };
        assert_eq!(decide_default(&over), Decision::Continue(Why::FitsIn { rounds: 1 }));
    }
}
