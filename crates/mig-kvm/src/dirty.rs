//! Finding written pages: KVM's dirty log of each memory slot, or the vCPUs' dirty rings, and the VMM's own
//! writes.
//!
//! Invariant: from `start` to `stop` a page that is written after it was last re-armed is in the next
//! `sync`. KVM's log or rings hold what vCPUs (and KVM itself) wrote; the bitmap of `vm-memory`'s regions holds
//! what this process wrote; `sync` is their union.

#![allow(unsafe_code)]

mod bitmap_log;
mod manual_log;
mod reaper;
mod ring;
mod ring_log;
mod written;

use std::ops::Deref;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use mig::bitmap::PageRun;
use mig::describe::Region;
use mig::domain::{Extent, PAGE_BYTES};
use mig::{Bitmap, BoxError, DirtyTracker, Domain};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::cap::Caps;
use crate::error::KvmError;
use crate::ioctl;
use reaper::Reaper;

pub use ring_log::{MOST_RING_ENTRIES, RingSize, Rings, supported as rings_supported};
pub use written::{Written, WrittenPages};

/// A memory slot that the VMM gave to KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The slot's number.
    pub slot: u32,
    /// The guest memory it holds.
    pub region: Region,
    /// Where that is mapped in this process.
    pub host_address: u64,
}

/// How pages are re-armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// `rearm` re-arms the pages it is told (KVM_CLEAR_DIRTY_LOG), reading the log does not.
    Manual,
    /// Reading the log re-arms every page at once.
    OnRead,
    /// The first `rearm` after a `sync` re-arms every page that was found (KVM_RESET_DIRTY_RINGS).
    OnReset,
}

/// The dirty tracker of a guest on KVM, whose memory marks this process's own writes in a `B`.
pub struct DirtyLog<B: Written = WrittenPages> {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemoryMmap<B>>,
    slots: Vec<Tracked>,
    source: Source,
    manual_flags: u64,
    /// One slot's log; as large as the largest slot, so that `sync` allocates nothing. Empty with rings.
    words: Vec<u64>,
}

/// Where KVM notes what was written.
enum Source {
    /// In a log of each slot, re-armed page by page.
    Manual,
    /// In a log of each slot, re-armed by being read.
    OnRead,
    /// In a ring of each vCPU; with who empties them while there is a log.
    Rings(Arc<Rings>, Option<Reaper>),
}

#[derive(Debug)]
struct Tracked {
    slot: Slot,
    extent: Extent,
    logging: bool,
}

impl<B: Written> DirtyLog<B> {
    /// The best log that this KVM has: manual protection where it exists.
    ///
    /// # Errors
    /// [`KvmError::Slot`] when the slots are not exactly the regions of `memory`.
    pub fn new(
        vm: Arc<VmFd>,
        slots: Vec<Slot>,
        memory: Arc<GuestMemoryMmap<B>>,
        caps: &Caps,
    ) -> Result<Self, KvmError> {
        let source = if manual_log::supported(caps) { Source::Manual } else { Source::OnRead };
        Self::with_source(vm, slots, memory, caps, |_| Ok(source))
    }

    /// The log that is kept in dirty rings of `size`, those of all vCPUs of a VM that was given them.
    ///
    /// # Errors
    /// As for [`DirtyLog::new`]; when a ring cannot be mapped.
    pub fn with_rings<V: Deref<Target = VcpuFd>>(
        vm: Arc<VmFd>,
        slots: Vec<Slot>,
        memory: Arc<GuestMemoryMmap<B>>,
        caps: &Caps,
        vcpus: &[V],
        size: RingSize,
    ) -> Result<Self, KvmError> {
        let rings = |slots: &[Tracked]| {
            let slots = slots.iter().map(|t| (t.slot.slot, t.extent)).collect();
            Ok(Source::Rings(Arc::new(Rings::map(vm.clone(), slots, vcpus, size)?), None))
        };
        Self::with_source(vm.clone(), slots, memory, caps, rings)
    }

