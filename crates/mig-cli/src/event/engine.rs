//! Events from what the engine and the VMM tell: in milliseconds, and in the words of `docs/cli.md`.

use std::time::Duration;

use mig::domain::PAGE_BYTES;
use mig::observe::{self, Progress, Verification};
use mig::policy::{Decision, Why};

use super::{Arrived, Doubt, Downtime, Event, Pages, Received, Report, Round, Running, Shortfall, Slowed};
use crate::failure::Failure;
use crate::units::as_ms;

impl From<&Progress> for Event {
    fn from(progress: &Progress) -> Self {
        match progress {
            Progress::TurnedAway { peer, cause } => {
                Self::TurnedAway { peer: peer.clone(), cause: cause.clone() }
            }
            Progress::Connected { version, channels } => {
                Self::Connected { version: *version, channels: *channels }
            }
            Progress::Accepted => Self::Accepted,
            Progress::Copying { round, sent_pages, total_pages } => {
                Self::Copying { round: *round, sent_pages: *sent_pages, total_pages: *total_pages }
            }
            Progress::Round(round) => Self::Round(round.into()),
            Progress::Paused => Self::Paused,
            Progress::Committed => Self::Committed,
            Progress::Running => Self::Running(Running::default()),
            Progress::Resumed => Self::Resumed,
            Progress::InDoubt { fault, asked } => {
                Self::InDoubt(Doubt { for_ms: 0.0, asked: *asked, failure: fault.into() })
            }
            Progress::WordRefused { cause } => Self::WordRefused(word_refused(cause)),
        }
    }
}

/// Neither side's fault; who tells it knows better which side it is.
fn word_refused(cause: &str) -> Failure {
    Failure::new("control", "resolve", cause, "discard the guest here: it is the other side's")
}

impl From<observe::PageCounts> for Pages {
    fn from(pages: observe::PageCounts) -> Self {
        let observe::PageCounts { zero, raw, zstd, delta } = pages;
        Self { zero, raw, zstd, delta }
    }
}

fn why(decision: &Decision) -> String {
    match decision {
        Decision::Continue(Why::Shortens) => "shortens the pause".into(),
        Decision::Continue(Why::FitsIn { rounds: 1 }) => "fits in 1 round".into(),
        Decision::Continue(Why::FitsIn { rounds }) => format!("fits in {rounds} rounds"),
        Decision::Continue(Why::OverBudget) => "over the budget".into(),
        Decision::Continue(Why::FindsHotPages) => "finds out which pages are hot".into(),
        Decision::Continue(Why::QuieterMoment) => "waits for a quieter moment".into(),
        Decision::HoldBack { pages } => format!("{pages} hot pages are held back"),
        Decision::Throttle(throttle) => format!("the guest is slowed by {throttle}"),
        Decision::SwitchOver(reason) | Decision::Abort(reason) => reason.name().into(),
    }
}

impl From<&observe::RoundReport> for Round {
    fn from(round: &observe::RoundReport) -> Self {
        let (decision, stop_reason) = match round.decision {
            Decision::Continue(_) => ("continue", None),
            Decision::HoldBack { .. } => ("hold-back", None),
            Decision::Throttle(_) => ("throttle", None),
            Decision::SwitchOver(reason) => ("switch-over", Some(reason)),
            Decision::Abort(reason) => ("abort", Some(reason)),
        };
        Self {
            round: round.round,
            pages: round.pages.into(),
            sent_bytes: round.sent_bytes,
            elapsed_ms: as_ms(round.elapsed),
            dirtied_pages: round.dirtied_pages,
            held_pages: round.held_pages,
            dirtied_bytes: round.dirtied_pages.saturating_mul(PAGE_BYTES),
            dirty_pages_per_second: round.dirty_pages_per_second,
            bytes_per_second: round.bytes_per_second,
            predicted_downtime_ms: as_ms(round.predicted_downtime),
            throttle_percent: round.throttle.percent(),
            decision: decision.into(),
            why: why(&round.decision),
            stop_reason: stop_reason.map(|r| r.name().into()),
            nearest_rule: round.nearest_rule.name().into(),
        }
    }
}

impl From<&observe::Downtime> for Downtime {
    fn from(downtime: &observe::Downtime) -> Self {
        Self {
            pause: as_ms(downtime.pause),
            save: as_ms(downtime.save),
            last_sync: as_ms(downtime.last_sync),
            transfer: as_ms(downtime.transfer),
            verify: as_ms(downtime.verify),
            load: as_ms(downtime.load),
            commit: as_ms(downtime.commit),
            resume: as_ms(downtime.resume),
        }
    }
}

impl From<&observe::Report> for Report {
    fn from(report: &observe::Report) -> Self {
        let optional_ms = |duration: Option<Duration>| duration.map(as_ms);
        let (verify, verified_chunks, mismatched_addresses) = match &report.verification {
            Verification::Off => ("off", None, None),
            Verification::Ok { chunks } => ("ok", Some(*chunks), None),
            Verification::Mismatch { guest_addresses } => ("mismatch", None, Some(guest_addresses.clone())),
        };
        Self {
            outcome: report.outcome.name().into(),
            stop_reason: report.stop_reason.map(|r| r.name().into()),
            rounds: report.rounds,
            total_ms: as_ms(report.total),
            downtime_ms: optional_ms(report.downtime.map(|d| d.total())),
            downtime: report.downtime.as_ref().map(Into::into),
            predicted_downtime_ms: optional_ms(report.predicted_downtime.map(|d| d.total())),
            predicted_downtime: report.predicted_downtime.as_ref().map(Into::into),
            shortfall: report.shortfall.map(Into::into),
            slowed: report.slowed.map(Into::into),
            guest_gap_ms: optional_ms(report.guest_gap),
            sent_bytes: report.sent_bytes,
            pages: report.pages.into(),
            ram_bytes: report.ram_bytes,
            verify: verify.into(),
            verified_chunks,
            mismatched_addresses,
            fault: report.fault.as_ref().map(Into::into),
        }
    }
}

impl From<&mig::ReceiveReport> for Received {
    fn from(report: &mig::ReceiveReport) -> Self {
        Self {
            rounds: report.rounds,
            received_bytes: report.received_bytes,
            pages: report.pages.into(),
            ram_bytes: report.ram_bytes,
            load_ms: as_ms(report.load),
            resume_ms: as_ms(report.resume),
            guest_gap_ms: report.guest_gap.map(as_ms),
            guest_time: None,
        }
    }
}

impl From<observe::Shortfall> for Shortfall {
    fn from(shortfall: observe::Shortfall) -> Self {
        Self {
            dirty_bytes_per_second: shortfall.dirty_bytes_per_second,
            bytes_per_second: shortfall.bytes_per_second,
            met_limit_ms: as_ms(shortfall.met_limit),
            could_slow_more: shortfall.could_slow_more,
        }
    }
}

impl From<observe::Slowed> for Slowed {
    fn from(slowed: observe::Slowed) -> Self {
        Self {
            most_percent: slowed.most.percent(),
            lasted_ms: as_ms(slowed.lasted),
            held_ms: as_ms(slowed.held),
            least_speed_percent: slowed.least_speed_percent,
        }
    }
}

impl From<&mig_vmm::TimePlan> for Arrived {
    fn from(plan: &mig_vmm::TimePlan) -> Self {
        Self {
            choice: plan.choice().into(),
            advanced_ms: as_ms(plan.advanced()),
            same_host: plan.same_host(),
            skew_at_most_ms: if plan.same_host() { 0.0 } else { as_ms(plan.advanced()) },
            source_ahead_ms: as_ms(plan.source_ahead()),
        }
    }
}
