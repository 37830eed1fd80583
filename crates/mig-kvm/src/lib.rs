//! Live migration on KVM: dirty logs, vCPU and VM state, time, CPU compatibility, pausing.
//!
//! Knows KVM and guest memory, never a socket. What a kernel can do is asked once ([`cap::Caps`]) and nothing
//! optional is used without asking.

pub mod cap;
pub mod compat;
pub mod dirty;
pub mod error;
mod ioctl;
pub mod kick;
pub mod state;
#[cfg(test)]
mod testing;
pub mod throttle;
pub mod time;
pub mod vcpu;
pub mod vm;

pub use cap::Caps;
pub use dirty::{DirtyLog, RingSize, Rings, Slot};
pub use error::KvmError;
pub use kick::{Ended, ExitHandler, Flow, Gate};
pub use state::KvmState;
pub use throttle::Throttler;
pub use time::{GuestTime, TimePlan};
pub use vcpu::{SaveContext, VcpuState};
pub use vm::VmState;
