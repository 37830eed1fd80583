//! What an embedder implements: its guest as the engine sees it.
//!
//! *Paused* means: no vCPU executes, and no device writes guest memory or emits output. A device may accept
//! new work and hold it.

use std::time::{Duration, Instant};

use mig_core::policy::Throttle;
use mig_core::{Bitmap, RunPermit};
use mig_wire::{Description, Refusal, Section};

use crate::memory::GuestRam;

/// Any error of an embedder's; the engine adds the step and the side.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Finds the pages that the guest, its devices and its VMM wrote.
///
/// Page indices are those of [`mig_core::Domain`] over the regions of [`SourceVm::describe`].
pub trait DirtyTracker: Send + Sync {
    /// Starts tracking from a clean sheet: afterwards every write is found. The engine treats every page as
    /// dirty at this point, so an implementation need not report them.
    ///
    /// Called with vCPUs running, once before round 0. May take milliseconds.
    ///
    /// # Errors
    /// The migration ends, the guest stays; [`DirtyTracker::stop`] is called.
    fn start(&mut self) -> Result<(), BoxError>;

    /// Sets in `dirty` every page written since it was last re-armed (since `start` for those that never
    /// were); it never unsets one. Pages may be reported more often than needed, never less.
    ///
    /// Called between rounds, and last with everything paused and saved: that call is inside the pause.
    ///
    /// # Errors
    /// The migration ends, the guest stays.
    fn sync(&mut self, dirty: &mut Bitmap) -> Result<(), BoxError>;

    /// Watches again the pages whose bits are set in `words`, which start at page `first_page` (a multiple
    /// of 64): they are about to be read and sent. A write after this call must be found by a later `sync`.
    /// The words lie within one region.
    ///
    /// Called with vCPUs running, many times a round.
    ///
    /// # Errors
    /// The migration ends, the guest stays.
    fn rearm(&self, first_page: u64, words: &[u64]) -> Result<(), BoxError>;

    /// Stops tracking and gives the guest its full speed back. Called once after `start` whatever happened,
    /// never inside the pause of a migration that succeeds; calling it again does nothing.
    ///
    /// # Errors
    /// Reported, with no other consequence.
    fn stop(&mut self) -> Result<(), BoxError>;
}

/// Stopping and continuing the guest.
pub trait VmControl {
    /// Pauses everything (see the module); returns when it is so. Inside the downtime.
    ///
    /// # Errors
    /// The migration ends and the guest is resumed.
    fn pause(&mut self) -> Result<(), BoxError>;

    /// Whether [`VmControl::throttle`] can slow the guest. Where it cannot, a guest that dirties memory as fast as it is
    /// sent is handled as the policy says for that.
    fn can_throttle(&self) -> bool {
        false
    }

    /// Holds every vCPU that writes memory for this part of the time, in slices of some milliseconds, or whenever it has
    /// written as much as it would then, until it is told otherwise; [`Throttle::NONE`] gives the guest all its time back at once. Called with vCPUs running, between
    /// rounds, and with `NONE` also in the pause: it must return at once.
    ///
    /// # Errors
    /// The guest has all its time, and the migration goes on without.
    fn throttle(&mut self, throttle: Throttle) -> Result<(), BoxError> {
        if throttle.is_none() { Ok(()) } else { Err("this guest cannot be slowed".into()) }
    }

    /// The processor time that each vCPU has used so far, where that is known: from it follows how much of its time a
    /// guest needs to keep its speed. Asked once a round.
    fn processor_times(&self) -> Vec<Duration> {
        Vec::new()
    }

    /// Runs the guest (again). The permit is the proof that nobody else does.
    ///
    /// # Errors
    /// The guest is lost to this side: reported as fatal.
    fn resume(&mut self, permit: RunPermit) -> Result<(), BoxError>;
}

/// Saving what is not memory.
pub trait SaveState {
    /// The state of vCPUs and devices. Called paused, inside the downtime; may write guest memory, since
    /// the dirty log is read after it.
    ///
    /// # Errors
    /// The migration ends and the guest is resumed.
    fn save(&mut self) -> Result<Vec<Section>, BoxError>;
}

/// Restoring what [`SaveState`] saved.
pub trait RestoreState {
    /// Puts the sections into a guest that has never run. Called once, all memory in place, inside the
    /// downtime.
    ///
    /// # Errors
    /// The destination discards the guest and the source resumes it. A critical section it does not know,
    /// or one that is missing, is an error.
    fn restore(&mut self, sections: &[Section]) -> Result<(), BoxError>;
}

/// What a source expects its part of a pause to cost, so that the first prediction is a good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseCosts {
    /// [`VmControl::pause`].
    pub pause: Duration,
    /// [`SaveState::save`].
    pub save: Duration,
}

impl Default for PauseCosts {
    fn default() -> Self {
        Self { pause: Duration::from_micros(500), save: Duration::from_millis(1) }
    }
}

/// What a destination expects its part of a pause to cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeCosts {
    /// [`RestoreState::restore`].
    pub load: Duration,
    /// [`DestinationVm::resume`].
    pub resume: Duration,
}

impl Default for ResumeCosts {
    fn default() -> Self {
        Self { load: Duration::from_millis(1), resume: Duration::from_micros(500) }
    }
}

/// A running guest that can be moved away.
pub trait SourceVm: VmControl + SaveState + Send {
    /// What the destination must know before a page moves.
    ///
    /// # Errors
    /// The migration ends before it began.
    fn describe(&self) -> Result<Description, BoxError>;

    /// Guest memory: the regions of the description.
    fn memory(&self) -> GuestRam;

    /// What pausing and saving cost, measured before if possible.
    fn pause_costs(&self) -> PauseCosts {
        PauseCosts::default()
    }

    /// The dirty tracker over that memory.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;
}

/// A receiver's side: makes a guest to fill, or says why not.
pub trait Incoming {
    /// The guest it makes.
    type Vm: DestinationVm;

    /// Makes everything that can be made before the pause: VM, vCPUs, devices. Memory need not be faulted in:
    /// the engine does so as pages arrive, on every channel at once. Nobody reserves it, then: who must not run
    /// out of it half way sets it aside here.
    ///
    /// # Errors
    /// Every reason, not the first only: the source shows them all.
    fn prepare(&mut self, description: &Description) -> Result<Self::Vm, Vec<Refusal>>;
}

/// A guest that is being filled.
pub trait DestinationVm: RestoreState + Send {
    /// Its memory: all zero, with the regions of the description.
    fn memory(&self) -> GuestRam;

    /// What restoring and resuming cost, measured before if possible.
    fn resume_costs(&self) -> ResumeCosts {
        ResumeCosts::default()
    }

    /// Runs the guest for the first time.
    ///
    /// # Errors
    /// The guest is lost: reported as fatal on both sides.
    fn resume(&mut self, permit: RunPermit) -> Result<(), BoxError>;

    /// When the last vCPU was let into the guest, where that is known: asked right after [`DestinationVm::resume`],
    /// which may return before or after it. May wait a moment for it, but no longer than a millisecond.
    fn running_since(&self) -> Option<Instant> {
        None
    }

    /// The time in which the guest itself got nothing done, from its last sign of life on the source to its
    /// first one here, waiting for that at most `patience`. `None` where it cannot be known.
    fn guest_gap(&mut self, patience: Duration) -> Option<Duration> {
        let _ = patience;
        None
    }
}
