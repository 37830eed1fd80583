//! The log kept in dirty rings: each vCPU notes which pages it wrote, and so also who writes.
//!
//! Harvesting takes entries out of a ring. KVM_RESET_DIRTY_RINGS then frees them and protects their pages again,
//! all of them before it returns, TLBs included.
//!
//! Why no vCPU's write is lost. A page is *protected*, and a write to it makes an entry; or it is *open*, and has
//! an entry that was not freed. Starting protects every page (the slots' flag does, without
//! KVM_DIRTY_LOG_INITIALLY_SET, which would leave them all neither), a write opens, a reset protects.
//!
//! - `report` tells of every open page, however often.
//! - `protect` resets. It does so between a report and the first reading of a page, by the engine's first `rearm`
//!   of a round. Whatever was written while the page was open is in what is read then, and a later write makes
//!   an entry.
//! - A ring that is full is harvested and reset by its vCPU's thread. What it held is noted in `pending` first,
//!   under the lock that `report` takes: the next report tells of it, and pages are read after that.
//! - In the pause nothing is reset: no vCPU runs, and if the guest is resumed after all, its pages are still open
//!   and are told of again. So the last report costs what its entries do. (Where rings run over, each report
//!   resets; see `harvest`.)
//!
//! What KVM itself writes for a guest it notes in the ring of the vCPU that is loaded (kvm_get_running_vcpu in
//! mark_page_dirty_in_slot, virt/kvm/kvm_main.c), which one is in each of its ioctls, not in KVM_RUN only:
//! restoring an MSR may write the guest's wall clock, leaving any of them its steal time. The report in the pause
//! comes after the state was saved, so it has these too. A write with no vCPU loaded would be noted nowhere on
//! x86 (only arm64 has KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP); of the calls that this crate makes on a VM none does
//! that: clock, PIT and interrupt controllers leave requests to the vCPUs. Xen's event channels would.
//!
//! From Linux 6.17 on a signal interrupts KVM_RESET_DIRTY_RINGS. Then the up to 64 pages that were freed last are
//! *not* protected (kvm_dirty_ring_reset drops the mask that it collects) and the call returns how many entries
//! it freed, no error. So signals are blocked meanwhile. What cannot be blocked (SIGSTOP, a freezer, a debugger)
//! shows in a count that is too small, after which every page is protected anew and told of. Except where it
//! falls between the very last entry and the end of the call, a few nanoseconds.
//!
//! A ring that ran over is the other case in which all pages are reported ([`super::ring`]).
//!
//! The lock is a leaf: nothing else is taken while it is held, so a vCPU's thread may wait for it with its
//! `VcpuFd` locked.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};
use kvm_ioctls::{VcpuFd, VmFd};
use mig::Bitmap;
use mig::domain::{Extent, PAGE_BYTES};
use vm_memory::bitmap::{Bitmap as _, NewBitmap};
use vmm_sys_util::errno;

use super::ring::{ENTRY_BYTES, Harvest, Ring};
use super::{Written, WrittenPages};
use crate::cap::{self, Caps};
use crate::error::{Call, KvmError};
use crate::ioctl;

/// The most entries that a ring of KVM's has (KVM_DIRTY_RING_MAX_ENTRIES in
/// include/linux/kvm_dirty_ring.h): 1 MiB of the
/// kernel's memory for each vCPU.
pub const MOST_RING_ENTRIES: u32 = 65_536;

/// KVM keeps up to 64 + 512 entries back, for what it writes itself and for what the CPU has buffered
/// (kvm_dirty_ring_get_rsvd_entries), and takes no ring without others.
const FEWEST_RING_ENTRIES: u32 = 1024;

/// How often an interrupted reset is taken up again.
const RESET_ATTEMPTS: usize = 1000;

/// How often rings that may run over are looked at.
const REAP_INTERVAL: Duration = Duration::from_millis(2);

/// The rings of a VM whose vCPUs are yet to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingSize {
    entries: u32,
}

