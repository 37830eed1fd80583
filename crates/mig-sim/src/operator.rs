//! The operator: sees that a side is in doubt, and after a while says a word, true or careless.

use mig_core::destination::Event as DestinationEvent;
use mig_core::source::Event as SourceEvent;
use mig_core::{Side, Word};

use crate::queue::Happening;
use crate::scenario::Operator;
use crate::verdict::Violation;
use crate::world::World;

/// Nanoseconds between two looks: at most this, for one who is at hand and for another.
const BETWEEN_LOOKS: [u64; 2] = [5_000_000, 1_000_000_000];
/// He does not look more often.
const MOST_LOOKS: u32 = 12;

impl World {
    /// A side may have come to be in doubt.
    pub(crate) fn call_operator(&mut self) {
        let doubts = [Side::Source, Side::Destination].map(|side| self.is_in_doubt(side));
        self.doubted = [self.doubted[0] || doubts[0], self.doubted[1] || doubts[1]];
        let in_doubt = doubts.contains(&true);
        let looks = self.scenario.operator != Operator::Absent && self.looks < MOST_LOOKS;
        if in_doubt && looks && !self.operator_called {
            self.operator_called = true;
            let most = self.random.one_of(&BETWEEN_LOOKS);
            let delay = self.random.within(1..most);
            self.after(delay, Happening::OperatorLooks);
        }
    }

    pub(crate) fn is_in_doubt(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source.machine.as_ref().is_some_and(|machine| machine.is_in_doubt()),
            Side::Destination => {
                self.destination.machine.as_ref().is_some_and(|machine| machine.is_in_doubt())
            }
        }
    }

    pub(crate) fn operator_looks(&mut self) -> Result<(), Violation> {
        self.operator_called = false;
        self.looks += 1;
        if let Some((side, word)) = self.what_he_says() {
            self.says(side, word)?;
        }
        self.call_operator();
        Ok(())
    }

    fn what_he_says(&mut self) -> Option<(Side, Word)> {
        let doubts = [Side::Source, Side::Destination].map(|side| self.is_in_doubt(side));
        if self.scenario.operator == Operator::Careless {
            let side = self.random.one_of(&[Side::Source, Side::Destination]);
            return Some((side, Word::Resume));
        }
        match doubts {
            // to break the tie: the copy that is dropped first is the one that nobody asks for
            [true, true] => Some((Side::Destination, Word::Discard)),
            [true, false] if self.permits.run_at(Side::Destination) => Some((Side::Source, Word::Discard)),
            [true, false] if self.never_again(Side::Destination) => Some((Side::Source, Word::Resume)),
            [false, true] if self.never_again(Side::Source) && !self.source.ran_again => {
                Some((Side::Destination, Word::Resume))
            }
            [false, true] if self.source.machine.is_none() => Some((Side::Destination, Word::Discard)),
            _ => None,
        }
    }

    /// Whether the guest does not run at a side, and never will.
    fn never_again(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source.crashed || self.source.resume_failed,
            Side::Destination => self.destination.crashed || self.destination.machine.is_none(),
        }
    }

    pub(crate) fn says(&mut self, side: Side, word: Word) -> Result<(), Violation> {
        self.trace(|| format!("an operator at the {side}: {word:?}"));
        match side {
            Side::Source => {
                self.source.word |= self.is_in_doubt(side);
                self.tell_source(SourceEvent::Resolve(word))
            }
            Side::Destination => {
                self.destination.word |= self.is_in_doubt(side);
                self.tell_destination(DestinationEvent::Resolve(word))
            }
        }
    }
}