    fn with_source(
        vm: Arc<VmFd>,
        mut slots: Vec<Slot>,
        memory: Arc<GuestMemoryMmap<B>>,
        caps: &Caps,
        source: impl FnOnce(&[Tracked]) -> Result<Source, KvmError>,
    ) -> Result<Self, KvmError> {
        slots.sort_by_key(|s| s.region.guest_address);
        let regions: Vec<Region> = slots.iter().map(|s| s.region).collect();
        let domain = Domain::new(&regions)?;
        if memory.num_regions() != slots.len() {
            return Err(KvmError::Slot { slot: 0, why: "there are not as many slots as regions" });
        }
        for slot in &slots {
            check(slot, &memory)?;
        }
        let slots: Vec<Tracked> = slots
            .into_iter()
            .zip(domain.extents())
            .map(|(slot, extent)| Tracked { slot, extent: *extent, logging: false })
            .collect();
        let source = source(&slots)?;
        let largest = match source {
            Source::Rings(..) => 0,
            Source::Manual | Source::OnRead => {
                slots.iter().map(|t| words_of(t.extent.pages)).max().unwrap_or(0)
            }
        };
        Ok(Self { vm, memory, slots, source, manual_flags: caps.manual_dirty_log, words: vec![0; largest] })
    }

    /// How pages are re-armed.
    pub fn protection(&self) -> Protection {
        match self.source {
            Source::Manual => Protection::Manual,
            Source::OnRead => Protection::OnRead,
            Source::Rings(..) => Protection::OnReset,
        }
    }

    /// The rings that this log is kept in, if it is.
    pub fn rings(&self) -> Option<&Arc<Rings>> {
        match &self.source {
            Source::Rings(rings, _) => Some(rings),
            Source::Manual | Source::OnRead => None,
        }
    }

    fn begin(&mut self) -> Result<(), KvmError> {
        match &mut self.source {
            Source::Manual => manual_log::choose(&self.vm, self.manual_flags)?,
            Source::OnRead => bitmap_log::choose(&self.vm, self.manual_flags)?,
            Source::Rings(rings, reaper) => {
                bitmap_log::choose(&self.vm, self.manual_flags)?;
                rings.begin()?;
                // the one before first: as it ends it says that there is none
                *reaper = None;
                *reaper = Some(Reaper::start(rings.clone())?);
            }
        }
        self.set_logging(true)?;
        // Our own writes so far are in memory already (vm-memory marks a page after it wrote it), so a
        // reader that begins after this point sees them; and every page counts as dirty now anyway.
        for region in self.memory.iter() {
            own(region).take(|_, _| {});
        }
        Ok(())
    }

    /// Switches every slot's log on or off, as far as it goes.
    fn set_logging(&mut self, on: bool) -> Result<(), KvmError> {
        let mut first_error = Ok(());
        for tracked in self.slots.iter_mut().filter(|t| on || t.logging) {
            let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            // SAFETY: `memory`, which this struct keeps alive, maps the region there: `check` compared them.
            let result = unsafe { set_flags(&self.vm, &tracked.slot, flags) };
            if result.is_ok() {
                tracked.logging = on;
            }
            first_error = first_error.and(result);
        }
        first_error
    }

    fn read(&mut self, dirty: &mut Bitmap) -> Result<(), KvmError> {
        match &self.source {
            Source::Manual | Source::OnRead => self.read_logs(dirty)?,
            Source::Rings(rings, _) => {
                rings.report(dirty)?;
                // After what is found now: it may be the last time.
                if rings.take_lost() {
                    self.protect_all(dirty)?;
                }
            }
        }
        self.own_writes(dirty);
        Ok(())
    }

    /// Switching a log on protects every page of its slot; each counts as written, since it may have been.
    fn protect_all(&mut self, dirty: &mut Bitmap) -> Result<(), KvmError> {
        self.set_logging(false)?;
        self.set_logging(true)?;
        for Tracked { extent, .. } in &self.slots {
            dirty.set_run(PageRun { first: extent.first_page, count: extent.pages });
        }
        Ok(())
    }

    fn read_logs(&mut self, dirty: &mut Bitmap) -> Result<(), KvmError> {
        for tracked in self.slots.iter().filter(|t| t.logging) {
            let words = &mut self.words[..words_of(tracked.extent.pages)];
            // SAFETY: the kernel accepted the slot with this size when its log was switched on, and would
            // not change it afterwards; `words` has a bit for each of its pages.
            unsafe { ioctl::dirty_log(&self.vm, tracked.slot.slot, words)? };
            add(dirty, tracked.extent.first_page, trimmed(words, tracked.extent.pages));
        }
        Ok(())
    }

    /// Adds and forgets what this process wrote through `vm-memory`.
    ///
    /// No mark is lost: each is taken atomically, and a writer sets it after its bytes, so a write is either
    /// among those taken now, or its mark is set later and is taken the next time, even if the page was sent
    /// in between.
    fn own_writes(&self, dirty: &mut Bitmap) {
        for (region, tracked) in self.memory.iter().zip(&self.slots) {
            let first = tracked.extent.first_page;
            own(region).take(|at, word| dirty.or_words(first + at as u64 * 64, &[word]));
        }
    }

