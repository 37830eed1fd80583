//! The right to run a guest, as a value that cannot be copied.
//!
//! Invariant: for one migration at most one [`RunPermit`] is live on both sides together. The source's
//! machine spends its own as it commits; the destination's machine mints one on Commit and never before.

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

    /// The operator's word, in place of the peer's, that nobody else runs the guest and nobody will. The
    /// only way to a permit from in doubt: two guests run if the word is wrong.
    pub fn on_the_operators_word() -> Self {
        Self::mint()
    }
}
