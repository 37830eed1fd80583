//! The source's driver.

use mig_core::{RunPermit, policy::Policy, progress::Report};

use crate::cancel::Cancel;
use crate::guest::{BoxError, SourceVm};
use crate::observe::Observer;
use crate::transport::Address;

/// How to migrate.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// When to stop sending rounds.
    pub policy: Policy,
    /// Page channels; 1 to 64.
    pub channels: u16,
    /// Compare digests of all memory before the guest is committed.
    pub verify: bool,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { policy: Policy::default(), channels: 2, verify: false }
    }
}

/// How a migration ended, with the guest where it is to be found here.
#[must_use]
pub enum Outcome<V> {
    /// It runs on the destination; here it is gone.
    Moved(Report),
    /// It runs here; the report's `fault` says why.
    StillHere {
        /// The guest, running (unless resuming it is what failed).
        vm: V,
        /// How it went.
        report: Report,
    },
    /// Nobody here knows whether the destination runs it.
    InDoubt(InDoubt<V>),
}

/// A paused guest that may or may not run elsewhere.
#[must_use]
pub struct InDoubt<V> {
    vm: V,
    report: Report,
}

impl<V: SourceVm> InDoubt<V> {
    /// How it came to this.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The operator's word that the destination does not and will not run the guest: runs it here.
    ///
    /// # Errors
    /// The guest could not be resumed.
    pub fn resume(self) -> Result<V, BoxError> {
        let Self { mut vm, .. } = self;
        vm.resume(todo_permit())?;
        Ok(vm)
    }

    /// The operator's word that the destination runs the guest: ends it here.
    pub fn discard(self) {}
}

fn todo_permit() -> RunPermit {
    unreachable!()
}

/// Moves a running guest to the receiver at `to`.
pub fn migrate<V: SourceVm>(
    vm: V,
    to: &Address,
    options: &SourceOptions,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Outcome<V> {
    let _ = (vm, to, options, cancel, observer);
    unreachable!()
}
