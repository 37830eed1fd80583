//! The model of the checked world, and what comes of each step.
//!
//! What a side sends travels in order; a direction that is cut delivers what had arrived by then, for ever
//! nothing after it, and neither side is told. What a machine asks for is noted and done later, in any order.

use mig_core::Side;
use mig_core::switchover::Word;
use mig_wire::Message;
use mig_wire::frame::Fate;

use super::machines::{Effect, Failure, Input, MachineId, Machines, Work};
use super::search::Model;
use super::state::{Question, State, Token, peer};
use super::step::{Outcome, Step};
use super::{Arbiter, Config, Mutant, Property};

/// The model.
pub(super) struct World {
    pub(super) config: Config,
    pub(super) machines: Machines,
}

pub(super) const SIDES: [Side; 2] = [Side::Source, Side::Destination];

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
        for step in self.possible(state) {
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
        step.class()
    }
}

impl World {
    pub(super) fn new(config: Config) -> Self {
        let machines = Machines::new(config.verify, config.arbiter != Arbiter::None);
        Self { config, machines }
    }

    pub(super) fn take(&mut self, state: &mut State, step: Step) {
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
}