impl RingSize {
    /// Gives the VM dirty rings, once and for all: KVM_GET_DIRTY_LOG does not work on it afterwards.
    /// `entries` for each vCPU, rounded up to a power of two between 1024 and what KVM takes.
    ///
    /// # Errors
    /// [`KvmError::NoDirtyRings`]; the kernel's refusal, when the VM has vCPUs or rings.
    pub fn enable(vm: &VmFd, caps: &Caps, entries: u32) -> Result<Self, KvmError> {
        let (cap, most_bytes, call) = best(caps)?;
        let most = u32::try_from(most_bytes / ENTRY_BYTES as u64).unwrap_or(MOST_RING_ENTRIES);
        let entries = entries.clamp(FEWEST_RING_ENTRIES.min(most), most).next_power_of_two();
        cap::enable(vm, cap, u64::from(entries) * ENTRY_BYTES as u64, call)?;
        Ok(Self { entries })
    }

    /// How many entries each ring has.
    pub fn entries(self) -> u32 {
        self.entries
    }
}

/// Whether this KVM has dirty rings.
///
/// # Errors
/// [`KvmError::NoDirtyRings`] names the capabilities of which it has none.
pub fn supported(caps: &Caps) -> Result<(), KvmError> {
    best(caps).map(drop)
}