    fn rearm_window(&self, first_page: u64, words: &[u64]) -> Result<(), KvmError> {
        let window = || KvmError::Window { first_page, end_page: first_page + words.len() as u64 * 64 };
        let tracked = self
            .slots
            .iter()
            .find(|t| t.extent.first_page <= first_page && first_page < t.extent.end_page())
            .ok_or_else(window)?;
        let first = first_page - tracked.extent.first_page;
        let left = tracked.extent.pages - first;
        let (inside, outside) = words.split_at(words.len().min(words_of(left)));
        let beyond = !left.is_multiple_of(64)
            && inside.len() == words_of(left)
            && inside.last().is_some_and(|w| w >> (left % 64) != 0);
        if !first.is_multiple_of(64) || beyond || outside.iter().any(|w| *w != 0) {
            return Err(window());
        }
        match &self.source {
            Source::Manual => manual_log::rearm(&self.vm, tracked.slot.slot, first, left, inside),
            Source::OnRead => Ok(()),
            Source::Rings(rings, _) => rings.protect(),
        }
    }

    fn end(&mut self) -> Result<(), KvmError> {
        self.set_logging(false)?;
        if let Source::Rings(rings, reaper) = &mut self.source {
            *reaper = None;
            rings.end()?;
            // A log that is started again protects every page.
            rings.take_lost();
        }
        Ok(())
    }
}

impl<B: Written> DirtyTracker for DirtyLog<B> {
    fn start(&mut self) -> Result<(), BoxError> {
        Ok(self.begin()?)
    }

    fn sync(&mut self, dirty: &mut Bitmap) -> Result<(), BoxError> {
        Ok(self.read(dirty)?)
    }

    fn rearm(&self, first_page: u64, words: &[u64]) -> Result<(), BoxError> {
        Ok(self.rearm_window(first_page, words)?)
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        Ok(self.end()?)
    }
}

/// What this process wrote to a region (the region's own `bitmap` method hides the words).
fn own<B: Written>(region: &GuestRegionMmap<B>) -> &B {
    let mapping: &MmapRegion<B> = region;
    mapping.bitmap()
}

/// Sets in `dirty` what is set in `words`. Most are zero as a rule, and then only looked at: the log of an idle
/// guest is read at the speed of memory, half a megabyte for 16 GiB.
fn add(dirty: &mut Bitmap, first_page: u64, words: &[u64]) {
    const LINES: usize = 64;
    for (first, words) in (first_page..).step_by(LINES * 64).zip(words.chunks(LINES)) {
        if words.iter().fold(0, |all, word| all | word) != 0 {
            dirty.or_words(first, words);
        }
    }
}

fn words_of(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).expect("a domain's words fit")
}

/// Unsets the bits past the last page, which belong to none.
fn trimmed(words: &mut [u64], pages: u64) -> &[u64] {
    let words = &mut words[..words_of(pages)];
    if let (Some(last), 1..) = (words.last_mut(), pages % 64) {
        *last &= !(!0 << (pages % 64));
    }
    words
}

fn check<B: Written>(slot: &Slot, memory: &GuestMemoryMmap<B>) -> Result<(), KvmError> {
    let wrong = |why| KvmError::Slot { slot: slot.slot, why };
    let start = GuestAddress(slot.region.guest_address);
    let region = memory.find_region(start).ok_or(wrong("no region there"))?;
    if region.start_addr() != start || region.len() != slot.region.bytes {
        return Err(wrong("the region has other bounds"));
    }
    let host = memory.get_host_address(start).map_err(|_| wrong("the region is not mapped"))?;
    if host as u64 != slot.host_address {
        return Err(wrong("the region is mapped elsewhere"));
    }
    if own(region).pages() != Some(slot.region.bytes / PAGE_BYTES) {
        return Err(wrong("its bitmap does not count pages of 4096 bytes"));
    }
    Ok(())
}

/// # Safety
/// The slot's region is mapped at its host address and stays so while the VM lives.
unsafe fn set_flags(vm: &VmFd, slot: &Slot, flags: u32) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags,
        guest_phys_addr: slot.region.guest_address,
        memory_size: slot.region.bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the caller's promise.
    unsafe { ioctl::set_memory_region(vm, region) }
}

#[cfg(test)]
mod tests;
