//! Guest memory as the kernel and volatile accesses see it: never as a Rust reference.
//!
//! Invariant: every mapping stays valid while its [`GuestRam`] (or a clone) lives, because it keeps the
//! owner alive.

#![allow(unsafe_code)]

use std::any::Any;
use std::sync::Arc;

use mig_wire::describe::Region;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// One mapped region of guest memory.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    region: Region,
    host: *mut u8,
}

/// A guest's memory, mapped into this process; cheap to clone.
#[derive(Clone)]
pub struct GuestRam {
    mappings: Arc<[Mapping]>,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointers are used for volatile accesses and system calls only, from any thread; the memory they
// point to is kept mapped by the owner.
unsafe impl Send for GuestRam {}
// SAFETY: as above; concurrent volatile accesses to guest memory are what a guest's own vCPUs do.
unsafe impl Sync for GuestRam {}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.mappings.iter()).finish()
    }
}

impl GuestRam {
    /// The memory of a `vm-memory` guest, whatever tracks the VMM's own writes to it.
    ///
    /// # Panics
    /// When a region has no host address, which mmap regions always have.
    pub fn from_vm_memory<B>(memory: Arc<GuestMemoryMmap<B>>) -> Self
    where
        B: vm_memory::bitmap::Bitmap + Send + Sync + 'static,
        GuestMemoryMmap<B>: GuestMemoryBackend + Send + Sync,
    {
        let mappings = memory
            .iter()
            .map(|r| Mapping {
                region: Region { guest_address: r.start_addr().0, bytes: r.len() },
                host: memory
                    .get_host_address(GuestAddress(r.start_addr().0))
                    .expect("mmap regions are mapped"),
            })
            .collect();
        Self { mappings, _owner: memory }
    }

    /// The regions, ascending.
    pub fn regions(&self) -> Vec<Region> {
        self.mappings.iter().map(|m| m.region).collect()
    }
}
