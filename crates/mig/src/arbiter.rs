//! Who may run the guest, decided outside both sides, for when they cannot hear each other.
//!
//! Between two sides and a link that may fail there is no rule by which a lone side can know that the other
//! does not run the guest. A third party that both can reach decides it: the storage that they share, an
//! orchestrator, a lock service. It is asked once a session by whoever needs to know, and what it said to the
//! first it holds to.

mod lease;

pub use lease::{LeaseError, LeaseFile};
pub use mig_wire::hello::SessionId;

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{self, RecvTimeoutError};
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
/// engine's and may block; an implementation bounds that to some seconds, since a guest may be waiting. A claim
/// without an answer after 10 s counts as one that could not be asked.
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

/// How long an answer is waited for: longer than a lease file's own patience with its lock.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the machines are told of an arbiter's answer. One that does not come cannot be waited for: a question to
/// the other side, or an operator's word, may stand behind it.
pub(crate) fn claim(arbiter: &Arc<dyn Arbiter>, session: &SessionId, side: Side) -> Claim {
    claim_within(PATIENCE, arbiter, session, side)
}

fn claim_within(patience: Duration, arbiter: &Arc<dyn Arbiter>, session: &SessionId, side: Side) -> Claim {
    let (answer, answered) = channel::bounded(1);
    let (asking, session) = (arbiter.clone(), *session);
    // outlives this call where storage hangs; what it is granted then, a later claim is told
    std::thread::spawn(move || answer.send(asking.claim(&session, side)));
    match answered.recv_timeout(patience) {
        Ok(Ok(true)) => Claim::Granted,
        Ok(Ok(false)) => Claim::Denied,
        Ok(Err(error)) => Claim::Unavailable(why(&error)),
        Err(RecvTimeoutError::Timeout) => {
            Claim::Unavailable(format!("no answer within {:.0} s", patience.as_secs_f64()))
        }
        Err(RecvTimeoutError::Disconnected) => Claim::Unavailable("it panicked".into()),
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
        let lease: Arc<dyn Arbiter> = Arc::new(lease);
        let Claim::Unavailable(why) = claim(&lease, &[1; 16], Side::Source) else { panic!("it is gone") };
        assert!(why.contains("lease") && why.contains("No such file"), "{why}");
    }

    /// Storage that hangs in the first claim until it is let go, and then grants it.
    struct Hanging(channel::Receiver<()>);

    impl Arbiter for Hanging {
        fn identity(&self) -> [u8; 16] {
            [1; 16]
        }

        fn begin(&self, _: &SessionId) -> Result<(), BoxError> {
            Ok(())
        }

        fn claim(&self, _: &SessionId, _: Side) -> Result<bool, BoxError> {
            let _ = self.0.recv();
            Ok(true)
        }
    }

    #[test]
    fn storage_that_hangs_is_not_waited_for_and_is_asked_again() {
        let (let_go, held) = channel::bounded::<()>(0);
        let hanging: Arc<dyn Arbiter> = Arc::new(Hanging(held));
        let impatient = Duration::from_millis(20);
        let first = claim_within(impatient, &hanging, &[1; 16], Side::Source);
        assert!(matches!(first, Claim::Unavailable(why) if why.contains("no answer within")));
        drop(let_go);
        assert_eq!(claim_within(PATIENCE, &hanging, &[1; 16], Side::Source), Claim::Granted);
    }
}
