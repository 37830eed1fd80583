//! The migration engine as pure state machines: rounds, stop policy, prediction, switchover.
//!
//! Sans-IO: nothing here knows clocks, threads, sockets, guest memory or KVM. Drivers feed events and carry
//! out actions; the very same types run in production, in a simulator and under a model checker.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod destination;
pub mod domain;
pub mod estimate;
pub mod forecast;
pub mod hot;
mod ledger;
pub mod pacing;
pub mod policy;
pub mod progress;
pub mod source;
pub mod switchover;

pub use bitmap::Bitmap;
pub use domain::Domain;
pub use mig_wire::fault::{Blame, Fault, Side, Step};
pub use switchover::{ArbiterId, Claim, RunPermit, Word};