/// The one whose order of accesses is promised on every architecture; before Linux 6.1 only x86 had rings, which
/// orders them by itself.
fn best(caps: &Caps) -> Result<(u32, u64, &'static str), KvmError> {
    match (caps.dirty_ring_acq_rel_bytes, caps.dirty_ring_bytes) {
        (0, 0) => Err(KvmError::NoDirtyRings),
        (0, bytes) => Ok((KVM_CAP_DIRTY_LOG_RING, bytes, "KVM_CAP_DIRTY_LOG_RING")),
        (bytes, _) => Ok((KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL")),
    }
}

/// The dirty rings of a VM's vCPUs, for the log, the vCPUs' threads and those who want to know who writes.
pub struct Rings {
    vm: Arc<VmFd>,
    slots: Vec<(u32, Extent)>,
    state: Mutex<State>,
    /// What was harvested and reset because a ring was full, and is yet to be reported.
    pending: WrittenPages,
    /// Whether entries were harvested and not reset: for a look without the lock.
    open: AtomicBool,
    /// `runs_over` or `reaping` changed.
    changed: Condvar,
}

struct State {
    /// By vCPU.
    rings: Vec<Ring>,
    /// Pages may be neither protected nor open.
    lost: bool,
    /// A ring ran over, on this host.
    runs_over: bool,
    /// There is a log, and somebody to empty rings for it.
    reaping: bool,
    /// From the first time that it is asked who writes which pages.
    firsts: Option<Firsts>,
}

/// Who was the first to write a page since the last report.
struct Firsts {
    /// A bit for each page that somebody wrote.
    written: Vec<u64>,
    /// Those are of the round before: cleared with the next look, of which there is none in the pause.
    is_old: bool,
    /// By vCPU.
    pages: Vec<u64>,
}

impl State {
    /// KVM freed `freed` entries in all; it was to free `to_free` of each ring.
    fn freed(&mut self, freed: usize, mut to_free: Vec<usize>) -> Result<(), KvmError> {
        if freed != to_free.iter().sum::<usize>() {
            self.lost |= freed > 0;
            let several = to_free.iter().filter(|count| **count > 0).count() > 1;
            for (count, ring) in to_free.iter_mut().zip(&self.rings).filter(|(count, _)| **count > 0) {
                *count = if several { ring.seems_freed() } else { freed };
            }
            // Unless a vCPU overwrote entries that KVM had not freed, this is right; if one did, KVM freed none of its.
            if freed != to_free.iter().sum::<usize>() {
                (self.lost, self.runs_over) = (true, true);
                let overwritten =
                    to_free.iter_mut().zip(&self.rings).filter(|(_, ring)| ring.is_overwritten());
                overwritten.for_each(|(count, _)| *count = 0);
            }
            if freed != to_free.iter().sum::<usize>() {
                return Err(KvmError::RingsNotReset);
            }
        }
        self.rings.iter_mut().zip(to_free).for_each(|(ring, count)| ring.freed(count));
        Ok(())
    }
}

impl Rings {
    /// Maps the rings of all vCPUs of `vm`. `slots` by number, with the place of each in the domain.
    pub(super) fn map<V: Deref<Target = VcpuFd>>(
        vm: Arc<VmFd>,
        slots: Vec<(u32, Extent)>,
        vcpus: &[V],
        size: RingSize,
    ) -> Result<Self, KvmError> {
        let len = size.entries as usize;
        let rings = vcpus.iter().map(|vcpu| Ring::map(&**vcpu, len)).collect::<Result<_, _>>()?;
        let end_page = slots.iter().map(|(_, extent)| extent.end_page()).max().unwrap_or(0);
        let bytes = usize::try_from(end_page * PAGE_BYTES).expect("a domain's bytes fit");
        let state = State { rings, lost: false, runs_over: false, reaping: false, firsts: None };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Ok(Self { vm, slots, state, pending: WrittenPages::with_len(bytes), open: false.into(), changed })
    }

    /// Makes room in the rings: for the thread of vCPU `vcpu`, which left KVM_RUN with KVM_EXIT_DIRTY_RING_FULL and
    /// may run on afterwards.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn make_room(&self, vcpu: usize) -> Result<(), KvmError> {
        let mut state = self.lock();
        self.harvest(&mut state, Some(vcpu), |page| self.note(page))?;
        self.reset(&mut state)
    }

    /// How many pages each vCPU has written since the log was started, a page once for each time that it was
    /// written after it was protected. Counts up to this moment, takes nothing out of the rings, and may be
    /// asked by anybody while the guest runs: of two answers the difference tells who writes how much. A KVM that
    /// interprets a guest notes each of its writes, so that they are counted rather.
    pub fn written_by_vcpu(&self) -> Vec<u64> {
        self.lock().rings.iter().map(|ring| ring.written + ring.waiting()).collect()
    }

    /// How many pages each vCPU was the first to write in each round, from when this was first asked since the log was
    /// started: what is to be sent because of it, and those that a source holds back. Unlike [`Rings::written_by_vcpu`] it counts a page once a round,
    /// whatever made it noted again: a ring that was full, or a KVM that interprets a guest. Takes nothing out of the
    /// rings.
    pub fn pages_by_vcpu(&self) -> Vec<u64> {
        let mut state = self.lock();
        let vcpus = state.rings.len();
        let end_page = self.slots.iter().map(|(_, extent)| extent.end_page()).max().unwrap_or(0);
        let words = usize::try_from(end_page.div_ceil(64)).expect("a domain's pages fit");
        if state.firsts.is_none() {
            state.firsts = Some(Firsts { written: vec![0; words], is_old: false, pages: vec![0; vcpus] });
            // they were reported, and what is written from now on counts as of the next round
            state.rings.iter_mut().for_each(Ring::skip_harvested);
        }
        self.look(&mut state);
        state.firsts.as_ref().map(|firsts| firsts.pages.clone()).unwrap_or_default()
    }

    /// Counts what was written since the last look, if it is asked for.
    fn look(&self, state: &mut State) {
        let Some(firsts) = &mut state.firsts else { return };
        if std::mem::take(&mut firsts.is_old) {
            firsts.written.fill(0);
        }
        for (ring, pages) in state.rings.iter_mut().zip(&mut firsts.pages) {
            ring.look(|slot, offset| {
                let Some(page) = self.page(slot, offset) else { return };
                let (word, bit) = (&mut firsts.written[(page / 64) as usize], 1 << (page % 64));
                *pages += u64::from(*word & bit == 0);
                *word |= bit;
            });
        }
    }

    /// The page that an entry names; `None` if it is not of the memory that moves.
    fn page(&self, slot: u32, offset: u64) -> Option<u64> {
        let extent = self.slots.iter().find(|(number, _)| *number == slot).map(|(_, extent)| extent);
        extent.filter(|extent| offset < extent.pages).map(|extent| extent.first_page + offset)
    }

    /// Empties the rings and counts anew: before a log is started.
    pub(super) fn begin(&self) -> Result<(), KvmError> {
        self.end()?;
        let mut state = self.lock();
        state.rings.iter_mut().for_each(|ring| ring.written = 0);
        state.firsts = None;
        Ok(())
    }

    /// Empties the rings: after a log was stopped.
    pub(super) fn end(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        self.harvest(&mut state, None, |_| {})?;
        self.pending.take(|_, _| {});
        self.reset(&mut state)
    }

    /// Whether pages may be unwatched since this was last asked: all of them are to be protected then, and
    /// reported.
    pub(super) fn take_lost(&self) -> bool {
        std::mem::take(&mut self.lock().lost)
    }

    /// Sets every page that is open, or was since the last report, in `dirty`.
    pub(super) fn report(&self, dirty: &mut Bitmap) -> Result<(), KvmError> {
        let mut state = self.lock();
        self.harvest(&mut state, None, |page| dirty.set(page))?;
        if let Some(firsts) = &mut state.firsts {
            firsts.is_old = true;
            state.rings.iter_mut().for_each(Ring::skip_harvested);
        }
        self.pending.take(|at, word| dirty.or_words(at as u64 * 64, &[word]));
        Ok(())
    }

    /// Protects all pages that were reported. Cheap where that was done.
    pub(super) fn protect(&self) -> Result<(), KvmError> {
        match self.open.load(Ordering::Acquire) {
            true => self.reset(&mut self.lock()),
            false => Ok(()),
        }
    }

    /// Has [`Rings::reap`] go on, or end.
    pub(super) fn reap_from_now(&self, on: bool) {
        self.lock().reaping = on;
        self.changed.notify_all();
    }

    /// Where rings run over, empties them before they are full, for as long as that is wanted.
    pub(super) fn reap(&self) {
        let mut state = self.lock();
        while state.reaping {
            if !state.runs_over {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.rings.iter().any(Ring::fills) {
                let emptied = self.harvest(&mut state, None, |page| self.note(page));
                if let Err(error) = emptied.and_then(|()| self.reset(&mut state)) {
                    // The log's owner will meet with it too.
                    tracing::warn!(%error, "dirty rings are left to fill");
                    return;
                }
            }
            let waited = self.changed.wait_timeout(state, REAP_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn note(&self, page: u64) {
        self.pending.mark_dirty((page * PAGE_BYTES) as usize, 1);
    }

    /// `own` is the vCPU whose thread this is, if it is one's. Where rings run over, each is reset before the next
    /// is harvested, since only then it is known which ring it was that KVM freed less of than it was to.
    fn harvest(
        &self,
        state: &mut State,
        own: Option<usize>,
        mut found: impl FnMut(u64),
    ) -> Result<(), KvmError> {
        self.look(state);
        for vcpu in 0..state.rings.len() {
            let found = |slot: u32, offset: u64| {
                if let Some(page) = self.page(slot, offset) {
                    found(page);
                }
            };
            let ring = &mut state.rings[vcpu];
            let harvest = if own == Some(vcpu) { ring.harvest_own(found) } else { ring.harvest(found) };
            if harvest == Harvest::Overrun {
                (state.lost, state.runs_over) = (true, true);
                self.changed.notify_all();
            }
            if state.runs_over {
                self.reset(state)?;
            }
        }
        self.open.store(state.rings.iter().any(|ring| ring.to_free() > 0), Ordering::Release);
        Ok(())
    }

    fn reset(&self, state: &mut State) -> Result<(), KvmError> {
        let _blocked = BlockedSignals::all()?;
        for _ in 0..RESET_ATTEMPTS {
            let to_free: Vec<usize> = state.rings.iter().map(Ring::to_free).collect();
            if to_free.iter().all(|count| *count == 0) {
                self.open.store(false, Ordering::Release);
                return Ok(());
            }
            let freed = ioctl::reset_dirty_rings(&self.vm)?;
            let ran_over = state.runs_over;
            state.freed(freed, to_free)?;
            if state.runs_over != ran_over {
                self.changed.notify_all();
            }
        }
        Err(KvmError::RingsNotReset)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No signal is delivered to this thread while it lives; one that comes waits.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn all() -> Result<Self, KvmError> {
        // SAFETY: plain data, for which zeros are valid.
        let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
        // SAFETY: two sets that live across the calls.
        let result = unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before)
        };
        match result {
            0 => Ok(Self { before }),
            code => Err(errno::Error::new(code)).call("pthread_sigmask"),
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: a set that `all` was given, and no old one asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
impl Rings {
    /// What a reset leaves that was interrupted: entries are freed, and their pages neither protected nor open.
    pub(super) fn interrupted(&self) {
        let mut state = self.lock();
        for ring in &mut state.rings {
            ring.harvest(|_, _| {});
            ring.misplace();
        }
        self.reset(&mut state).unwrap();
        state.lost = true;
    }
}
