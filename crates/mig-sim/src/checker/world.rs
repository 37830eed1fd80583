//! What can happen in a state of the checked world, and what comes of it.
//!
//! Nothing is budgeted where the machines themselves bound it: any message may be late or lost, any work may
//! fail, either side may be cancelled, may give up on its peer or may crash, all of it in every state and in
//! any combination. What a side sends travels in order; a direction that is cut delivers what had arrived by
//! then, for ever nothing after it, and neither side is told.

use mig_core::Side;
use mig_core::progress::OutcomeKind;
use mig_core::switchover::Word;
use mig_wire::Message;
use mig_wire::frame::Fate;

use super::machines::{Effect, Failure, Input, MachineId, Machines, MessageId, Work};
use super::search::Model;
use super::state::{Question, State, Token, peer};
use super::{Arbiter, Config, Mutant, Operator, Property};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The head of the control connection arrives.
    Hears(Side, MessageId),
    /// The head of the page channel arrives.
    Arrives(Token),
    /// What a side was asked to do is done, or was not possible.
    Works(Side, Work, Outcome),
    /// A side notices that its control connection is closed or silent.
    Notices(Side),
    /// A side takes its control connection for lost, which it is not (yet).
    Suspects(Side),
    /// A side notices that its page channel is lost.
    NoticesPages(Side),
    /// A side has waited long enough for its peer, which is there.
    TooLate(Side),
    Cancels(Side),
    Crashes(Side),
    /// A direction of the control connection, by whom it led to.
    Cut(Side),
    CutPages,
    /// The source connects to ask.
    Asks,
    /// It cannot, or has waited long enough for an answer.
    Unanswered,
    /// A question arrives: the one that the source waits for, or one that it does not wait for any more.
    QuestionArrives {
        stray: bool,
    },
    AnswerArrives,
    /// The source, which has the guest, asks for the copy it left.
    Recalls,
    /// The arbiter decides on a claim.
    Decides(Side),
    /// Its answer, or the question, is lost.
    ArbiterFails(Side),
    Says(Side, Word),
    /// The destination's listener forgets the session: too many came after it.
    Forgets,
}

/// How work went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    Done,
    Failed,
    /// The dirty log holds too many pages for the pause.
    ManyDirty,
    /// Digests differ.
    Differs,
    /// The guest is refused.
    Refused,
}

/// Steps that need neither a fault nor anybody's will: with these alone everything must end well.
pub(super) const NATURAL: u8 = 0;
/// Those, and the words of an operator.
pub(super) const WITH_WORDS: u8 = 1;

/// The model.
pub(super) struct World {
    pub(super) config: Config,
    pub(super) machines: Machines,
}

const SIDES: [Side; 2] = [Side::Source, Side::Destination];

impl Model for World {
    type State = State;
    type Step = Step;
    type Property = Property;

    fn start(&mut self) -> State {
        let (source, destination) = self.machines.first();
        let mut state = State::new(source, destination);
        self.tell(&mut state, Side::Source, Input::Connected);
        state
    }

    fn steps(&mut self, state: &State, steps: &mut Vec<(Step, State)>) {
        let mut possible = Vec::new();
        for side in SIDES {
            self.possible(state, side, &mut possible);
        }
        if let (Some(token), Some(_)) = (state.pages.queue.first(), state.destination.machine) {
            possible.push(Step::Arrives(token));
        }
        if !state.pages.cut && !state.all_over() {
            possible.push(Step::CutPages);
        }
        self.questions(state, &mut possible);
        for step in possible {
            let mut next = *state;
            self.take(&mut next, step);
            next.settle();
            if next != *state {
                steps.push((step, next));
            }
        }
    }

    fn broken(&self, state: &State) -> Option<Property> {
        Property::broken_by(state, self.is_excused(state))
    }

