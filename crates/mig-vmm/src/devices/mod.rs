//! The devices that are not in the kernel. Interrupt controllers and timer are KVM's.

pub(crate) mod cmos;
pub(crate) mod debug_exit;
pub(crate) mod heartbeat;
pub(crate) mod i8042;
pub(crate) mod serial;
pub(crate) mod uart;
