//! Slowing a guest: its vCPUs are held out of KVM_RUN for a part of the time.
//!
//! Two gears. By time: all of them for a part of each slice. Together, not in turn: a vCPU that waits for a lock whose
//! holder is held makes nothing but heat. By pages, where it is known who writes how many: each whenever it has written
//! its share (`pages`), so that computing and reading cost nothing. A held vCPU is out of KVM_RUN, so a pause finds it
//! so.

mod pages;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mig::policy::Throttle;

use crate::kick::Gate;
use pages::{Allowance, Done, Speeds};

/// How long a slice is, if what is left to the guest of it is [`LEAST_FREE`]: short, since timers are late by what is
/// held of it.
const SLICE: Duration = Duration::from_millis(10);
/// Less at a time is lost on the way in and out; more makes the slices of a guest that is held for nearly all of them
/// long, and so its gap, should the pause come at the end of one.
const LEAST_FREE: Duration = Duration::from_micros(250);

/// Nobody is held for longer at a time: a guest's own watchdogs look on.
const LONGEST_HELD: Duration = Duration::from_millis(100);

/// Slows the vCPUs of a gate. Dropping it gives them all their time.
#[derive(Debug)]
pub struct Throttler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How many pages each vCPU has written so far.
pub type Counts = Box<dyn Fn() -> Vec<u64> + Send + Sync>;

/// How long vCPUs are watched before they are slowed by pages.
const WATCHED: Duration = Duration::from_millis(100);
/// What they write is looked at this often: a vCPU writes some hundred pages in the meantime.
const LOOK_INTERVAL: Duration = Duration::from_micros(500);
/// Who writes less than this part of what the busiest writer does is none.
const LEAST_PART: u64 = 10;

struct Shared {
    gate: Arc<Gate>,
    counts: Option<Counts>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Wanted {
    throttle: Throttle,
    ended: bool,
}

impl Throttler {
    /// One that slows nothing yet.
    pub fn new(gate: Arc<Gate>) -> Self {
        Self::over(gate, None)
    }

    /// One that holds vCPUs by the pages that they write, by these counts.
    pub fn by_pages(gate: Arc<Gate>, counts: Counts) -> Self {
        Self::over(gate, Some(counts))
    }

    fn over(gate: Arc<Gate>, counts: Option<Counts>) -> Self {
        let shared = Shared { gate, counts, wanted: Mutex::default(), changed: Condvar::new() };
        Self { shared: Arc::new(shared), thread: None }
    }

