//! Holds the page channels to a bandwidth cap, each on its own thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mig_core::pacing::{Grant, Pacing};

/// The cap that the channels of a migration share.
#[derive(Debug)]
pub(crate) struct Pacer {
    state: Mutex<State>,
    /// The cap is another, or there is nothing to wait for any more.
    changed: Condvar,
    /// Whether there is anything to ask for; only to spare the lock.
    capped: AtomicBool,
    began: Instant,
}

#[derive(Debug)]
struct State {
    pacing: Pacing,
    changes: u64,
}

impl Pacer {
    /// With a cap in bytes a second, or without one.
    pub(crate) fn new(cap: Option<u64>) -> Self {
        let state = State { pacing: Pacing::new(cap), changes: 0 };
        let capped = cap.is_some().into();
        Self { state: Mutex::new(state), changed: Condvar::new(), capped, began: Instant::now() }
    }

    /// Changes the cap, also for channels that wait for their turn. Lifting it lets all of them go.
    pub(crate) fn change(&self, cap: Option<u64>) {
        let mut state = self.lock();
        state.pacing.change(self.began.elapsed(), cap);
        state.changes += 1;
        self.capped.store(state.pacing.is_capped(), Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Waits until some of `wanted` bytes may be sent; how many that are.
    pub(crate) fn wait(&self, wanted: usize) -> usize {
        if !self.capped.load(Ordering::Relaxed) {
            return wanted;
        }
        let mut state = self.lock();
        loop {
            let changes = state.changes;
            let Grant { at, bytes } = state.pacing.grant(self.began.elapsed(), wanted as u64);
            state = self.until(state, at, changes);
            if state.changes == changes {
                return usize::try_from(bytes).unwrap_or(wanted);
            }
        }
    }

    /// Waits for that moment, or for a change.
    fn until<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        at: Duration,
        changes: u64,
    ) -> MutexGuard<'a, State> {
        while state.changes == changes
            && let Some(early) = at.checked_sub(self.began.elapsed()).filter(|early| !early.is_zero())
        {
            state = self.changed.wait_timeout(state, early).unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use mig_core::pacing::MIN_BYTES_PER_SECOND;

    use super::*;

    #[test]
    fn channels_that_wait_go_on_when_the_cap_is_lifted() {
        let pacer = Pacer::new(Some(MIN_BYTES_PER_SECOND));
        std::thread::scope(|scope| {
            // each grant is for 33 ms: 100 of them, each of its own channel, would take three seconds
            let waiting: Vec<_> = (0..100).map(|_| scope.spawn(|| pacer.wait(1 << 20))).collect();
            let began = Instant::now();
            while waiting.iter().filter(|w| w.is_finished()).count() < 2 {
                std::thread::yield_now();
            }
            pacer.change(None);
            let granted: Vec<usize> = waiting.into_iter().map(|w| w.join().unwrap()).collect();
            assert!(began.elapsed() < Duration::from_secs(2));
            assert!(granted.contains(&4096) && granted.contains(&(1 << 20)), "{granted:?}");
        });
    }
}
