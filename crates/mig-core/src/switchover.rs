//! The right to run a guest, as a value that cannot be copied, and the words that may give it back.
//!
//! Invariant: for one migration at most one [`RunPermit`] is live on both sides together. The source's
//! machine spends its own as it commits; the destination's machine mints one on Commit and never before.
//! After Commit the source's machine mints another one only on the destination's promise that it never ran
//! the guest and never will, on the arbiter's grant, or on an operator's word.

/// The right to run the guest's vCPUs. Resuming consumes it, and so does committing.
///
/// Neither `Clone` nor constructible outside this crate: who holds one was given it by a machine's
/// transition, or to whom an operator gave his word.
#[derive(Debug)]
#[must_use = "a permit that is dropped is a guest that nobody runs"]
pub struct RunPermit {
    _made_here: (),
}

impl RunPermit {
    pub(crate) fn mint() -> Self {
        Self { _made_here: () }
    }

    /// The operator's word, in place of the peer's, that nobody else runs the guest and nobody will. For a
    /// guest that no machine holds any more: two guests run if the word is wrong.
    pub fn on_the_operators_word() -> Self {
        Self::mint()
    }
}

/// Names an arbiter: both sides must use the same one.
pub type ArbiterId = [u8; 16];

/// The section of a description that carries the source's [`ArbiterId`].
pub(crate) const ARBITER_SECTION: &str = "mig.arbiter";

/// What an arbiter answers to a side that wants to run the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Claim {
    /// This side may, and the other side will be denied for ever.
    Granted,
    /// The other side may, or the session is over.
    Denied,
    /// It could not be asked, for this reason.
    Unavailable(String),
}

/// An operator's word on a guest in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Word {
    /// The other side does not run it and never will: run it here.
    Resume,
    /// The other side runs it: drop it here.
    Discard,
}
