//! Taking a guest in: [`receive`].

mod driver;
mod fates;
mod filled;
mod listen;
mod placing;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use mig_core::progress::PageCounts;
use mig_core::{Fault, RunPermit};

use crate::arbiter::Arbiter;
use crate::control::Control;
use crate::guest::{BoxError, DestinationVm, Incoming};
use crate::observe::Observer;

pub use listen::Listener;

/// How to receive.
#[derive(Clone, Default)]
pub struct ReceiveOptions {
    /// Who decides in doubt. The source must use the same one, or none where this is none; it costs the pause
    /// one [`Arbiter::claim`].
    pub arbiter: Option<Arc<dyn Arbiter>>,
}

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
    /// The guest does not run here, never did, and never will; what had arrived is discarded. Another can be
    /// received.
    NotReceived(Fault),
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
/// told of each step on this thread; `control` ends it from any other, unless the guest has been committed.
///
/// Where the source vanishes with all of its guest here and before it committed, the copy may be the last one.
/// Then this call stays: it holds the guest paused, tells [`Progress::InDoubt`], and waits for the source to
/// ask for it (which it then has back), or for [`Control::resolve`]. Keep the listener afterwards, too: it
/// answers a source whose link was lost before it heard that its guest runs.
///
/// [`Progress::InDoubt`]: crate::observe::Progress::InDoubt
pub fn receive<I: Incoming>(
    listener: &Listener,
    incoming: &mut I,
    options: &ReceiveOptions,
    control: &Control,
    observer: &dyn Observer,
) -> Received<I::Vm> {
    driver::run(listener, incoming, options, control, observer)
}
