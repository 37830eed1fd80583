//! The stop policy: after each round, another one, the switchover, or the end.
//!
//! Pure: [`decide`] looks at a [`RoundContext`] and nothing else, so every decision can be replayed.

use std::fmt;
use std::time::Duration;

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
    /// What to do when pre-copy did not converge.
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
            on_stall: OnStall::StopAndCopy,
        }
    }
}

/// What to do when a rule ends pre-copy although the prediction is over the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnStall {
    /// Switch over all the same: the pause will be longer than asked for.
    StopAndCopy,
    /// Leave the guest where it is.
    Abort,
}

/// The rules, by their names in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// The predicted downtime fits the limit and another round would not shorten it much.
    WithinBudget,
    /// So few pages are dirty that a round is not worth its overhead.
    FewPages,
    /// The guest dirties as fast as pages are sent.
    NoProgress,
    /// The most rounds have been sent.
    RoundLimit,
    /// The most bytes have been sent.
    TrafficLimit,
    /// The most time has passed.
    Timeout,
}

impl StopReason {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::WithinBudget => "within-budget",
            Self::FewPages => "few-pages",
            Self::NoProgress => "no-progress",
            Self::RoundLimit => "round-limit",
            Self::TrafficLimit => "traffic-limit",
            Self::Timeout => "timeout",
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the policy may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundContext {
    /// The round that has ended.
    pub round: u32,
    /// Pages sent in it.
    pub sent_pages: u64,
    /// Pages dirtied meanwhile.
    pub dirtied_pages: u64,
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
}

/// What the policy answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Send another round.
    Continue,
    /// Pause the guest and switch over.
    SwitchOver(StopReason),
    /// Give up; the guest stays.
    Abort(StopReason),
}

/// A shortening of less than this is never worth a round.
const SMALLEST_GAIN: Duration = Duration::from_micros(500);

/// Answers a round.
pub fn decide(policy: &Policy, context: &RoundContext) -> Decision {
    let fits = context.predicted <= policy.downtime_limit;
    let gain = context.predicted.saturating_sub(context.predicted_after_next);
    if context.dirtied_pages <= policy.few_pages {
        return Decision::SwitchOver(StopReason::FewPages);
    }
    if fits && gain <= (context.predicted / 10).max(SMALLEST_GAIN) {
        return Decision::SwitchOver(StopReason::WithinBudget);
    }
    match limit_reached(policy, context) {
        None => Decision::Continue,
        Some(reason) if !fits && policy.on_stall == OnStall::Abort => Decision::Abort(reason),
        Some(reason) => Decision::SwitchOver(reason),
    }
}

fn limit_reached(policy: &Policy, context: &RoundContext) -> Option<StopReason> {
    let limits = [
        (context.stalled_rounds >= policy.no_progress_rounds, StopReason::NoProgress),
        (context.round + 1 >= policy.max_rounds, StopReason::RoundLimit),
        (context.total_sent_bytes >= traffic_limit(policy, context), StopReason::TrafficLimit),
        (policy.timeout.is_some_and(|t| context.elapsed >= t), StopReason::Timeout),
    ];
    limits.into_iter().find(|(reached, _)| *reached).map(|(_, reason)| reason)
}

fn traffic_limit(policy: &Policy, context: &RoundContext) -> u64 {
    policy.traffic_factor.saturating_mul(context.ram_bytes)
}

/// The rule that is nearest to firing: for each the part of its way that has been gone.
pub fn nearest_rule(policy: &Policy, context: &RoundContext) -> StopReason {
    let part = |gone: f64, whole: f64| if whole > 0.0 { gone / whole } else { 1.0 };
    let distances = [
        (
            StopReason::WithinBudget,
            part(policy.downtime_limit.as_secs_f64(), context.predicted.as_secs_f64()).min(0.99),
        ),
        (StopReason::FewPages, part(policy.few_pages as f64, context.dirtied_pages as f64)),
        (
            StopReason::NoProgress,
            part(f64::from(context.stalled_rounds), f64::from(policy.no_progress_rounds)),
        ),
        (StopReason::RoundLimit, part(f64::from(context.round + 1), f64::from(policy.max_rounds))),
        (
            StopReason::TrafficLimit,
            part(context.total_sent_bytes as f64, traffic_limit(policy, context) as f64),
        ),
        (
            StopReason::Timeout,
            policy.timeout.map_or(0.0, |t| part(context.elapsed.as_secs_f64(), t.as_secs_f64())),
        ),
    ];
    distances.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(StopReason::RoundLimit, |(rule, _)| rule)
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
            total_sent_bytes: 1 << 30,
            ram_bytes: 1 << 30,
            elapsed: Duration::from_secs(1),
            stalled_rounds: 0,
            predicted: Duration::from_millis(100),
            predicted_after_next: Duration::from_millis(10),
        }
    }

    fn decide_default(context: &RoundContext) -> Decision {
        decide(&Policy::default(), context)
    }

    #[test]
    fn rounds_go_on_within_the_budget_while_they_shorten_the_pause() {
        assert_eq!(decide_default(&progressing()), Decision::Continue);
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
        assert_eq!(at(51), Decision::Continue);
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
        assert_eq!(decide(&policy, &over), Decision::Continue);
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
    fn one_stalled_round_is_not_enough() {
        let over = RoundContext { predicted: Duration::from_secs(2), stalled_rounds: 1, ..progressing() };
        assert_eq!(decide_default(&over), Decision::Continue);
    }
}
