//! Mistakes on purpose: each must be found.

/// A mistake that a driver could make; the simulator must find each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The source resumes the guest when sending Commit fails.
    CommitFailureResumes,
    /// The source resumes the guest when the link is lost after Commit.
    InDoubtResumes,
    /// The destination runs the guest once it has loaded it, without a Commit.
    RunsOnceLoaded,
    /// The destination gives the guest up, and then still takes a Commit that was on its way.
    LateCommitTaken,
    /// The destination answers "never", and then still takes a Commit that was on its way.
    CommitTakenAfterNever,
    /// Pages are sent without being watched again.
    RearmSkipped,
    /// Pages are read, and watched again only then.
    ReadBeforeRearm,
    /// The last look at the dirty log comes before state is saved.
    SyncBeforeSave,
    /// A migration starts with the dirty pages that the one before left.
    StartKeepsOldPages,
    /// The destination takes every zero page for one it never received.
    ZeroPagesSkipped,
    /// The destination dies silently and nobody watches for it.
    NoDeadline,
    /// The destination does not ask for the digests it got to be compared.
    VerifySkipped,
    /// The dirty log stays on after a failed migration.
    TrackingLeftOn,
    /// Hot pages that were held back are not added again.
    HeldPagesForgotten,
    /// A guest that was slowed stays so.
    ThrottleLeftOn,
    /// The listener promises that the guest never ran, and does not tell the machine.
    NeverWithoutRevoking,
    /// The source takes "unknown" for "never".
    UnknownTakenForNever,
    /// The source takes silence for "never".
    SilenceTakenForNever,
    /// The destination runs the guest although the arbiter gave it to the source.
    DenialIgnored,
    /// The source does not begin its session with the arbiter.
    BeginSkipped,
    /// A source that keeps its guest leaves its copy at the destination.
    CopyNotRecalled,
    /// The destination drops a complete copy when its source goes without a word.
    HeldCopyDropped,
    /// The listener promises "never" for sessions that it does not know.
    UnknownSessionAnsweredNever,
    /// A channel sends although its link is full.
    SendsIntoFullLink,
}
