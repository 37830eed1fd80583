//! The rules that end pre-copy whatever it has come to, and how near each is.

use std::fmt;

use super::{Policy, RoundContext};

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

/// The rule that has fired, if one has.
pub(super) fn limit_reached(policy: &Policy, context: &RoundContext) -> Option<StopReason> {
    let limits = [
        (context.round + 1 >= policy.max_rounds, StopReason::RoundLimit),
        (context.total_sent_bytes >= traffic_limit(policy, context), StopReason::TrafficLimit),
        (policy.timeout.is_some_and(|t| context.elapsed >= t), StopReason::Timeout),
        (context.stalled_rounds >= policy.no_progress_rounds, StopReason::NoProgress),
    ];
    limits.into_iter().find(|(reached, _)| *reached).map(|(_, reason)| reason)
}

/// The most bytes sent before the pause.
pub(super) fn traffic_limit(policy: &Policy, context: &RoundContext) -> u64 {
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
