//! Questions of a source in doubt. Each has a thread that nobody waits for: an operator's word must not wait
//! for a host that does not answer, or for storage that hangs.

use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use mig_core::source::wait_after;
use mig_core::{Claim, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::frame::Fate;
use mig_wire::hello::{Query, session_tag};

use super::{Driver, Note};
use crate::arbiter;
use crate::guest::SourceVm;
use crate::link::{ReadError, SILENCE_DEADLINE, read_message};
use crate::transport::{self, Address};

impl<'s, 'e: 's, V: SourceVm> Driver<'s, 'e, V> {
    /// Asks the destination what became of the session, in a while.
    pub(super) fn query(&self, after: Duration) {
        let query = self.question();
        let (to, note, over) = (self.to.clone(), self.note.clone(), self.questions.1.clone());
        std::thread::spawn(move || {
            if over.recv_timeout(after) == Err(RecvTimeoutError::Timeout) {
                // a migration that has ended does not want to know
                let _ = note.send(Note::Answered(ask(&to, query)));
            }
        });
    }

    /// What became of this session?
    pub(super) fn question(&self) -> Query {
        Query { session: self.session, secret: self.machine().secret() }
    }

    /// Asks the arbiter for the guest.
    pub(super) fn claim(&self) {
        let Some(arbiter) = self.options.arbiter.clone() else { return };
        let (session, note) = (self.session, self.note.clone());
        std::thread::spawn(move || {
            let claim: Claim = arbiter::claim(&arbiter, &session, Side::Source);
            let _ = note.send(Note::Claimed(claim));
        });
    }
}

/// How long a copy that was left at the destination is asked for while nobody answers.
const RECALL_PATIENCE: Duration = Duration::from_secs(600);
/// And while the receiver does not know of it: it may be about to be ready, or was started anew.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(30);

/// Asks for the copy of a guest that goes on here, until the destination has answered and so given it up. Nobody
/// waits for that: the migration has ended.
pub(super) fn recall(to: Address, query: Query) {
    let began = Instant::now();
    std::thread::spawn(move || {
        for asked in 1.. {
            let patience = match ask(&to, query.clone()) {
                Ok(Fate::Never | Fate::Running { .. } | Fate::Lost) => return,
                Ok(Fate::Unknown) => UNKNOWN_PATIENCE,
                Err(_) => RECALL_PATIENCE,
            };
            if began.elapsed() > patience {
                return;
            }
            std::thread::sleep(wait_after(asked));
        }
    });
}

fn ask(to: &Address, query: Query) -> Result<Fate, Fault> {
    let tag = session_tag(&query.session);
    let fault = |e: ReadError| e.fault(Side::Source, Step::Commit);
    let stream = transport::connect(to).map_err(|f| Fault { step: Step::Commit, ..f })?;
    for set in
        [stream.set_read_deadline(Some(SILENCE_DEADLINE)), stream.set_write_deadline(Some(SILENCE_DEADLINE))]
    {
        set.map_err(|e| fault(e.into()))?;
    }
    let frame = Message::Query(query).encode(0, tag).map_err(|e| fault(ReadError::Wire(e)))?;
    stream.write_all(&frame).map_err(|e| fault(e.into()))?;
    match read_message(&stream).map_err(fault)? {
        (header, Message::Outcome(fate)) if header.session == tag => Ok(fate),
        _ => Err(fault(ReadError::Order("a query was answered with something else"))),
    }
}
