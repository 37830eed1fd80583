//! Watching a migration.

pub use mig_core::progress::{
    Downtime, OutcomeKind, PageCounts, Progress, Report, RoundReport, Shortfall, Slowed, Verification,
};

/// Is told what happens, on the thread that drives the migration: it should return quickly.
pub trait Observer: Sync {
    /// Something happened.
    fn progress(&self, progress: &Progress);
}

/// An observer that looks away.
impl Observer for () {
    fn progress(&self, _: &Progress) {}
}
