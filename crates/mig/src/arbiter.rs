//! Who may run the guest, decided outside both sides, for when they cannot hear each other.
//!
//! Between two sides and a link that may fail there is no rule by which a lone side can know that the other
//! does not run the guest. A third party that both can reach decides it: the storage that they share, an
//! orchestrator, a lock service. It is asked once a session by whoever needs to know, and what it said to the
//! first it holds to.

mod lease;

pub use lease::{LeaseError, LeaseFile};
pub use mig_wire::hello::SessionId;

use mig_core::{Claim, Side};

use crate::guest::BoxError;

/// Decides for each session which side may run the guest.
///
/// What the engine's promise rests on, and an implementation must keep whatever crashes and whenever:
/// - for one session `claim` answers true to one side only, for ever;
/// - it answers true only after that is as durable as the register is: no later crash takes it back;
/// - a session that was never begun, or after which another was, is given to nobody any more.
///
/// Both sides must be given the very same register; they compare [`Arbiter::identity`] before a page moves.
/// A register serves one guest, and goes with it from host to host. The calls are made from threads of the
/// engine's and may block; an implementation bounds that to some seconds, since a guest may be waiting.
pub trait Arbiter: Send + Sync {
    /// Names the register: equal where two arbiters are one, and for nothing else.
    fn identity(&self) -> [u8; 16];

    /// Makes `session` the one that can be claimed, given to nobody yet; every older one is forgotten. The
    /// source's, before it sends anything. Sessions are random and begun once.
    ///
    /// # Errors
    /// It is not begun for sure: the migration ends, and the guest stays.
    fn begin(&self, session: &SessionId) -> Result<(), BoxError>;

    /// Asks for the guest on behalf of `side`. True: that side has it, by this answer or by an earlier one,
    /// and the other never will. False: not this side; the other has asked before, or the session is over.
    ///
    /// # Errors
    /// Nothing is known: it may have been given to this side or not. Asking again is allowed, and tells.
    fn claim(&self, session: &SessionId, side: Side) -> Result<bool, BoxError>;
}

/// What the machines are told of an arbiter's answer.
pub(crate) fn claim(arbiter: &dyn Arbiter, session: &SessionId, side: Side) -> Claim {
    match arbiter.claim(session, side) {
        Ok(true) => Claim::Granted,
        Ok(false) => Claim::Denied,
        Err(error) => Claim::Unavailable(why(&error)),
    }
}

/// An arbiter's error with all its causes.
pub(crate) fn why(error: &BoxError) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_lease_is_told_to_the_last_cause() {
        let directory = tempfile::tempdir().unwrap();
        let lease = LeaseFile::open(directory.path().join("lease")).unwrap();
        std::fs::remove_file(lease.path()).unwrap();
        let Claim::Unavailable(why) = claim(&lease, &[1; 16], Side::Source) else { panic!("it is gone") };
        assert!(why.contains("lease") && why.contains("No such file"), "{why}");
    }
}
