//! A source in doubt asks, each question on a connection of its own, with patience of its own; and so does one
//! that has ended with its guest, for the copy that it left at the destination.

use std::time::Duration;

use mig_core::source::Event;
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::frame::Fate;
use mig_wire::hello::Query;

use crate::destination::SECRET;
use crate::mutant::Mutant;
use crate::network::{PATIENCE, through_the_wire};
use crate::queue::Happening;
use crate::verdict::Violation;
use crate::world::World;

/// Nobody watches longer than so many questions: with their waits they outlast every outage that ends.
const MOST_QUESTIONS: u64 = 30;
/// A copy that its destination does not know of is not asked for more often: it is never going to be ready.
const MOST_UNKNOWN: u32 = 5;
/// Nanoseconds before a copy is asked for, again.
const RECALL_WAIT: u64 = 250_000_000;

impl World {
    /// The guest stays, and a copy of it may wait to be asked for: nobody waits for that, here.
    pub(super) fn recall(&mut self) {
        self.source.recalling = !self.scenario.is(Mutant::CopyNotRecalled);
        // what the machine asked before has an end with it
        self.source.question = None;
        self.recalls_again();
    }

    fn recalls_again(&mut self) {
        if self.source.recalling && self.source.questions <= MOST_QUESTIONS {
            self.source.questions += 1;
            self.source.question = Some(self.source.questions);
            self.after(RECALL_WAIT, Happening::Asks(self.source.questions));
        }
    }

    /// The machine wants to ask, in a while.
    pub(super) fn query(&mut self, after: Duration) -> Result<(), Violation> {
        if self.source.question.is_some() {
            return Err(Violation::AsksTwice { side: Side::Source, what: "the destination" });
        }
        self.source.questions += 1;
        let number = self.source.questions;
        self.source.question = Some(number);
        if number <= MOST_QUESTIONS {
            self.after(after.as_nanos() as u64 + 1, Happening::Asks(number));
        }
        Ok(())
    }

    /// It asks, and waits so long.
    pub(crate) fn asks(&mut self, number: u64) -> Result<(), Violation> {
        if let Some(machine) = &self.source.machine {
            let query = Query { session: machine.session(), secret: machine.secret() };
            if (query.session, query.secret) != (self.session, SECRET) {
                return Err(Violation::Wire(format!("asks with {query:?}")));
            }
            through_the_wire(&Message::Query(query), 0)?;
        } else if !self.source.recalling {
            return Ok(());
        }
        let way = self.way();
        self.after(way, Happening::Asked(number));
        self.after(PATIENCE, Happening::Unanswered(number));
        Ok(())
    }

    /// How long a question or an answer is on its way: now and then longer than anybody waits.
    pub(crate) fn way(&mut self) -> u64 {
        let late = if self.random.chance(10) { self.random.within(1..2 * PATIENCE) } else { 0 };
        self.scenario.speed.latency + late
    }

    /// An answer arrives: one that nobody waits for any more meets a closed connection.
    pub(crate) fn answered(&mut self, number: u64, fate: Fate) -> Result<(), Violation> {
        through_the_wire(&Message::Outcome(fate), 0)?;
        if self.source.question != Some(number) {
            return Ok(());
        }
        self.source.question = None;
        if self.source.recalling {
            self.source.unknown_there += 1;
            self.source.recalling = fate == Fate::Unknown && self.source.unknown_there < MOST_UNKNOWN;
            self.recalls_again();
            return Ok(());
        }
        let mutated = fate == Fate::Unknown && self.scenario.is(Mutant::UnknownTakenForNever);
        self.tell_source(Event::Answered(if mutated { Fate::Never } else { fate }))
    }

    pub(crate) fn unanswered(&mut self, number: u64) -> Result<(), Violation> {
        if self.source.question != Some(number) {
            return Ok(());
        }
        self.source.question = None;
        if self.source.recalling {
            self.recalls_again();
            return Ok(());
        }
        if self.scenario.is(Mutant::SilenceTakenForNever) {
            return self.tell_source(Event::Answered(Fate::Never));
        }
        let fault = Fault::new(Side::Source, Step::Commit, Blame::Network, "it was not answered in time");
        self.tell_source(Event::Unanswered(fault))
    }
}