    fn class(&self, step: &Step) -> Option<u8> {
        match step {
            Step::Hears(..) | Step::Arrives(_) | Step::Notices(_) => Some(NATURAL),
            Step::Works(_, _, Outcome::Done) => Some(NATURAL),
            // that is not a fault where nobody is there to attach to
            Step::Works(_, Work::Attach, Outcome::Failed) => Some(NATURAL),
            Step::NoticesPages(_) | Step::Asks | Step::QuestionArrives { .. } | Step::AnswerArrives => {
                Some(NATURAL)
            }
            Step::Recalls | Step::Decides(_) => Some(NATURAL),
            Step::Says(..) => Some(WITH_WORDS),
            Step::Works(..)
            | Step::Suspects(_)
            | Step::TooLate(_)
            | Step::Cancels(_)
            | Step::Crashes(_)
            | Step::Cut(_)
            | Step::CutPages
            | Step::Unanswered
            | Step::ArbiterFails(_)
            | Step::Forgets => None,
        }
    }
}

impl World {
    pub(super) fn new(config: Config) -> Self {
        let machines = Machines::new(config.verify, config.arbiter != Arbiter::None);
        Self { config, machines }
    }

    /// What can happen to a side.
    fn possible(&self, state: &State, side: Side, possible: &mut Vec<Step>) {
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

    fn take(&mut self, state: &mut State, step: Step) {
        match step {
            Step::Hears(side, message) => {
                state.to_mut(side).queue.remove_first();
                self.tell(state, side, Input::Message(message));
            }
            Step::Arrives(token) => {
                state.pages.queue.remove_first();
                let input = match token {
                    Token::Attach => Input::Attached,
                    Token::RoundEnd(round) => Input::ChannelEnded(round),
                };
                self.tell(state, Side::Destination, input);
                // fed before it is answered; an end of the machine closes the connection instead
                state.attached |= token == Token::Attach && state.destination.machine.is_some();
            }
            Step::Works(side, work, outcome) => self.work(state, side, work, outcome),
            Step::Notices(side) | Step::Suspects(side) => {
                state.host_mut(side).link = false;
                self.tell(state, side, Input::Failed(Failure::Link));
            }
            Step::NoticesPages(side) => self.tell(state, side, Input::Failed(Failure::Link)),
            Step::TooLate(side) => self.tell(state, side, Input::Failed(Failure::Late)),
            Step::Cancels(side) => self.tell(state, side, Input::Cancelled),
            Step::Crashes(side) => state.crash(side),
            Step::Cut(side) => state.to_mut(side).cuts(),
            Step::CutPages => state.pages.cuts(),
            Step::Asks => {
                state.source.work.remove(Work::Query);
                state.question = Question::OnItsWay;
            }
            Step::Unanswered => {
                state.in_vain += 1;
                state.source.work.remove(Work::Query);
                state.stop_waiting();
                self.tell(state, Side::Source, Input::Unanswered);
            }
            Step::QuestionArrives { stray: false } => state.question = Question::Answered(self.answer(state)),
            Step::QuestionArrives { stray: true } => {
                state.stray = false;
                self.answer(state);
            }
            Step::AnswerArrives => {
                if let Question::Answered(fate) = state.question {
                    state.question = Question::None;
                    state.in_vain += u8::from(fate == Fate::Unknown);
                    self.tell(state, Side::Source, Input::Answered(fate));
                }
            }
            Step::Recalls => state.recalls = self.answer(state) == Fate::Unknown,
            Step::Decides(side) => {
                let holder = *state.register.get_or_insert(side);
                let granted = holder == side || self.ignores_the_register(state, side);
                let work = &mut state.host_mut(side).work;
                work.remove(Work::Claim);
                work.insert(if granted { Work::Granted } else { Work::Denied });
            }
            Step::ArbiterFails(side) => {
                let work = &mut state.host_mut(side).work;
                for of_the_claim in [Work::Claim, Work::Granted, Work::Denied] {
                    work.remove(of_the_claim);
                }
                self.tell(state, side, Input::ArbiterUnavailable);
            }
            Step::Says(side, Word::Resume) if state.holds_a_copy(side) => {
                state.host_mut(side).permit = true;
            }
            Step::Says(side, word) => self.tell(state, side, Input::Resolve(word)),
            Step::Forgets => state.forgotten = true,
        }
    }

    fn work(&mut self, state: &mut State, side: Side, work: Work, outcome: Outcome) {
        let host = state.host_mut(side);
        host.work.remove(work);
        if (work, outcome) == (Work::Resume, Outcome::Failed) {
            host.permit = false;
            host.resume_failed = true;
        }
        if (work, outcome) == (Work::Pause, Outcome::Done) {
            // from here on the guest takes a permit to run again
            host.permit = false;
        }
        let input = match (outcome, work) {
            (Outcome::Done, Work::WriteCommit) => return,
            (Outcome::Done, _) => Input::Done(work),
            (Outcome::Failed, Work::Resume) => Input::Failed(Failure::Resume),
            (Outcome::Failed, Work::WriteCommit)
                if self.config.mutant == Some(Mutant::FailedSendMeansNotReceived) =>
            {
                self.proof_that_it_never_ran()
            }
            (Outcome::Failed, Work::WriteCommit | Work::Attach) => Input::Failed(Failure::Link),
            (Outcome::Failed, _) => Input::Failed(Failure::Work),
            (Outcome::ManyDirty, _) => Input::ManyDirty,
            (Outcome::Differs, _) => Input::Differs,
            (Outcome::Refused, _) => Input::Refused,
        };
        self.tell(state, side, input);
    }

    /// A question reaches the destination's process: its machine answers, or else its listener.
    fn answer(&mut self, state: &mut State) -> Fate {
        if state.destination.machine.is_none() {
            let mistaken = self.config.mutant == Some(Mutant::ForgottenMeansNever) && state.forgotten;
            return if mistaken { Fate::Never } else { state.fate() };
        }
        let before = *state;
        state.question = Question::None;
        self.tell(state, Side::Destination, Input::Asked);
        let Question::Answered(fate) = state.question else {
            unreachable!("a question is answered in the transition that hears it");
        };
        state.question = before.question;
        if self.config.mutant == Some(Mutant::NeverWithoutRevoking) && fate == Fate::Never {
            *state = before;
        }
        fate
    }

    fn ignores_the_register(&self, state: &State, side: Side) -> bool {
        let before_commit = |machine| !self.machines.source(machine).is_committed();
        match (self.config.mutant, side) {
            (Some(Mutant::ArbiterOnOneSide), Side::Destination) => true,
            (Some(Mutant::RunsOnUnclaimed), Side::Source) => state.source.machine.is_some_and(before_commit),
            _ => false,
        }
    }

    /// Gives a machine an input and carries out what it asks for.
    fn tell(&mut self, state: &mut State, side: Side, input: Input) {
        let Some(machine) = state.host(side).machine else { return };
        let input = self.mistaken(side, machine, input);
        let (machine, effects) = self.machines.tell(side, machine, input);
        state.host_mut(side).machine = Some(machine);
        state.recalls |= side == Side::Source && self.machines.source(machine).left_a_copy();
        for effect in effects.iter() {
            self.carry_out(state, side, *effect);
        }
    }

    /// What a driver with the mutant's mistake makes of an input.
    fn mistaken(&mut self, side: Side, machine: MachineId, input: Input) -> Input {
        let Some(mutant) = self.config.mutant else { return input };
        match (mutant, side, input) {
            (Mutant::ResumeOnAnyError, Side::Source, Input::Failed(_))
                if self.machines.source(machine).is_committed() =>
            {
                self.proof_that_it_never_ran()
            }
            (Mutant::UnknownTakenForNever, _, Input::Answered(Fate::Unknown)) => Input::Answered(Fate::Never),
            (Mutant::DestinationIgnoresDenied, Side::Destination, Input::Done(Work::Denied)) => {
                Input::Done(Work::Granted)
            }
            (
                Mutant::CompleteCopyRunsWhenTheSourceIsGone,
                Side::Destination,
                Input::Failed(Failure::Link),
            ) if self.machines.destination(machine).step() == mig_core::Step::Commit => {
                Input::Message(self.machines.number(Message::Commit))
            }
            _ => input,
        }
    }

    /// What the destination alone may say.
    fn proof_that_it_never_ran(&mut self) -> Input {
        let fault = mig_core::Fault::new(Side::Source, mig_core::Step::Commit, mig_core::Blame::Network, "");
        Input::Message(self.machines.number(Message::Abort(fault)))
    }

    fn carry_out(&mut self, state: &mut State, side: Side, effect: Effect) {
        match effect {
            Effect::Send(message) => {
                if matches!(self.machines.message(message), Message::Abort(_)) && side == Side::Destination {
                    state.promised = true;
                }
                // a driver that has given the connection up writes nothing; who does not listen loses it
                if state.host(side).link && state.host(peer(side)).listens() {
                    state.to_mut(peer(side)).send(message);
                }
            }
            Effect::SendRound(round) => state.pages.send(Token::RoundEnd(round)),
            Effect::MintPermit => {
                let host = state.host_mut(side);
                host.permit = true;
                // the VM does one after the other: what is told last counts
                host.work.remove(Work::Pause);
            }
            Effect::Answer(fate) => {
                state.promised |= fate == Fate::Never;
                state.question = Question::Answered(fate);
            }
            Effect::Work(Work::Query) if self.config.mutant == Some(Mutant::NeverAsks) => {}
            Effect::Work(work) => {
                state.host_mut(side).work.insert(work);
                if work == Work::Attach {
                    state.pages.send(Token::Attach);
                }
            }
            Effect::SourceEnds(end) => {
                state.source_end = Some(end);
                state.end(side);
            }
            Effect::DestinationEnds(end) => {
                state.destination_end = Some(end);
                state.end(side);
            }
        }
    }

    /// Nobody can be expected to run the guest without a word, or after one that did not see to it.
    pub(super) fn is_excused(&self, state: &State) -> bool {
        let discarded = state.source_end == Some(OutcomeKind::Discarded);
        state.is_excused() || discarded && self.config.arbiter != Arbiter::None
    }

    /// A side is in doubt, or its holder has the guest in hand.
    pub(super) fn is_held(&self, state: &State) -> bool {
        state.source.machine.is_some_and(|machine| self.machines.source(machine).is_in_doubt())
            || state
                .destination
                .machine
                .is_some_and(|machine| self.machines.destination(machine).is_in_doubt())
            || SIDES.iter().any(|side| state.holds_a_copy(*side))
    }

    /// A step in words.
    pub(super) fn tells(&self, step: Step) -> String {
        let kind = |message: MessageId| format!("{:?}", self.machines.message(message).kind());
        match step {
            Step::Hears(side, message) => format!("the {side} hears {}", kind(message)),
            Step::Arrives(Token::Attach) => "the page channel attaches".into(),
            Step::Arrives(Token::RoundEnd(round)) => format!("the pages of round {round} are all there"),
            Step::Works(side, Work::WriteCommit, Outcome::Failed) => {
                format!("the {side}'s write of Commit fails")
            }
            Step::Works(side, work, Outcome::Done) => format!("the {side} is done with {work:?}"),
            Step::Works(side, work, outcome) => format!("the {side}'s {work:?}: {outcome:?}"),
            Step::Notices(side) => format!("the {side} notices that its link is gone"),
            Step::Suspects(side) => format!("the {side} takes its link for lost"),
            Step::NoticesPages(side) => format!("the {side} notices that its page channel is gone"),
            Step::TooLate(side) => format!("the {side} has waited long enough"),
            Step::Cancels(side) => format!("the {side} is cancelled"),
            Step::Crashes(side) => format!("the {side} crashes"),
            Step::Cut(side) => format!("the link to the {side} is cut"),
            Step::CutPages => "the page channel is cut".into(),
            Step::Asks => "the source asks".into(),
            Step::Unanswered => "the source gets no answer".into(),
            Step::QuestionArrives { stray: false } => "the question arrives".into(),
            Step::QuestionArrives { stray: true } => "an old question arrives".into(),
            Step::AnswerArrives => "the source hears the answer".into(),
            Step::Recalls => "the source asks for the copy it left".into(),
            Step::Decides(side) => format!("the arbiter decides on the {side}'s claim"),
            Step::ArbiterFails(side) => format!("the {side} cannot hear the arbiter"),
            Step::Says(side, word) => format!("an operator says {word:?} to the {side}"),
            Step::Forgets => "the destination's listener forgets the session".into(),
        }
    }
}