    /// Holds every vCPU for this part of the time from now on, or, by pages, whenever they have written as much as they
    /// would then. [`Throttle::NONE`] lets all of them go at once.
    ///
    /// # Errors
    /// The host gives no thread for it; nothing is held then.
    pub fn set(&mut self, throttle: Throttle) -> std::io::Result<()> {
        if self.thread.is_none() && !throttle.is_none() {
            let shared = self.shared.clone();
            let named = std::thread::Builder::new().name("throttle".into());
            self.thread = Some(named.spawn(move || shared.work())?);
        }
        self.shared.want(Wanted { throttle, ended: false });
        Ok(())
    }
}

impl Drop for Throttler {
    fn drop(&mut self) {
        self.shared.want(Wanted { throttle: Throttle::NONE, ended: true });
        if let Some(thread) = self.thread.take() {
            // it has nothing that could panic but a poisoned gate and what counts pages
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn want(&self, wanted: Wanted) {
        let mut now = self.lock();
        *now = wanted;
        if wanted.throttle.is_none() {
            self.gate.release();
        }
        self.changed.notify_all();
    }

    fn work(&self) {
        match &self.counts {
            None => self.by_time(),
            Some(counts) => self.by_pages(counts),
        }
    }

    /// Under the lock whenever it holds or releases, so that who wanted an end is not overtaken.
    fn by_time(&self) {
        let mut wanted = self.lock();
        while !wanted.ended {
            if wanted.throttle.is_none() {
                wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let free = free_of_a_slice(wanted.throttle);
            let released = Instant::now();
            wanted = self.wait(wanted, free);
            if wanted.throttle.is_none() {
                continue;
            }
            // on a busy host this thread is late, and they ran for longer
            let held = held_for(wanted.throttle, released.elapsed());
            self.gate.hold(|_| true);
            wanted = self.wait(wanted, held);
            self.gate.release();
        }
    }

    /// Under the lock as [`Shared::by_time`], but for counting: that may wait for the rings, and nobody who lets go of
    /// vCPUs waits for it.
    fn by_pages(&self, counts: &Counts) {
        let mut unslowed: Option<Speeds> = None;
        let mut wanted = self.lock();
        while !wanted.ended {
            if wanted.throttle.is_none() {
                unslowed = None;
                wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let throttle = wanted.throttle;
            drop(wanted);
            match &unslowed {
                // while nobody writes there is nobody to slow
                None => unslowed = self.watch(counts),
                Some(speeds) => self.hold_to(throttle, speeds, counts),
            }
            wanted = self.lock();
        }
    }

    /// How fast vCPUs write that are not slowed; `None` if they write nothing, or are not to be slowed any more.
    fn watch(&self, counts: &Counts) -> Option<Speeds> {
        let before = self.done(counts);
        let mut wanted = self.lock();
        while !wanted.throttle.is_none() {
            let left = WATCHED.checked_sub(before.at.elapsed()).filter(|left| !left.is_zero());
            let Some(left) = left else {
                drop(wanted);
                return Speeds::between(&before, &self.done(counts));
            };
            wanted = self.wait(wanted, left);
        }
        None
    }

    /// Until another throttle is wanted.
    fn hold_to(&self, throttle: Throttle, speeds: &Speeds, counts: &Counts) {
        let mut allowance = Allowance::new(throttle, speeds.quota(throttle), Instant::now(), counts());
        loop {
            let pages = counts();
            let wanted = self.lock();
            if wanted.throttle != throttle {
                // who wanted none has let them go
                if !wanted.throttle.is_none() {
                    self.gate.release();
                }
                return;
            }
            if allowance.look(Instant::now(), pages) {
                self.gate.hold(|index| allowance.holds(index));
            }
            drop(self.wait(wanted, LOOK_INTERVAL));
        }
    }

    fn done(&self, counts: &Counts) -> Done {
        Done { at: Instant::now(), pages: counts(), processor_times: self.gate.processor_times() }
    }

    /// Waits so long, or until something else is wanted.
    fn wait<'a>(&'a self, wanted: MutexGuard<'a, Wanted>, time: Duration) -> MutexGuard<'a, Wanted> {
        let before = *wanted;
        let waited = self.changed.wait_timeout_while(wanted, time, |now| *now == before);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

/// Which vCPUs write at least a tenth of what the busiest does, by what each has written.
pub fn writers(written: &[u64]) -> Vec<bool> {
    let most = written.iter().copied().max().unwrap_or(0);
    written.iter().map(|count| count.saturating_mul(LEAST_PART) >= most).collect()
}

/// How long vCPUs run at a time.
fn free_of_a_slice(throttle: Throttle) -> Duration {
    (SLICE * u32::from(throttle.kept_percent()) / 100).max(LEAST_FREE)
}

/// How long they are held after they ran for so long.
fn held_for(throttle: Throttle, ran: Duration) -> Duration {
    (ran * u32::from(throttle.percent()) / u32::from(throttle.kept_percent())).min(LONGEST_HELD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_has_its_parts_in_proportion_and_the_guest_some_of_it_at_least() {
        let us = |percent| {
            let throttle = Throttle::of_percent(percent);
            let free = free_of_a_slice(throttle);
            (held_for(throttle, free).as_micros(), free.as_micros())
        };
        assert_eq!(us(20), (2000, 8000));
        assert_eq!(us(90), (9000, 1000));
        assert_eq!(us(99), (24_750, 250));
    }

    #[test]
    fn who_ran_for_too_long_is_held_for_as_much_longer_within_bounds() {
        let ms =
            |percent, ran| held_for(Throttle::of_percent(percent), Duration::from_millis(ran)).as_millis();
        assert_eq!(ms(50, 30), 30);
        assert_eq!(ms(90, 10), 90);
        assert_eq!(ms(95, 5000), 100);
    }

    #[test]
    fn who_writes_a_tenth_of_what_the_busiest_does_is_a_writer_and_all_are_where_nobody_is() {
        assert_eq!(writers(&[1000, 100, 99]), [true, true, false]);
        assert_eq!(writers(&[0, 0]), [true, true]);
    }

    #[test]
    fn a_throttler_that_slowed_nothing_ends_without_a_thread() {
        let mut throttler = Throttler::new(Arc::new(Gate::new(2).unwrap()));
        throttler.set(Throttle::NONE).unwrap();
        assert!(throttler.thread.is_none());
        throttler.set(Throttle::of_percent(50)).unwrap();
        drop(throttler);
    }
}
