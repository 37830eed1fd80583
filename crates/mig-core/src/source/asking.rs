//! In doubt: asking the destination, the arbiter and the operator until one of them tells.
//!
//! The arbiter is asked first each time, since its grant needs nobody else; the destination next, on a new
//! connection, at growing intervals. What still comes in on the old connection counts too.

use std::time::Duration;

use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{Fate, Message};

use super::{Action, Asking, Committed, Reclaiming, Source, Stage};
use crate::progress::{OutcomeKind, Progress, Verification};
use crate::switchover::{Claim, Word};

/// The wait after the first question in vain; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// The longest wait between questions.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

const REMEDY: &str = "it is asked again until it answers; or find out whether it runs the guest, and resolve: \
                      resume here if it certainly does not and never will, discard if it does";

/// How long to wait for the next question to a destination that was asked so often in vain.
pub fn wait_after(asked: u32) -> Duration {
    match asked.checked_sub(1) {
        None => Duration::ZERO,
        Some(doublings) => LONGEST_WAIT.min(FIRST_WAIT * (1 << doublings.min(8))),
    }
}

impl Source {
    /// Commit was sent, and then `fault` happened.
    pub(super) fn in_doubt(&mut self, fault: Fault, since: Duration) -> Vec<Action> {
        let mut actions = self.enter(fault.remedy(REMEDY), since);
        actions.extend(self.ask());
        actions
    }

    /// The destination was given the guest and could not start it: it can promise nothing, and no question
    /// will change that.
    pub(super) fn lost(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        let fault = fault.remedy("resolve: resume the guest here, or discard it");
        let actions = match self.stage {
            Stage::Committed(Committed { since, .. }) => self.enter(fault, since),
            Stage::Asking(_) => self.in_vain(fault),
            _ => return self.out_of_turn(now, "lost"),
        };
        if let Stage::Asking(asking) = &mut self.stage {
            asking.lost = true;
        }
        actions
    }

    fn enter(&mut self, fault: Fault, since: Duration) -> Vec<Action> {
        let tell = Progress::InDoubt { fault: fault.clone(), asked: 0 };
        self.stage = Stage::Asking(Asking {
            fault,
            since,
            asked: 0,
            query_pending: false,
            claim_pending: false,
            denied: false,
            lost: false,
            word: false,
        });
        self.ledger.tracking = false;
        vec![Action::StopTracking, Action::Tell(tell)]
    }

    /// Something that the destination said on the old connection.
    pub(super) fn heard_late(&mut self, now: Duration, message: Message) -> Vec<Action> {
        match message {
            Message::Running { resume } => self.runs_there(now, resume, Duration::ZERO),
            Message::Abort(fault) => self.give_up(now, fault, false),
            Message::Lost(fault) => self.lost(now, fault),
            _ => Vec::new(),
        }
    }

    pub(super) fn answered(&mut self, now: Duration, fate: Fate) -> Vec<Action> {
        let Stage::Asking(asking) = &mut self.stage else { return Vec::new() };
        asking.query_pending = false;
        let peer = |cause: &str| Fault::new(Side::Destination, Step::Commit, Blame::Peer, cause);
        match fate {
            Fate::Never => {
                let fault = asking.fault.clone();
                self.give_up(now, fault.remedy("the destination gave it back; migrate again"), false)
            }
            Fate::Running { resume, running_for } => self.runs_there(now, resume, running_for),
            Fate::Lost => self.lost(now, peer("it was to run the guest and could not start it")),
            Fate::Unknown => {
                let fault = peer("it does not know what became of the guest (was it started anew?)");
                self.unanswered(fault.remedy(REMEDY))
            }
        }
    }

    pub(super) fn unanswered(&mut self, fault: Fault) -> Vec<Action> {
        let Stage::Asking(asking) = &mut self.stage else { return Vec::new() };
        asking.query_pending = false;
        asking.asked = asking.asked.saturating_add(1);
        let mut actions = self.in_vain(Fault { remedy: REMEDY.into(), ..fault });
        actions.extend(self.ask());
        actions
    }

