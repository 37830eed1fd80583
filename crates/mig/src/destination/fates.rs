//! What became of the sessions that were as far as Ready: the answers to sources that lost their link.
//!
//! Invariant: a session is found only by who knows its secret. One that is not found is unknown, which
//! promises nothing. Bounded: the oldest is forgotten first.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mig_wire::frame::Fate;
use mig_wire::hello::Query;
use subtle::ConstantTimeEq;

/// How many sessions are remembered.
const MAX_SESSIONS: usize = 64;

/// What is known of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Its receive goes on, and answers for it.
    Open,
    /// The guest never ran here, and never will.
    Never,
    /// It runs here.
    Running {
        /// Time spent resuming it.
        resume: Duration,
        /// When that was done.
        at: Instant,
    },
    /// It could not be started.
    Lost,
}

impl Known {
    /// The answer, unless the receive has it.
    pub(super) fn fate(self) -> Option<Fate> {
        match self {
            Self::Open => None,
            Self::Never => Some(Fate::Never),
            Self::Running { resume, at } => Some(Fate::Running { resume, running_for: at.elapsed() }),
            Self::Lost => Some(Fate::Lost),
        }
    }
}

/// The sessions, oldest first.
#[derive(Debug, Default)]
pub(super) struct Fates {
    sessions: VecDeque<(Query, Known)>,
}

impl Fates {
    /// Notes what is known of a session.
    pub(super) fn note(&mut self, session: &Query, known: Known) {
        match self.sessions.iter_mut().find(|(noted, _)| same(noted, session)) {
            Some((_, before)) => *before = known,
            None => {
                if self.sessions.len() == MAX_SESSIONS {
                    self.sessions.pop_front();
                }
                self.sessions.push_back((session.clone(), known));
            }
        }
    }

    /// What is known of the session, to who knows its secret.
    pub(super) fn find(&self, query: &Query) -> Option<Known> {
        self.sessions.iter().find(|(noted, _)| same(noted, query)).map(|(_, known)| *known)
    }
}

/// Compared in constant time: an answer's delay must not tell how much of a secret was right.
pub(super) fn same(one: &Query, other: &Query) -> bool {
    one.session == other.session && bool::from(one.secret.ct_eq(&other.secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(session: u8, secret: u8) -> Query {
        Query { session: [session; 16], secret: [secret; 16] }
    }

    #[test]
    fn a_session_is_found_with_its_secret_only_and_a_rogue_of_the_same_name_changes_nothing() {
        let mut fates = Fates::default();
        fates.note(&query(1, 1), Known::Open);
        fates.note(&query(1, 1), Known::Lost);
        fates.note(&query(1, 2), Known::Never);
        assert_eq!(fates.find(&query(1, 1)), Some(Known::Lost));
        assert_eq!(fates.find(&query(1, 2)), Some(Known::Never));
        assert_eq!(fates.find(&query(1, 3)), None);
        assert_eq!(fates.find(&query(2, 1)), None);
    }

    #[test]
    fn the_oldest_is_forgotten_and_then_unknown() {
        let mut fates = Fates::default();
        for session in 0..=MAX_SESSIONS as u8 {
            fates.note(&query(session, 0), Known::Never);
        }
        assert_eq!(fates.find(&query(0, 0)), None);
        assert_eq!(fates.find(&query(1, 0)), Some(Known::Never));
        assert_eq!(fates.sessions.len(), MAX_SESSIONS);
    }
}
