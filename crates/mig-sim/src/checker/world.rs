//! What can happen in a state of the checked world, and what comes of it.
//!
//! Nothing is budgeted where the machines themselves bound it: any message may be late or lost, any work may
//! fail, either side may be cancelled, may give up on its peer or may crash, all of it in every state and in
//! any combination. What a side sends travels in order; a direction that is cut delivers what had arrived by
//! then, for ever nothing after it, and neither side is told.

use mig_core::Side;
use mig_core::progress::OutcomeKind;
use mig_wire::Message;

use super::machines::{DestinationEnd, Effect, Failure, Input, Machines, MessageId, Work};
use super::search::Model;
use super::state::{State, Token, peer};
use super::{Config, Mutant, Property};

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
        Property::broken_by(state)
    }

    fn class(&self, step: &Step) -> Option<u8> {
        match step {
            Step::Hears(..) | Step::Arrives(_) | Step::Notices(_) => Some(NATURAL),
            Step::Works(_, _, Outcome::Done) => Some(NATURAL),
            // that is not a fault where nobody is there to attach to
            Step::Works(_, Work::Attach, Outcome::Failed) => Some(NATURAL),
            Step::NoticesPages(_) => Some(NATURAL),
            Step::Works(..)
            | Step::Suspects(_)
            | Step::TooLate(_)
            | Step::Cancels(_)
            | Step::Crashes(_)
            | Step::Cut(_)
            | Step::CutPages => None,
        }
    }
}

impl World {
    /// What can happen to a side.
    fn possible(&self, state: &State, side: Side, possible: &mut Vec<Step>) {
        let host = state.host(side);
        if host.alive {
            possible.push(Step::Crashes(side));
        }
        if !state.to(side).cut && (state.source.link || state.destination.link) {
            possible.push(Step::Cut(side));
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
            let outcomes: &[Outcome] = match work {
                Work::Attach if state.attached => &[Outcome::Done, Outcome::Failed],
                Work::Attach => &[Outcome::Failed],
                Work::Sync if self.config.more_rounds => {
                    &[Outcome::Done, Outcome::ManyDirty, Outcome::Failed]
                }
                Work::Verify => &[Outcome::Done, Outcome::Differs, Outcome::Failed],
                Work::Prepare => &[Outcome::Done, Outcome::Refused, Outcome::Failed],
                Work::FindGap => &[Outcome::Done],
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
        }
    }

    fn work(&mut self, state: &mut State, side: Side, work: Work, outcome: Outcome) {
        let host = state.host_mut(side);
        host.work.remove(work);
        if (work, outcome) == (Work::Resume, Outcome::Failed) {
            host.permit = false;
            host.resume_failed = true;
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

    /// Gives a machine an input and carries out what it asks for.
    fn tell(&mut self, state: &mut State, side: Side, input: Input) {
        let Some(machine) = state.host(side).machine else { return };
        let input = self.mistaken(side, machine, input);
        let (machine, effects) = self.machines.tell(side, machine, input);
        state.host_mut(side).machine = Some(machine);
        for effect in effects.iter() {
            self.carry_out(state, side, *effect);
        }
    }

    /// What a driver with the mutant's mistake makes of an input.
    fn mistaken(&mut self, side: Side, machine: u32, input: Input) -> Input {
        match (self.config.mutant, side, input) {
            (Some(Mutant::ResumeOnAnyError), Side::Source, Input::Failed(_))
                if self.machines.source(machine).is_committed() =>
            {
                self.proof_that_it_never_ran()
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
            Effect::SpendPermit => state.source.permit = false,
            Effect::MintPermit => state.host_mut(side).permit = true,
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
        }
    }
}

impl Property {
    fn broken_by(state: &State) -> Option<Self> {
        let moved = state.source_end == Some(OutcomeKind::Moved);
        let stays = state.source_end == Some(OutcomeKind::StillHere);
        let broken = [
            (Self::TwoRun, state.runners() > 1),
            (Self::PromiseBroken, state.promised && state.destination.permit),
            (Self::EndsDoNotFit, moved && state.destination_end == Some(DestinationEnd::NotReceived)),
            (
                Self::EndsDoNotFit,
                stays && state.source.alive && !state.source.permit && !state.source.resume_failed,
            ),
            (
                Self::NobodyRuns,
                state.all_over() && state.both_live() && state.runners() == 0 && !state.excused(),
            ),
        ];
        broken.into_iter().find(|(_, broken)| *broken).map(|(property, _)| property)
    }
}

impl State {
    /// Nobody can be expected to run the guest: a resume failed, or in doubt was taken for an end.
    pub(super) fn excused(&self) -> bool {
        self.source.resume_failed
            || self.destination.resume_failed
            || self.source_end == Some(OutcomeKind::InDoubt)
    }
}
