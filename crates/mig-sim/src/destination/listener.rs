//! The listener of the destination's process: it answers questions while a receive goes on and after it.

use std::time::Duration;

use mig_core::destination::{End, Event};
use mig_wire::frame::Fate;

use crate::mishap::Mishap;
use crate::mutant::Mutant;
use crate::queue::Happening;
use crate::verdict::Violation;
use crate::world::World;

impl World {
    /// A question arrives.
    pub(crate) fn asked(&mut self, number: u64) -> Result<(), Violation> {
        if self.question_is_lost() {
            return Ok(());
        }
        if self.destination.crashed {
            if self.scenario.restarts {
                // it listens again, and knows nothing
                self.answers(number, self.unknown_session());
            }
            return Ok(());
        }
        if !self.destination.was_ready {
            self.answers(number, self.unknown_session());
            return Ok(());
        }
        if self.destination.machine.is_some() && !self.scenario.is(Mutant::NeverWithoutRevoking) {
            self.destination.asker = Some(number);
            self.tell_destination(Event::Query)?;
            return match self.destination.asker.take() {
                // its process ended before it could answer
                Some(_) if self.destination.crashed => Ok(()),
                Some(_) => Err(Violation::Ends("a question was not answered".into())),
                None => Ok(()),
            };
        }
        let fate = self.known_fate();
        self.answers(number, fate);
        Ok(())
    }

    /// What is remembered of the session.
    fn known_fate(&self) -> Fate {
        match &self.destination.end {
            Some(End::NotReceived(_)) if self.scenario.is(Mutant::HeldCopyDropped) => self.unknown_session(),
            Some(End::NotReceived(_)) => Fate::Never,
            Some(End::Running(received)) => {
                let running_for = self.now - self.destination.resume_taken_at.unwrap_or(self.now);
                Fate::Running { resume: received.resume, running_for: Duration::from_nanos(running_for) }
            }
            Some(End::Lost(_)) => Fate::Lost,
            None if self.scenario.is(Mutant::NeverWithoutRevoking) => Fate::Never,
            None => self.unknown_session(),
        }
    }

    fn unknown_session(&self) -> Fate {
        if self.scenario.is(Mutant::UnknownSessionAnsweredNever) { Fate::Never } else { Fate::Unknown }
    }

    /// An answer is sent.
    pub(super) fn answers(&mut self, number: u64, fate: Fate) {
        self.trace(|| format!("the listener answers {fate:?}"));
        if !self.question_is_lost() {
            let way = self.way();
            self.after(way, Happening::Answered(number, fate));
        }
    }

    fn question_is_lost(&mut self) -> bool {
        self.mishaps.strikes(|mishap| match mishap {
            Mishap::LosesQuestion { after } => Some(*after),
            _ => None,
        })
    }
}
