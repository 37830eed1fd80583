//! Rounds, what was measured in them, and the decision after each.

use std::time::Duration;

use mig_wire::fault::{Blame, Fault, Side, Step};

use super::{Action, Copying, LastRound, Measuring, Source, Stage, Switching};
use crate::domain::PAGE_BYTES;
use crate::ledger::Lately;
use crate::policy::{self, Decision, LEAST_KEPT_PERCENT, RoundContext, StopReason, Throttle};
use crate::progress::{PageCounts, Progress, RoundReport, Shortfall};

impl Source {
    pub(super) fn send_round(
        &mut self,
        now: Duration,
        round: u32,
        stalled_rounds: u32,
        held_pages: u64,
    ) -> Vec<Action> {
        self.stage = Stage::Copying(Copying {
            round,
            held_pages,
            started: now,
            stalled_rounds,
            sent: None,
            acknowledged: None,
        });
        vec![Action::SendRound { round, hold_back_pages: held_pages }]
    }

    pub(super) fn round_sent(&mut self, now: Duration, pages: PageCounts, bytes: u64) -> Vec<Action> {
        match &mut self.stage {
            Stage::Copying(copying) => {
                copying.sent = Some((pages, bytes));
                self.ledger.sent(pages, bytes);
                self.measure(now)
            }
            Stage::LastRound(last) => {
                last.sent = true;
                self.ledger.sent(pages, bytes);
                self.commit_when_ready(now)
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn acknowledged(&mut self, now: Duration, acknowledged: u32) -> Vec<Action> {
        match &mut self.stage {
            Stage::Copying(copying) if copying.round == acknowledged && copying.acknowledged.is_none() => {
                copying.acknowledged = Some(now);
                self.measure(now)
            }
            Stage::LastRound(last) if last.round == acknowledged && last.acknowledged.is_none() => {
                last.acknowledged = Some(now);
                Vec::new()
            }
            _ => self.out_of_turn(now, "an acknowledgement of another round"),
        }
    }

    /// Once a round has been sent and has arrived: how much was dirtied meanwhile?
    fn measure(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Copying(Copying { round, held_pages, started, stalled_rounds, sent, acknowledged }) =
            &self.stage
        else {
            return Vec::new();
        };
        let (Some((pages, bytes)), Some(arrived)) = (*sent, *acknowledged) else { return Vec::new() };
        let elapsed = arrived.saturating_sub(*started);
        self.estimate.round(pages.total(), bytes_as_raw(pages, bytes), elapsed);
        self.estimate.encoded(bytes_as_raw(pages, bytes), bytes);
        self.stage = Stage::Measuring(Measuring {
            round: *round,
            held_pages: *held_pages,
            started: *started,
            elapsed,
            sync_started: now,
            pages,
            bytes,
            stalled_rounds: *stalled_rounds,
        });
        vec![Action::Sync]
    }

    pub(super) fn synced(&mut self, now: Duration, dirty_pages: u64, hot_pages: u64) -> Vec<Action> {
        match &self.stage {
            Stage::Measuring(measuring) => {
                let measuring = measuring.clone();
                self.decide(now, &measuring, dirty_pages, hot_pages)
            }
            Stage::LastSync(switching) => {
                self.ledger.downtime.last_sync = now.saturating_sub(switching.since);
                let round = switching.last_round;
                self.stage = Stage::LastRound(LastRound {
                    round,
                    since: now,
                    acknowledged: None,
                    sent: false,
                    ready: None,
                });
                vec![Action::SendLast { round, verify: self.config.verify }]
            }
            _ => Vec::new(),
        }
    }

    fn decide(
        &mut self,
        now: Duration,
        measured: &Measuring,
        dirty_pages: u64,
        hot_pages: u64,
    ) -> Vec<Action> {
        let sync = now.saturating_sub(measured.sync_started);
        let dirtied_meanwhile = dirty_pages.saturating_sub(measured.held_pages);
        self.estimate.dirtied(dirtied_meanwhile, now.saturating_sub(measured.started), sync);
        self.ledger.rounds = measured.round + 1;
        let sent_pages = measured.pages.total();
        let stalled = dirtied_meanwhile >= sent_pages && dirty_pages > 0;
        let for_held_pages = self.config.policy.for_held_pages(self.estimate.downtime(0).total());
        let holdable_pages = self.estimate.pages_within(for_held_pages);
        let held_pages = if self.ledger.holding { hot_pages.min(holdable_pages) } else { 0 };
        let predicted = self.estimate.downtime(dirty_pages);
        let context = RoundContext {
            round: measured.round,
            sent_pages,
            dirtied_pages: dirty_pages,
            hot_pages,
            holdable_pages,
            holding: self.ledger.holding,
            round_time: measured.elapsed,
            next_round_time: self.estimate.sending(dirty_pages.saturating_sub(held_pages)),
            wire_bytes_per_second: per_second(measured.bytes, measured.elapsed),
            total_sent_bytes: self.ledger.sent_bytes,
            ram_bytes: self.config.ram_bytes,
            elapsed: now.saturating_sub(self.ledger.copying_since),
            stalled_rounds: if stalled { measured.stalled_rounds + 1 } else { 0 },
            predicted: predicted.total(),
            predicted_after_next: self.estimate.downtime_after_round(dirty_pages, held_pages).total(),
            lowest_lately: self.ledger.lately.lowest(),
            throttle: self.ledger.throttling.now(),
            needed_percent: self.ledger.throttling.needed_percent(),
            can_throttle: self.config.can_throttle,
        };
        self.ledger.lately.note(context.predicted);
        let decision = policy::decide(&self.config.policy, &context);
        let report = self.round_report(measured, &context, decision);
        let mut actions = vec![Action::Tell(Progress::Round(report))];
        if matches!(decision, Decision::SwitchOver(_) | Decision::Abort(_)) {
            self.ledger.predicted_downtime = Some(predicted);
            self.ledger.shortfall = self.shortfall(&context);
        }
        actions.extend(self.follow(now, decision, &context));
        actions
    }

    fn round_report(&self, measured: &Measuring, context: &RoundContext, decision: Decision) -> RoundReport {
        let nearest_rule = match decision {
            Decision::Continue(_) | Decision::HoldBack { .. } | Decision::Throttle(_) => {
                policy::nearest_rule(&self.config.policy, context)
            }
            Decision::SwitchOver(reason) | Decision::Abort(reason) => reason,
        };
        RoundReport {
            round: measured.round,
            pages: measured.pages,
            sent_bytes: measured.bytes,
            elapsed: measured.elapsed,
            dirtied_pages: context.dirtied_pages,
            held_pages: measured.held_pages,
            dirty_pages_per_second: self.estimate.dirty_pages_per_second(),
            bytes_per_second: self.estimate.bytes_per_second(),
            predicted_downtime: context.predicted,
            throttle: context.throttle,
            decision,
            nearest_rule,
        }
    }

    fn follow(&mut self, now: Duration, decision: Decision, context: &RoundContext) -> Vec<Action> {
        let next_round = context.round + 1;
        let held_pages = context.held_pages();
        match decision {
            Decision::Continue(_) => self.send_round(now, next_round, context.stalled_rounds, held_pages),
            Decision::HoldBack { pages } => {
                self.ledger.holding = true;
                self.ledger.lately = Lately::default();
                self.send_round(now, next_round, 0, pages)
            }
            Decision::Throttle(throttle) => {
                self.ledger.throttling.change(now, throttle);
                // what was predicted of a faster guest, and its stalls, do not count any more
                self.ledger.lately = Lately::default();
                let round = self.send_round(now, next_round, 0, held_pages);
                std::iter::once(Action::Throttle(throttle)).chain(round).collect()
            }
            Decision::SwitchOver(reason) => {
                self.ledger.stop_reason = Some(reason);
                self.stage = Stage::Pausing(Switching { last_round: next_round, since: now });
                vec![Action::Pause]
            }
            Decision::Abort(reason) => {
                self.ledger.stop_reason = Some(reason);
                let fault = self.not_converged(reason, context);
                self.give_up(now, fault, true)
            }
        }
    }

    fn shortfall(&self, context: &RoundContext) -> Option<Shortfall> {
        let policy = &self.config.policy;
        (context.predicted > policy.downtime_limit).then(|| Shortfall {
            // those that are held back among them
            dirty_bytes_per_second: per_second(
                context.dirtied_pages.saturating_mul(PAGE_BYTES),
                context.round_time,
            ),
            bytes_per_second: self.estimate.bytes_per_second(),
            met_limit: context.predicted,
            could_slow_more: context.can_throttle && policy.least_kept_percent > LEAST_KEPT_PERCENT,
        })
    }

    /// Goes on without: nothing of it is tried again.
    pub(super) fn not_throttled(&mut self, now: Duration) -> Vec<Action> {
        self.config.can_throttle = false;
        self.ledger.throttling.change(now, Throttle::NONE);
        Vec::new()
    }

    fn not_converged(&self, reason: StopReason, context: &RoundContext) -> Fault {
        let cause = format!(
            "did not converge ({reason}): predicted downtime {:?} is over the limit {:?}",
            context.predicted, self.config.policy.downtime_limit
        );
        Fault::new(Side::Source, Step::Round(context.round), Blame::Configuration, cause)
            .remedy("allow a longer downtime, a faster link, or stop-and-copy on stall")
    }
}

/// What the round would have sent, had no page been encoded. The estimate divides pages by a bandwidth: those of the
/// next round are encoded about as well as those of the last.
fn bytes_as_raw(pages: PageCounts, bytes: u64) -> u64 {
    match pages.encoded() {
        0 => bytes,
        _ => bytes.max(pages.with_bytes().saturating_mul(PAGE_BYTES)),
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / time.as_nanos().max(1)).unwrap_or(u64::MAX)
}
