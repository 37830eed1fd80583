//! The arbiter: a register that both sides reach, and that survives them.

use mig_core::destination::Event as DestinationEvent;
use mig_core::source::Event as SourceEvent;
use mig_core::{Claim, Side};
use mig_wire::hello::SessionId;

use crate::mutant::Mutant;
use crate::queue::Happening;
use crate::verdict::Violation;
use crate::world::World;

/// Names it.
pub(crate) const IDENTITY: [u8; 16] = [77; 16];
/// How long a claim takes on its way there, and on its way back: at most this, in nanoseconds.
const WAY: u64 = 2_000_000;

/// What is durable of it: the session that can be claimed, and to whom it was given.
#[derive(Debug, Clone, Default)]
pub(crate) struct Register {
    session: Option<SessionId>,
    given: Option<Side>,
}

impl Register {
    /// A new session, given to nobody; every older one is forgotten.
    pub(crate) fn begin(&mut self, session: SessionId) {
        (self.session, self.given) = (Some(session), None);
    }

    /// Decides once.
    pub(crate) fn claim(&mut self, session: &SessionId, side: Side) -> bool {
        self.session.as_ref() == Some(session) && *self.given.get_or_insert(side) == side
    }

    /// Whom the session was given to.
    pub(crate) fn given(&self) -> Option<Side> {
        self.given
    }
}

impl World {
    /// A side asks; one that waits for the answer does nothing else.
    pub(crate) fn claim(&mut self, side: Side) -> Result<(), Violation> {
        let claiming = match side {
            Side::Source => &mut self.source.claiming,
            Side::Destination => &mut self.destination.claiming,
        };
        if self.register.is_none() || std::mem::replace(claiming, true) {
            return Err(Violation::AsksTwice { side, what: "the arbiter, or one that there is not" });
        }
        let delay = self.random.within(1..WAY);
        self.after(delay, Happening::Claims(side));
        Ok(())
    }

    /// The claim is there: it is decided, or the arbiter cannot be asked. Who asked may be gone by now.
    pub(crate) fn claims(&mut self, side: Side) {
        let Some(register) = &mut self.register else { return };
        let session = &self.session;
        let claim = match self.mishaps.arbiter_is_down() {
            Some(decides) => {
                if decides {
                    register.claim(session, side);
                }
                Claim::Unavailable("it was made so".into())
            }
            None if register.claim(session, side) => Claim::Granted,
            None if side == Side::Destination && self.scenario.is(Mutant::DenialIgnored) => Claim::Granted,
            None => Claim::Denied,
        };
        self.trace(|| format!("the arbiter to the {side}: {claim:?}"));
        let delay = self.random.within(1..WAY);
        match side {
            Side::Source => self.after(delay, Happening::Source(SourceEvent::Claimed(claim))),
            Side::Destination => self.after(delay, Happening::Destination(DestinationEvent::Claimed(claim))),
        }
    }
}
