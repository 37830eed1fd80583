//! A minimal VMM on KVM whose machines can be moved while they run: the worked example of an embedder.
//!
//! [`Machine`] boots and runs a guest and is a [`mig::SourceVm`]; [`Receiver`] is a [`mig::Incoming`] and makes
//! the machine that a guest arrives in. Interrupt controllers and timer are KVM's; COM1, the keyboard
//! controller's reset line, a CMOS clock, a heartbeat port and a debug-exit port are here.

mod boot;
mod bus;
mod console;
mod cpuid;
mod devices;
pub mod error;
mod fixup;
mod incoming;
pub mod layout;
mod machine;
pub mod memory;
mod monitor;
mod platform;
mod sections;
#[cfg(test)]
mod tests;
mod tracking;
mod vcpu;
pub mod workload;

pub use boot::{BootError, Workload};
pub use console::{Console, Unwritten};
pub use error::VmmError;
pub use incoming::{IncomingMachine, Receiver};
pub use machine::{Machine, MachineConfig};
pub use mig_kvm::{GuestTime, KvmError, TimePlan};
pub use monitor::{End, Fed, Monitor, RunState};
pub use sections::text as section_text;
pub use tracking::Tracking;
