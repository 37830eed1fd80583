//! From Commit to the guest running here; and what a source, an arbiter or an operator says of a copy that waits.

use std::time::Duration;

use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{Fate, Message};

use super::{Action, Destination, End, Stage};
use crate::progress::Progress;
use crate::switchover::{Claim, RunPermit, Word};

impl Destination {
    /// The source gave the guest away: from here on it is ours.
    pub(super) fn commit(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Ready = self.stage else { return self.out_of_turn("commit") };
        if self.arbiter.is_some() {
            self.stage = Stage::Claiming { since: now, word: None };
            return vec![Action::Claim];
        }
        self.resume(now)
    }

    fn resume(&mut self, since: Duration) -> Vec<Action> {
        self.stage = Stage::Resuming { since };
        vec![Action::Resume(RunPermit::mint())]
    }

    pub(super) fn claimed(&mut self, claim: Claim) -> Vec<Action> {
        let Stage::Claiming { since, word } = &mut self.stage else { return Vec::new() };
        let (since, word) = (*since, word.take());
        let fault = |blame, cause| Fault::new(Side::Destination, Step::Commit, blame, cause);
        match (claim, word) {
            (Claim::Granted, _) | (Claim::Unavailable(_), Some(_)) => self.resume(since),
            (Claim::Denied, Some(held)) => {
                self.stage = Stage::Held(held);
                let cause = "the arbiter has given the guest to the source".into();
                vec![Action::Tell(Progress::WordRefused { cause })]
            }
            (Claim::Denied, None) => {
                self.give_up(fault(Blame::Peer, "the arbiter has given the guest to the source".into()))
            }
            (Claim::Unavailable(cause), None) => self.give_up(
                fault(Blame::Local, format!("the arbiter cannot be asked: {cause}"))
                    .remedy("see that the lease file can be written on both sides; migrate again"),
            ),
        }
    }

    /// A source that asks has lost its link after Commit; one that could not be told to run the guest gives
    /// it up before it answers.
    pub(super) fn asked(&mut self, now: Duration) -> Vec<Action> {
        match self.stage {
            Stage::Ended => Vec::new(),
            Stage::Resuming { .. } => vec![Action::Answer(Fate::Unknown)],
            Stage::FindingGap { since } => {
                let running_for = now.saturating_sub(since);
                vec![Action::Answer(Fate::Running { resume: self.received.resume, running_for })]
            }
            _ => {
                let fault = Fault::new(
                    Side::Source,
                    self.step(),
                    Blame::Network,
                    "the source lost its connection, asked what became of its guest, and has it back",
                );
                self.stage = Stage::Ended;
                vec![Action::Answer(Fate::Never), Action::End(End::NotReceived(fault))]
            }
        }
    }

    pub(super) fn resolved(&mut self, now: Duration, word: Word) -> Vec<Action> {
        let Stage::Held(fault) = &self.stage else { return Vec::new() };
        let fault = fault.clone();
        match word {
            Word::Resume if self.arbiter.is_some() => {
                self.stage = Stage::Claiming { since: now, word: Some(fault) };
                vec![Action::Claim]
            }
            Word::Resume => self.resume(now),
            Word::Discard => {
                self.stage = Stage::Ended;
                vec![Action::End(End::NotReceived(fault.remedy("it was discarded on the operator's word")))]
            }
        }
    }

    pub(super) fn resumed(&mut self, at: Duration) -> Vec<Action> {
        let Stage::Resuming { since } = self.stage else { return Vec::new() };
        let started = at.max(since);
        self.received.resume = started.saturating_sub(since);
        self.stage = Stage::FindingGap { since: started };
        let mut actions = vec![Action::Send(Message::Running { resume: self.received.resume })];
        if self.tells_start {
            let since_ready = started.saturating_sub(self.ready_at);
            actions.push(Action::Send(Message::Started { since_ready }));
        }
        actions.extend([Action::Tell(Progress::Running), Action::FindGap]);
        actions
    }

    pub(super) fn gap(&mut self, gap: Option<Duration>) -> Vec<Action> {
        let Stage::FindingGap { .. } = self.stage else { return Vec::new() };
        self.received.guest_gap = gap;
        self.stage = Stage::Ended;
        vec![Action::Send(Message::Gap(gap)), Action::End(End::Running(self.received))]
    }
}
