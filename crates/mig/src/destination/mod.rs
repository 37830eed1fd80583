//! Taking a guest in: [`receive`].

mod driver;
mod listen;
mod worker;

use std::time::Duration;

use mig_core::progress::PageCounts;
use mig_core::{Fault, RunPermit};

use crate::cancel::Cancel;
use crate::guest::{BoxError, DestinationVm, Incoming};
use crate::observe::Observer;
use crate::transport::Listener;

/// How a receive went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveReport {
    /// Rounds received, the last one included.
    pub rounds: u32,
    /// Bytes received over all page channels.
    pub received_bytes: u64,
    /// Pages received.
    pub pages: PageCounts,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// Time spent on digests.
    pub verify: Duration,
    /// Time spent restoring state.
    pub load: Duration,
    /// Time spent starting the vCPUs.
    pub resume: Duration,
    /// What the guest itself felt, where that can be known.
    pub guest_gap: Option<Duration>,
}

/// How a receive ended.
#[derive(Debug)]
#[must_use]
pub enum Received<V> {
    /// The guest runs here.
    Running {
        /// The guest.
        vm: V,
        /// How it went.
        report: ReceiveReport,
    },
    /// The guest does not run here and never did; what had arrived is discarded. Another can be received.
    NotReceived(Fault),
    /// The copy is complete but the source vanished before it committed: it may be the last one.
    InDoubt(HeldCopy<V>),
    /// The guest was given to this side, which could not start it. The copy is complete.
    Lost(HeldCopy<V>),
}

/// A complete, paused copy that this side may not run by itself.
#[derive(Debug)]
#[must_use]
pub struct HeldCopy<V> {
    vm: V,
    fault: Fault,
}

impl<V: DestinationVm> HeldCopy<V> {
    /// How it came to this.
    pub fn fault(&self) -> &Fault {
        &self.fault
    }

    /// The guest, to look at.
    pub fn vm(&self) -> &V {
        &self.vm
    }

    /// The operator's word that the source does not and will not run the guest: runs it here.
    ///
    /// # Errors
    /// The guest could not be resumed; it comes back with the reason.
    pub fn resume(mut self) -> Result<V, Box<(Self, BoxError)>> {
        match self.vm.resume(RunPermit::on_the_operators_word()) {
            Ok(()) => Ok(self.vm),
            Err(error) => Err(Box::new((self, error))),
        }
    }

    /// The operator's word that the source runs the guest: drops the copy.
    pub fn discard(self) {}
}

/// Waits for a source and takes its guest.
///
/// Blocks until a guest came or failed to; strangers that connect meanwhile are turned away. `observer` is
/// told of each step on this thread; `cancel` ends it from any other, unless the guest has been committed.
pub fn receive<I: Incoming>(
    listener: &Listener,
    incoming: &mut I,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Received<I::Vm> {
    driver::run(listener, incoming, cancel, observer)
}
