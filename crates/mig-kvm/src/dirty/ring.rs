//! One vCPU's dirty ring: the pages that it wrote, in the order in which it wrote them.
//!
//! KVM and this process share the entries and nothing else; an entry's flags say whose it is. A free one (0) is
//! filled in by KVM, which then says DIRTY; who has harvested it says RESET; KVM_RESET_DIRTY_RINGS protects its
//! page again and frees it (virt/kvm/dirty_ring.c; KVM_CAP_DIRTY_LOG_RING in Documentation/virt/kvm/api.rst).
//! KVM fills and frees entries strictly in their order, around the ring.
//!
//! Invariant: from `oldest` on there are `harvested` entries that say RESET, then those that say DIRTY, then
//! free ones.
//!
//! KVM leaves the guest before a ring is full, with 64 entries left (and what the CPU buffers). One that
//! interprets many of a guest's instructions in one go writes more than that (kvm_pvm: 512 instructions, an entry
//! for each write) and overwrites the oldest entries: the ring *ran over*. What was lost is not known, nor whose
//! the entries are, as KVM may be at it still. It will not run the vCPU again before there is room. So all others
//! leave the ring alone, until the vCPU's own thread takes everything up to the last entry that is not free for
//! harvested, the free ones among it too. KVM frees all that, but is ahead by as many entries as it overwrote: next
//! it leaves a *gap* of so many free ones, which count as harvested once there are others behind. Their old
//! content does no harm: a page is reported and protected once more.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use mig::domain::PAGE_BYTES;
use vmm_sys_util::errno;

use crate::error::{Call, KvmError};

/// KVM_DIRTY_GFN_F_DIRTY of include/uapi/linux/kvm.h, which bindgen cannot read.
const DIRTY: u32 = 1;
/// KVM_DIRTY_GFN_F_RESET.
const RESET: u32 = 2;

/// The kernel's `struct kvm_dirty_gfn`.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    /// The page within its slot.
    offset: AtomicU64,
}

pub(super) const ENTRY_BYTES: usize = size_of::<kvm_dirty_gfn>();
const _: () =
    assert!(size_of::<Entry>() == ENTRY_BYTES && align_of::<Entry>() == align_of::<kvm_dirty_gfn>());

/// What became of a ring's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Harvest {
    /// All of them were found.
    Complete,
    /// Some may have been overwritten.
    Overrun,
}

/// A vCPU's ring, mapped.
pub(super) struct Ring {
    entries: NonNull<Entry>,
    /// How many: a power of two.
    len: usize,
    /// The oldest entry that KVM has not freed; wraps around with the type.
    oldest: usize,
    harvested: usize,
    /// Free entries may lie before those that say DIRTY.
    gap: bool,
    /// The ring ran over: left alone by all but its vCPU's thread.
    ran_over: bool,
    /// Entries harvested since whoever counts set it to 0.
    pub(super) written: u64,
    /// As [`Ring::oldest`]: entries before it have been looked at.
    looked_at: usize,
}

