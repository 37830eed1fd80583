//! Live migration for VMMs: implement the traits in [`guest`], then hand the guest to a driver.
//!
//! The crate an embedder depends on. It owns threads, sockets and the path of a page from guest memory to
//! guest memory; what to do next is decided by `mig-core`.

#[macro_use]
mod reach;

pub mod arbiter;
pub mod control;
pub mod destination;
mod digest;
pub mod dirtying;
pub mod encoding;
#[cfg(feature = "fault-points")]
pub mod fault_points;
pub mod guest;
#[cfg(feature = "kernels")]
pub mod kernels;
mod link;
pub mod memory;
pub mod observe;
mod pace;
mod patience;
mod random;
pub mod source;
mod stall;
mod streams;
pub mod transport;
mod untouched;

pub use arbiter::{Arbiter, LeaseFile};
pub use control::Control;
pub use destination::{HeldCopy, Listener, ReceiveOptions, ReceiveReport, Received, receive};
pub use encoding::Compress;
pub use guest::{
    BoxError, DestinationVm, DirtyTracker, Incoming, PauseCosts, RestoreState, ResumeCosts, SaveState,
    SourceVm, VmControl,
};
pub use memory::GuestRam;
pub use mig_core::{
    Bitmap, Blame, Domain, Fault, RunPermit, Side, Step, Word, bitmap, domain, forecast, pacing, policy,
};
pub use mig_wire::{Description, Refusal, Section, WireError, body, describe, section};
pub use observe::Observer;
pub use source::{Outcome, SourceOptions, migrate};
pub use transport::Address;
