//! The guests that mig-vmm carries in itself: small programs for 64-bit ring 0, assembled when they are
//! loaded, that watch themselves being moved. `docs/guests.md` describes them.
//!
//! Invariants: a guest that has nothing to complain about never ends; one that finds an error says so on COM1
//! and ends by a write of a nonzero code to [`EXIT_PORT`]; vCPU 0 writes [`HEARTBEAT_PORT`] every
//! [`HEARTBEAT_INTERVAL_US`] whatever else it does.

mod asm;
mod clock;
mod contents;
mod dirtier;
mod entry;
mod fill;
mod idle;
mod image;
mod layout;
mod name;
mod schedule;
mod state;
mod watch;

#[cfg(test)]
mod harness;
#[cfg(test)]
mod tests;

use std::fmt;

use mig_kvm::dirty::WrittenPages;
use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

pub use entry::{Entry, VcpuEntry};
pub use name::GuestNameError;

/// One byte written here is one heartbeat.
pub const HEARTBEAT_PORT: u16 = 0xe0;
/// A byte written here ends the guest: 0 is a good end, anything else one of [`exit_code`].
pub const EXIT_PORT: u16 = 0xf4;
/// The time between two heartbeats, in microseconds of the guest's APIC timer.
pub const HEARTBEAT_INTERVAL_US: u32 = 500;
/// The most vCPUs that a built-in guest takes.
pub const MAX_VCPUS: u8 = 64;

/// What a guest means by the byte it writes to [`EXIT_PORT`].
pub mod exit_code {
    /// An exception that the guest did not cause itself; the text has vector and instruction.
    pub const EXCEPTION: u8 = 1;
    /// A page of memory is not as the guest left it.
    pub const STALE_MEMORY: u8 = 2;
    /// A register or a device is not as the guest left it.
    pub const WRONG_STATE: u8 = 3;
    /// The time-stamp counter went backwards.
    pub const TIME_BACKWARDS: u8 = 4;
    /// Timer ticks stopped.
    pub const TICKS_STALLED: u8 = 5;
}

/// The memory of a guest, with the writes of the VMM tracked.
pub type Memory = GuestMemoryMmap<WrittenPages>;

/// What lies in a guest's memory before it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Fill {
    /// What the host maps: zeros.
    #[default]
    None,
    /// Incompressible bytes, another page everywhere.
    Random,
    /// English words.
    Text,
    /// Records as a database keeps them.
    Heap,
}

/// The order in which a dirtier writes its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Pattern {
    /// One after the other.
    #[default]
    Sequential,
    /// Scattered, each page once in a lap.
    Random,
    /// Nine writes in ten go to the first tenth of the pages.
    Hot,
}

/// A built-in guest with its parameters; `Display` and `FromStr` are each other's inverse.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Guest {
    /// Halts between timer ticks.
    Idle {
        /// What its memory is filled with before it starts.
        fill: Fill,
    },
    /// Writes pages at a given rate, and checks that each is as it was left.
    Dirtier {
        /// Bytes of pages to be dirtied a second, over all vCPUs.
        rate_bytes_per_second: u64,
        /// Bytes of memory that are written, a multiple of 4 KiB, over all vCPUs.
        working_set_bytes: u64,
        /// In which order.
        pattern: Pattern,
        /// What all its memory holds but for the stamps.
        fill: Fill,
    },
    /// Puts known values in every register and device, and checks them for ever.
    State,
    /// Watches that time-stamp counters and timer ticks go forward.
    Clock,
}

/// What [`Guest::verify`] looked at and found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Pages whose content was compared with what it must be.
    pub pages_checked: u64,
    /// Pages written by the guest since its start; two sides of one pause must agree on it.
    pub pages_written: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages as the guest left them after {} writes", self.pages_checked, self.pages_written)
    }
}