// SAFETY: the mapping belongs to the process, and its entries are accessed by atomic operations only.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU whose VM has rings of `len` entries, a power of two. Nobody has harvested it yet.
    pub(super) fn map(vcpu: &impl AsRawFd, len: usize) -> Result<Self, KvmError> {
        assert!(len.is_power_of_two(), "KVM takes no other");
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES as i64;
        // SAFETY: a new shared mapping at an address that the kernel chooses.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len * ENTRY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(errno::Error::last()).call("mapping a dirty ring");
        }
        let entries = NonNull::new(mapped.cast()).expect("the kernel maps nothing at address 0 unasked");
        Ok(Self {
            entries,
            len,
            oldest: 0,
            harvested: 0,
            gap: false,
            ran_over: false,
            written: 0,
            looked_at: 0,
        })
    }

    /// Harvests what there is. `found` is given slot and page of every entry that KVM has not freed, those that
    /// were harvested before among them.
    pub(super) fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> Harvest {
        // Once the last entry is in use all are.
        let full = || self.flags(self.len - 1) != 0;
        self.ran_over |= full() || (0..self.harvested).any(|at| self.flags(at) != RESET);
        if !self.ran_over {
            (0..self.harvested).for_each(|at| self.tell(at, &mut found));
            if self.gap {
                self.close_gap();
            }
        }
        while !self.ran_over && self.flags(self.harvested) == DIRTY {
            self.take(self.harvested, &mut found);
            self.harvested += 1;
            self.ran_over = self.flags(self.len - 1) != 0;
        }
        if self.ran_over { Harvest::Overrun } else { Harvest::Complete }
    }

    /// As [`Ring::harvest`], for the thread of the vCPU, which is out of KVM_RUN: nothing is added meanwhile, and
    /// a ring that ran over is put right.
    pub(super) fn harvest_own(&mut self, mut found: impl FnMut(u32, u64)) -> Harvest {
        if self.harvest(&mut found) == Harvest::Complete {
            return Harvest::Complete;
        }
        let end = (0..self.len).rev().find(|at| self.flags(*at) != 0).map_or(0, |last| last + 1);
        for at in 0..end {
            match self.flags(at) {
                0 => self.pass_over(at),
                DIRTY => self.take(at, &mut found),
                _ => self.tell(at, &mut found),
            }
        }
        self.harvested = end;
        (self.ran_over, self.gap) = (false, true);
        Harvest::Overrun
    }

    /// Takes the free entries before the next that is not for harvested, once there is one.
    fn close_gap(&mut self) {
        let in_use = |from: usize| (from..self.len).find(|at| self.flags(*at) != 0);
        let Some(next) = in_use(self.harvested) else { return };
        // Entries are filled in their order: had the first been free still, it would not be any more.
        if self.flags(self.harvested) == 0 {
            (self.harvested..next).for_each(|at| self.pass_over(at));
            self.harvested = next;
        } else if let Some(free) = (next..self.len).find(|at| self.flags(*at) == 0) {
            // In use on both sides: KVM has been around the ring and fills the gap.
            self.ran_over = in_use(free).is_some() && self.flags(free) == 0;
        }
        self.gap = false;
    }

    /// Tells of an entry that says DIRTY, and has it say RESET.
    fn take(&mut self, at: usize, found: &mut impl FnMut(u32, u64)) {
        self.tell(at, found);
        // Release: the entry was read before KVM may free it, and fill it in anew.
        self.entry(at).flags.store(RESET, Ordering::Release);
        self.written += 1;
    }

    fn tell(&self, at: usize, found: &mut impl FnMut(u32, u64)) {
        let entry = self.entry(at);
        found(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
    }

    /// Has KVM free a free entry. It may be filling it in right now, if it runs over: then it is not free.
    fn pass_over(&self, at: usize) {
        let _ = self.entry(at).flags.compare_exchange(0, RESET, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Whether more than a quarter of the entries are in use.
    pub(super) fn fills(&self) -> bool {
        self.flags(self.len / 4) != 0
    }

    /// How many entries wait to be harvested.
    pub(super) fn waiting(&self) -> u64 {
        // KVM adds behind them meanwhile, nobody takes any away: they stay in one piece.
        let (mut low, mut high) = (self.harvested, self.len);
        while low < high {
            let middle = low.midpoint(high);
            if self.flags(middle) == DIRTY {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low - self.harvested) as u64
    }

    /// Tells of the entries that were added since the last look, and takes none out. A ring that ran over is left alone.
    pub(super) fn look(&mut self, mut found: impl FnMut(u32, u64)) {
        if self.ran_over {
            return;
        }
        let end = self.harvested + self.waiting() as usize;
        // what was freed before it was looked at is gone
        let begin = Some(self.looked_at.wrapping_sub(self.oldest)).filter(|begin| *begin <= end).unwrap_or(0);
        (begin..end).for_each(|at| self.tell(at, &mut found));
        self.looked_at = self.oldest.wrapping_add(end);
    }

    /// Leaves entries that were harvested out of the next look.
    pub(super) fn skip_harvested(&mut self) {
        self.looked_at = self.oldest.wrapping_add(self.harvested);
    }

    /// How many entries KVM is to free: none, where it overwrote the first.
    pub(super) fn to_free(&self) -> usize {
        if self.harvested > 0 && self.flags(0) == RESET { self.harvested } else { 0 }
    }

    /// How many of the harvested entries it freed, if it did not overwrite any.
    pub(super) fn seems_freed(&self) -> usize {
        (0..self.harvested).find(|at| self.flags(*at) == RESET).unwrap_or(self.harvested)
    }

    /// Whether KVM wrote over harvested entries that it had not freed, the oldest first.
    pub(super) fn is_overwritten(&self) -> bool {
        self.harvested > 0 && self.flags(0) == DIRTY
    }

    /// KVM freed so many of those that were harvested.
    pub(super) fn freed(&mut self, count: usize) {
        self.oldest = self.oldest.wrapping_add(count);
        self.harvested -= count;
    }

    fn flags(&self, at: usize) -> u32 {
        // Acquire: KVM wrote slot and page before it said DIRTY.
        self.entry(at).flags.load(Ordering::Acquire)
    }

    /// The entry that is `at` places behind the oldest.
    fn entry(&self, at: usize) -> &Entry {
        let place = self.oldest.wrapping_add(at) & (self.len - 1);
        // SAFETY: `place` is less than `len`, and so many entries are mapped while `self` lives; KVM shares them,
        // and whatever bytes they hold are valid atomics.
        unsafe { self.entries.add(place).as_ref() }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size, unmapped once.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.len * ENTRY_BYTES) };
    }
}

#[cfg(test)]
impl Ring {
    /// Has the harvested entries name a slot that there is not: KVM frees them and protects nothing.
    pub(super) fn misplace(&self) {
        (0..self.harvested).for_each(|at| self.entry(at).slot.store(u32::MAX, Ordering::SeqCst));
    }
}

#[cfg(test)]
mod tests;
