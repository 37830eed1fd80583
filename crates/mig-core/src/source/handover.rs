//! From the pause to the destination's word that it runs the guest.

use std::time::Duration;

use super::{Action, AwaitingGap, Committed, LastRound, Source, Stage, Switching};
use crate::progress::{Downtime, OutcomeKind, Progress, Verification};
use crate::switchover::RunPermit;

impl Source {
    pub(super) fn paused(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Pausing(Switching { last_round, since }) = self.stage else { return Vec::new() };
        self.ledger.paused = true;
        self.ledger.downtime.pause = now.saturating_sub(since);
        self.stage = Stage::Saving(Switching { last_round, since: now });
        vec![Action::Tell(Progress::Paused), Action::Save]
    }

    pub(super) fn saved(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Saving(Switching { last_round, since }) = self.stage else { return Vec::new() };
        self.ledger.downtime.save = now.saturating_sub(since);
        self.stage = Stage::LastSync(Switching { last_round, since: now });
        vec![Action::Sync]
    }

    pub(super) fn ready(&mut self, now: Duration, verify: Duration, load: Duration) -> Vec<Action> {
        let Stage::LastRound(last) = &mut self.stage else { return self.out_of_turn(now, "ready") };
        let (Some(acknowledged), None) = (last.acknowledged, last.ready) else {
            return self.out_of_turn(now, "ready before the last pages");
        };
        last.ready = Some(now);
        // what the destination claims cannot be more than the time that passed; the acknowledgement may have
        // been on its way while it worked already, so it is the transfer that gives way
        let passed = now.saturating_sub(last.since);
        let downtime = &mut self.ledger.downtime;
        downtime.verify = verify.min(passed);
        downtime.load = load.min(passed - downtime.verify);
        let left = passed - downtime.verify - downtime.load;
        downtime.transfer = acknowledged.saturating_sub(last.since).min(left);
        if self.config.verify {
            let chunks = self.ledger.chunks(&self.config.description);
            self.ledger.verification = Some(Verification::Ok { chunks });
        }
        self.commit_when_ready(now)
    }

    /// The point of no return.
    pub(super) fn commit_when_ready(&mut self, now: Duration) -> Vec<Action> {
        let Stage::LastRound(LastRound { sent: true, ready: Some(ready), round, since, .. }) = self.stage
        else {
            return Vec::new();
        };
        self.ledger.rounds = round + 1;
        let Downtime { transfer, verify, load, .. } = self.ledger.downtime;
        let since = since + transfer + verify + load;
        self.stage = Stage::Committed(Committed { since, ready, sent: now });
        vec![Action::Commit(RunPermit::mint()), Action::Tell(Progress::Committed)]
    }

    pub(super) fn running(&mut self, now: Duration, resume: Duration) -> Vec<Action> {
        let Stage::Committed(committed) = self.stage.clone() else {
            return self.out_of_turn(now, "running");
        };
        self.note_running(now.saturating_sub(committed.since), resume);
        self.stage = Stage::AwaitingGap(AwaitingGap { committed, start_known: !self.ledger.start_is_told });
        vec![Action::Tell(Progress::Running), Action::StopTracking]
    }

    /// `passed` is what lies between Commit and the guest running.
    pub(super) fn note_running(&mut self, passed: Duration, resume: Duration) {
        self.ledger.downtime.resume = resume.min(passed);
        self.ledger.downtime.commit = passed.saturating_sub(resume);
    }

    /// Takes the way of Running out of the downtime: the guest ran already. What the destination's time from Ready
    /// to the start holds beyond this side's share and the resuming is the way of Ready and the way of Commit:
    /// half of it each, since no two clocks are compared.
    pub(super) fn started(&mut self, now: Duration, since_ready: Duration) -> Vec<Action> {
        let Stage::AwaitingGap(AwaitingGap { committed, start_known: known @ false }) = &mut self.stage
        else {
            return self.out_of_turn(now, "started");
        };
        *known = true;
        let answering = committed.sent.saturating_sub(committed.ready);
        let downtime = &mut self.ledger.downtime;
        let both_ways = since_ready.saturating_sub(answering + downtime.resume);
        let commit = committed.sent.saturating_sub(committed.since) + both_ways / 2;
        downtime.commit = downtime.commit.min(commit);
        Vec::new()
    }

    pub(super) fn gap(&mut self, now: Duration, gap: Option<Duration>) -> Vec<Action> {
        let Stage::AwaitingGap(_) = self.stage else { return self.out_of_turn(now, "gap") };
        self.ledger.guest_gap = gap;
        self.moved(now)
    }

    pub(super) fn moved(&mut self, now: Duration) -> Vec<Action> {
        self.stage = Stage::Ended;
        let report = self.report(now, OutcomeKind::Moved, None);
        vec![Action::End(Box::new(report))]
    }
}
