//! What can happen in a state of the checked world.
//!
//! Nothing is budgeted where the machines themselves bound it: any message may be late or lost, any work may
//! fail, either side may be cancelled, may give up on its peer or may crash, all of it in every state and in
//! any combination.

use mig_core::Side;
use mig_core::switchover::Word;
use mig_wire::frame::Fate;

use super::machines::Work;
use super::state::{Question, State, peer};
use super::step::{Outcome, Step};
use super::world::{SIDES, World};
use super::{Arbiter, Operator};

impl World {
    /// Everything that can happen, and perhaps changes nothing.
    pub(super) fn possible(&mut self, state: &State) -> Vec<Step> {
        let mut possible = Vec::new();
        for side in SIDES {
            self.to_a_side(state, side, &mut possible);
        }
        if let (Some(token), Some(_)) = (state.pages.queue.first(), state.destination.machine) {
            possible.push(Step::Arrives(token));
        }
        if !state.pages.cut && !state.all_over() {
            possible.push(Step::CutPages);
        }
        self.questions(state, &mut possible);
        possible
    }

    /// What can happen to a side.
    fn to_a_side(&self, state: &State, side: Side, possible: &mut Vec<Step>) {
        let host = state.host(side);
        if host.alive {
            possible.push(Step::Crashes(side));
        }
        if !state.to(side).cut && (state.source.link || state.destination.link) {
            possible.push(Step::Cut(side));
        }
        for word in [Word::Resume, Word::Discard] {
            if self.may_say(state, side, word) && (host.machine.is_some() || state.holds_a_copy(side)) {
                possible.push(Step::Says(side, word));
            }
        }
        if host.machine.is_none() {
            return;
        }
        possible.extend([Step::TooLate(side), Step::Cancels(side)]);
        if host.link {
            match state.to(side).queue.first() {
                Some(message) => possible.extend([Step::Hears(side, message), Step::Suspects(side)]),
                None if !state.host(peer(side)).listens()
                    || state.to_source.cut
                    || state.to_destination.cut =>
                {
                    possible.push(Step::Notices(side));
                }
                None => possible.push(Step::Suspects(side)),
            }
        }
        if state.pages.cut {
            possible.push(Step::NoticesPages(side));
        }
        for work in host.work.iter() {
            if matches!(work, Work::Claim | Work::Granted | Work::Denied)
                && self.config.arbiter == Arbiter::Unreliable
            {
                possible.push(Step::ArbiterFails(side));
            }
            let outcomes: &[Outcome] = match work {
                Work::Attach if state.attached => &[Outcome::Done, Outcome::Failed],
                Work::Attach => &[Outcome::Failed],
                Work::Sync if self.config.more_rounds => {
                    &[Outcome::Done, Outcome::ManyDirty, Outcome::Failed]
                }
                Work::Verify => &[Outcome::Done, Outcome::Differs, Outcome::Failed],
                Work::Prepare => &[Outcome::Done, Outcome::Refused, Outcome::Failed],
                Work::FindGap | Work::Granted | Work::Denied => &[Outcome::Done],
                Work::Claim => {
                    possible.push(Step::Decides(side));
                    continue;
                }
                Work::Query => continue,
                Work::StartTracking
                | Work::SendPages
                | Work::Sync
                | Work::Pause
                | Work::Save
                | Work::Locate
                | Work::WriteCommit
                | Work::Resume
                | Work::Load => &[Outcome::Done, Outcome::Failed],
            };
            possible.extend(outcomes.iter().map(|outcome| Step::Works(side, work, *outcome)));
        }
    }

    /// What can happen to questions and answers.
    fn questions(&mut self, state: &State, possible: &mut Vec<Step>) {
        let more = state.in_vain < self.config.questions_in_vain;
        if state.source.work.contains(Work::Query) {
            possible.push(Step::Asks);
            if more {
                possible.push(Step::Unanswered);
            }
        }
        match state.question {
            // the last question that is modelled gets a real answer where there can be one: without that rule
            // the bound would look like a source that has stopped asking
            Question::OnItsWay if more => {
                possible.extend([Step::QuestionArrives { stray: false }, Step::Unanswered]);
            }
            Question::OnItsWay if !self.would_answer_unknown(state) => {
                possible.push(Step::QuestionArrives { stray: false });
            }
            Question::Answered(_) => {
                possible.push(Step::AnswerArrives);
                if more {
                    possible.push(Step::Unanswered);
                }
            }
            Question::OnItsWay | Question::None => {}
        }
        if state.stray {
            possible.push(Step::QuestionArrives { stray: true });
        }
        if state.recalls {
            possible.push(Step::Recalls);
        }
        let known = state.destination_end.is_some() && state.destination.alive && !state.forgotten;
        if known && state.source.machine.is_some() {
            possible.push(Step::Forgets);
        }
    }

    fn would_answer_unknown(&mut self, state: &State) -> bool {
        let mut trial = *state;
        self.take(&mut trial, Step::QuestionArrives { stray: false });
        trial.question == Question::Answered(Fate::Unknown)
    }

    /// What an operator may say to a side.
    fn may_say(&self, state: &State, side: Side, word: Word) -> bool {
        match (self.config.operator, word) {
            (Operator::Silent, _) => false,
            (Operator::Anything, _) => true,
            (Operator::Truthful, Word::Resume) => self.will_not_run(state, peer(side)),
            // what an arbiter gave to a side that died cannot be run any more
            (Operator::Truthful, Word::Discard) => {
                state.host(peer(side)).runs() || self.config.arbiter != Arbiter::None
            }
        }
    }

    /// What an operator who looked may be sure of: a side does not run the guest, and will not unless he says so.
    fn will_not_run(&self, state: &State, side: Side) -> bool {
        let host = state.host(side);
        match (host.machine, side) {
            (None, _) => !host.permit,
            // with an arbiter it may be about to be granted the guest
            (Some(machine), Side::Source) => {
                self.config.arbiter == Arbiter::None && self.machines.source(machine).is_in_doubt()
            }
            (Some(machine), Side::Destination) => self.machines.destination(machine).is_in_doubt(),
        }
    }
}