/// Why a guest could not be loaded, or what is wrong with its memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// The guest does not fit.
    #[error(
        "the guest {guest} needs {needed_bytes} bytes of memory and has {memory_bytes}: \
         give it more with --memory, or choose a smaller working-set"
    )]
    MemoryTooSmall {
        /// The guest asked for.
        guest: Guest,
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes there are.
        memory_bytes: u64,
    },
    /// More than one page directory pointer table covers.
    #[error("built-in guests map at most 512 GiB, and memory ends at {end:#x}: give less with --memory")]
    MemoryTooLarge {
        /// The address after the last byte.
        end: u64,
    },
    /// Too many or no vCPUs.
    #[error("built-in guests run on 1 to {MAX_VCPUS} vCPUs, not {vcpus}")]
    Vcpus {
        /// The number asked for.
        vcpus: u8,
    },
    /// Fewer pages than vCPUs.
    #[error("a working-set of {working_set_bytes} bytes has no page for each of {vcpus} vCPUs: enlarge it")]
    WorkingSetTooSmall {
        /// The working set asked for.
        working_set_bytes: u64,
        /// The vCPUs that share it.
        vcpus: u8,
    },
    /// The program did not assemble; a defect of this crate.
    #[error("the built-in guest did not assemble")]
    Assemble(#[from] iced_x86::IcedError),
    /// The program is larger than its place; a defect of this crate.
    #[error("the built-in guest has {bytes} bytes of code, and there is room for {room_bytes}")]
    CodeTooLarge {
        /// Its size.
        bytes: usize,
        /// The room.
        room_bytes: usize,
    },
    /// Guest memory could not be read or written.
    #[error("guest memory at {address:#x} cannot be accessed")]
    Memory {
        /// Where.
        address: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// The memory does not hold this guest.
    #[error("guest memory does not hold the guest {expected}, but {found}")]
    OtherGuest {
        /// The guest asked about.
        expected: Guest,
        /// What the identity page says.
        found: String,
    },
    /// A page that nobody writes was changed or lost.
    #[error(
        "page {page:#x} is not as it was loaded: {what} at {address:#x} should be {expected:#x} and is {found:#x}"
    )]
    Changed {
        /// What the page is for.
        what: &'static str,
        /// Its number, the address divided by 4096.
        page: u64,
        /// The first differing quadword.
        address: u64,
        /// What it should hold.
        expected: u64,
        /// What it holds.
        found: u64,
    },
    /// A stamped page is older or newer than the guest's own count of its writes allows.
    #[error(
        "page {page:#x} of vCPU {vcpu} is stale: its stamp should be page {page:#x} generation {expected_generation}, \
         and is page {found_page:#x} generation {found_generation}"
    )]
    Stale {
        /// The page's number.
        page: u64,
        /// The vCPU that writes it.
        vcpu: u8,
        /// The generation it must have.
        expected_generation: u64,
        /// The page number in the stamp.
        found_page: u64,
        /// The generation in the stamp.
        found_generation: u64,
    },
}

impl Guest {
    /// Writes the guest into `memory`: tables and code below 640 KiB, more page tables and what the guest
    /// needs beyond from 1 MiB on. `tsc_khz` is the frequency of the vCPUs' time-stamp counter.
    ///
    /// Filling memory runs on several threads and takes as long as touching it does.
    ///
    /// # Errors
    /// When the guest does not fit, with the remedy; when memory has holes where tables must lie.
    pub fn load(&self, memory: &Memory, vcpus: u8, tsc_khz: u32) -> Result<Entry, WorkloadError> {
        image::load(self, memory, vcpus, tsc_khz)
    }

    /// Checks what the guest left in memory, as far as it can be known from outside. All vCPUs must be out of
    /// KVM_RUN. The guest's static pages are compared always, all memory that was filled, and every stamp of a dirtier's
    /// working set.
    ///
    /// # Errors
    /// The first page that is wrong.
    pub fn verify(&self, memory: &Memory) -> Result<Verified, WorkloadError> {
        image::verify(self, memory)
    }

    /// The pages that the guest has written since its start, over all vCPUs; only a dirtier counts. May be
    /// called while it runs.
    ///
    /// # Errors
    /// When the memory does not hold this guest.
    pub fn pages_written(&self, memory: &Memory) -> Result<u64, WorkloadError> {
        image::pages_written(self, memory)
    }

    /// The built-in guest that `memory` holds, if it holds one: the destination of a migration finds out here.
    pub fn in_memory(memory: &Memory) -> Option<Self> {
        image::identity(memory).and_then(|identity| identity.guest)
    }
}

/// The bytes of guest memory, all regions together.
fn memory_bytes(memory: &Memory) -> u64 {
    use vm_memory::GuestMemoryRegion;
    memory.iter().map(GuestMemoryRegion::len).sum()
}
