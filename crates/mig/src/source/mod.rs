//! Moving a guest away: [`migrate`].

mod driver;
mod plan;
mod worker;

use mig_core::policy::Policy;
use mig_core::progress::{OutcomeKind, Report};
use mig_core::{Blame, Fault, RunPermit, Side, Step};

use crate::cancel::Cancel;
use crate::guest::{BoxError, SourceVm};
use crate::observe::Observer;
use crate::transport::Address;

pub(crate) use plan::channel_of;

/// How to migrate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceOptions {
    /// When to stop sending rounds.
    pub policy: Policy,
    /// Page channels; 1 to [`mig_wire::hello::MAX_CHANNELS`].
    pub channels: u16,
    /// Compare digests of all memory before the guest is committed. Both sides read all of it in the pause.
    pub verify: bool,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { policy: Policy::default(), channels: 2, verify: false }
    }
}

/// How a migration ended, with the guest where it is to be found here.
#[derive(Debug)]
#[must_use]
pub enum Outcome<V> {
    /// It runs on the destination; here it is gone.
    Moved(Report),
    /// It runs here; the report's `fault` says why.
    StillHere {
        /// The guest: running, unless resuming it is what failed ([`Step::Resume`]).
        vm: V,
        /// How it went.
        report: Report,
    },
    /// Nobody here knows whether the destination runs it.
    InDoubt(InDoubt<V>),
}

/// A paused guest that may or may not run elsewhere.
#[derive(Debug)]
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
    /// The guest could not be resumed; it comes back with the reason.
    pub fn resume(mut self) -> Result<V, Box<(Self, BoxError)>> {
        match self.vm.resume(RunPermit::on_the_operators_word()) {
            Ok(()) => Ok(self.vm),
            Err(error) => Err(Box::new((self, error))),
        }
    }

    /// The operator's word that the destination runs the guest: ends it here.
    pub fn discard(self) {}
}

/// Moves a running guest to the receiver at `to`.
///
/// Blocks until it is over. `observer` is told of each step on this thread; `cancel` ends it from any other,
/// with the guest still here, unless it has been committed.
pub fn migrate<V: SourceVm>(
    mut vm: V,
    to: &Address,
    options: &SourceOptions,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Outcome<V> {
    let report = driver::run(&mut vm, to, options, cancel, observer);
    match report.outcome {
        OutcomeKind::Moved => Outcome::Moved(report),
        OutcomeKind::StillHere => Outcome::StillHere { vm, report },
        OutcomeKind::InDoubt => Outcome::InDoubt(InDoubt { vm, report }),
    }
}

/// A failure of this host's own.
fn local(step: Step, error: impl std::fmt::Display) -> Fault {
    Fault::new(Side::Source, step, Blame::Local, error.to_string())
}
