//! Mishaps that befall a side: failing actions, wishes, nonsense, and the end of its process.

use std::time::Duration;

use mig_core::destination::Event as DestinationEvent;
use mig_core::source::Event as SourceEvent;
use mig_core::{Side, Step, Word};
use mig_wire::Message;

use crate::link::Cargo;
use crate::mishap::{Blow, Mishap, Work};
use crate::network::{PATIENCE, link_from};
use crate::queue::Happening;
use crate::scenario::Operator;
use crate::verdict::Violation;
use crate::world::World;

impl World {
    /// Whether this time the action is to fail.
    pub(crate) fn work_fails(&mut self, of: Side, what: Work) -> bool {
        let fails = self.mishaps.strikes(|mishap| match mishap {
            Mishap::Fails { side, work, after } if (*side, *work) == (of, what) => Some(*after),
            _ => None,
        });
        if fails {
            self.trace(|| format!("{what:?} fails at the {of}"));
        }
        fails
    }

    /// Whether the process of a side ends before it does one thing more.
    pub(crate) fn ends_here(&mut self, of: Side) -> bool {
        let ends = self.mishaps.strikes(|mishap| match mishap {
            Mishap::CrashAfter { side, actions } if *side == of => Some(*actions),
            _ => None,
        });
        if ends {
            self.trace(|| format!("the {of} crashes between two actions"));
            self.crash(of, Blow::Crash);
        }
        ends
    }

    /// A machine may have come to a step at which its side is struck.
    pub(crate) fn strike_where_due(&mut self, of: Side) {
        let Some(now_at) = self.step(of).map(step_index) else { return };
        let due = |mishap: &Mishap| matches!(mishap, Mishap::Strike { side, step, .. } if (*side, *step) == (of, now_at));
        while let Some(Mishap::Strike { side, after, blow, .. }) = self.mishaps.take(due) {
            self.after(after, Happening::Struck(side, blow));
        }
    }

    pub(crate) fn struck(&mut self, side: Side, blow: Blow) -> Result<(), Violation> {
        match (blow, side) {
            (Blow::Cancel, Side::Source) => self.tell_source(SourceEvent::Cancelled { reason: None }),
            (Blow::Cancel, Side::Destination) => {
                self.tell_destination(DestinationEvent::Cancelled { reason: None })
            }
            (Blow::Silence, _) => {
                self.notices(side, 0, "the peer is silent");
                Ok(())
            }
            (Blow::Nonsense, Side::Source) => {
                let said = [Message::Commit, Message::Attached, Message::Ping(7)];
                let at = self.random.within(0..3) as usize;
                let message = said.into_iter().nth(at).expect("one of three");
                self.tell_source(SourceEvent::Message(message))
            }
            (Blow::Nonsense, Side::Destination) => {
                let first_chunk = u64::MAX;
                let said = [
                    Message::RoundAck { round: 0 },
                    Message::Running { resume: Duration::MAX },
                    Message::Digests { first_chunk, digests: vec![1] },
                ];
                let at = self.random.within(0..3) as usize;
                let message = said.into_iter().nth(at).expect("one of three");
                self.tell_destination(DestinationEvent::Message(message))
            }
            // the answer is nobody's
            (Blow::StrayQuestion, _) => self.asked(0),
            (Blow::Word(word), _) => {
                // in doubt only who does not care says it
                let careless = self.scenario.operator == Operator::Careless && word == Word::Resume;
                if careless || !self.is_in_doubt(side) { self.says(side, word) } else { Ok(()) }
            }
            (Blow::Cut { half_open, heals_after }, _) => {
                self.cut(side, half_open, heals_after);
                Ok(())
            }
            (Blow::Crash | Blow::PowerLoss, _) => {
                self.crash(side, blow);
                Ok(())
            }
        }
    }

    /// What was in memory is gone, also what a destination's listener remembered; the arbiter's register stays.
    fn crash(&mut self, side: Side, blow: Blow) {
        match side {
            // one that has handed the guest over may go as it likes
            Side::Source if self.source.machine.is_some() => {
                self.source.crashed = true;
                self.source.machine = None;
                self.source.epoch += 1;
                self.guest.pause(self.now);
            }
            Side::Destination if !self.destination.crashed => {
                self.destination.crashed = true;
                self.destination.machine = None;
            }
            Side::Source | Side::Destination => return,
        }
        self.permits.gone(side);
        if blow == Blow::Crash {
            self.send(link_from(side), Cargo::Closed);
        } else {
            let other = match side {
                Side::Source => Side::Destination,
                Side::Destination => Side::Source,
            };
            let delay = self.random.within(1..PATIENCE);
            self.after(delay, Happening::PeerGone(other));
        }
    }
}

/// The place of a step in the order of a migration; all rounds are one.
fn step_index(step: Step) -> usize {
    match step {
        Step::Connect => 0,
        Step::Handshake => 1,
        Step::Describe => 2,
        Step::Prepare => 3,
        Step::Attach => 4,
        Step::Track => 5,
        Step::Round(_) => 6,
        Step::Pause => 7,
        Step::Save => 8,
        Step::LastSync => 9,
        Step::LastRound => 10,
        Step::Verify => 11,
        Step::Load => 12,
        Step::Commit => 13,
        Step::Resume => 14,
    }
}
