//! What must hold in every state, and what must be reachable from it.

use mig_core::progress::OutcomeKind;

use super::machines::DestinationEnd;
use super::state::State;
use super::world::{SIDES, World};
use super::{Arbiter, Property};

impl Property {
    /// The property that a state breaks by what it is.
    pub(super) fn broken_by(state: &State, excused: bool) -> Option<Self> {
        let (source, destination) = (&state.source, &state.destination);
        let moved = state.source_end == Some(OutcomeKind::Moved);
        let stays = state.source_end == Some(OutcomeKind::StillHere);
        let received = state.destination_end == Some(DestinationEnd::Running);
        let broken = [
            (Self::TwoRun, state.runners() > 1),
            (Self::PromiseBroken, state.promised && destination.permit),
            (Self::EndsDoNotFit, moved && state.destination_end == Some(DestinationEnd::NotReceived)),
            (Self::EndsDoNotFit, stays && source.alive && !source.permit && !source.resume_failed),
            (Self::EndsDoNotFit, received && destination.alive && !destination.permit),
            (Self::NobodyRuns, state.all_over() && state.both_live() && state.runners() == 0 && !excused),
        ];
        broken.into_iter().find(|(_, broken)| *broken).map(|(property, _)| property)
    }
}

impl State {
    /// All is well, for ever.
    pub(super) fn is_settled(&self) -> bool {
        self.all_over() && self.runners() == 1
    }

    /// Nobody can be expected to run the guest without an operator's word: a process died, a resume failed, or the
    /// listener has forgotten what it is asked for.
    pub(super) fn is_excused(&self) -> bool {
        !self.both_live() || self.source.resume_failed || self.destination.resume_failed || self.forgotten
    }
}

impl World {
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
}