    pub(super) fn claimed(&mut self, now: Duration, claim: Claim) -> Vec<Action> {
        match &mut self.stage {
            Stage::Reclaiming(Reclaiming { fault, since }) => {
                let (fault, since) = (fault.clone(), *since);
                match claim {
                    // an arbiter that cannot be asked must not keep the guest from running where it always was
                    Claim::Granted | Claim::Unavailable(_) => self.give_up(now, fault, true),
                    Claim::Denied => self.given_away(fault, since),
                }
            }
            Stage::Asking(asking) => {
                asking.claim_pending = false;
                let (word, fault) = (std::mem::take(&mut asking.word), asking.fault.clone());
                match claim {
                    Claim::Granted => {
                        self.ledger.copy_left = true;
                        self.give_up(now, fault.remedy("the arbiter gave it back; migrate again"), false)
                    }
                    Claim::Unavailable(_) if word => self.on_the_operators_word(now),
                    Claim::Unavailable(cause) => {
                        let fault = Fault::new(
                            Side::Source,
                            Step::Commit,
                            Blame::Local,
                            format!("the arbiter cannot be asked: {cause}"),
                        );
                        let mut actions = self.in_vain(fault.remedy(REMEDY));
                        actions.extend(self.ask_peer());
                        actions
                    }
                    Claim::Denied => {
                        asking.denied = true;
                        let cause = "the arbiter has given the guest to the destination".into();
                        let refused = word.then_some(Action::Tell(Progress::WordRefused { cause }));
                        refused.into_iter().chain(self.ask_peer()).collect()
                    }
                }
            }
            _ => Vec::new(),
        }
    }

    /// The destination's operator had it run its copy before Commit.
    fn given_away(&mut self, fault: Fault, since: Duration) -> Vec<Action> {
        // the last round has arrived, or there would be nothing to run there
        self.ledger.rounds += 1;
        let mut actions = self.enter(fault.remedy(REMEDY), since);
        if let Stage::Asking(asking) = &mut self.stage {
            asking.denied = true;
        }
        actions.extend(self.ask_peer());
        actions
    }

    pub(super) fn resolved(&mut self, now: Duration, word: Word) -> Vec<Action> {
        let Stage::Asking(asking) = &mut self.stage else { return Vec::new() };
        match word {
            Word::Resume if self.config.arbiter.is_some() => {
                asking.word = true;
                let claims = !std::mem::replace(&mut asking.claim_pending, true);
                claims.then_some(Action::Claim).into_iter().collect()
            }
            Word::Resume => self.on_the_operators_word(now),
            Word::Discard => {
                let fault = asking.fault.clone().remedy("see that the destination runs the guest");
                self.stage = Stage::Ended;
                vec![Action::End(Box::new(self.report(now, OutcomeKind::Discarded, Some(fault))))]
            }
        }
    }

    fn on_the_operators_word(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Asking(asking) = &self.stage else { return Vec::new() };
        let fault = asking.fault.clone().remedy("it was resumed on the operator's word");
        self.ledger.copy_left = true;
        self.give_up(now, fault, false)
    }

    fn runs_there(&mut self, now: Duration, resume: Duration, running_for: Duration) -> Vec<Action> {
        let Stage::Asking(Asking { since, .. }) = self.stage else { return Vec::new() };
        self.note_running(now.saturating_sub(running_for).saturating_sub(since), resume);
        if self.config.verify {
            // nothing runs there that differs
            let chunks = self.ledger.chunks(&self.config.description);
            self.ledger.verification = Some(Verification::Ok { chunks });
        }
        let mut actions = vec![Action::Tell(Progress::Running)];
        actions.extend(self.moved(now));
        actions
    }

    /// Says that nothing was learned.
    fn in_vain(&self, fault: Fault) -> Vec<Action> {
        let Stage::Asking(asking) = &self.stage else { return Vec::new() };
        vec![Action::Tell(Progress::InDoubt { fault, asked: asking.asked })]
    }

    /// Asks whoever may know, from the start.
    fn ask(&mut self) -> Vec<Action> {
        let Stage::Asking(asking) = &mut self.stage else { return Vec::new() };
        if self.config.arbiter.is_none() || asking.denied || asking.lost {
            return self.ask_peer();
        }
        let claims = !std::mem::replace(&mut asking.claim_pending, true);
        claims.then_some(Action::Claim).into_iter().collect()
    }

    fn ask_peer(&mut self) -> Vec<Action> {
        let Stage::Asking(asking) = &mut self.stage else { return Vec::new() };
        if asking.lost || std::mem::replace(&mut asking.query_pending, true) {
            return Vec::new();
        }
        vec![Action::Query { after: wait_after(asking.asked) }]
    }
}
