//! Live migration for VMMs: implement the traits in [`guest`], then hand the guest to a driver.
//!
//! The crate an embedder depends on. It owns threads, sockets and the path of a page from guest memory to
//! guest memory; what to do next is decided by `mig-core`.

pub mod guest;
pub mod memory;

pub use guest::{
    BoxError, DestinationVm, DirtyTracker, Incoming, RestoreState, SaveState, SourceVm, VmControl,
};
pub use memory::GuestRam;
pub use mig_core::{Bitmap, Domain, RunPermit, bitmap, domain};
pub use mig_wire::{Description, Refusal, Section, WireError, body, describe, section};
