//! Holds the page channels to a bandwidth cap, each on its own thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mig_core::pacing::Pacing;

/// The cap that the channels of a migration share.
#[derive(Debug)]
pub(crate) struct Pacer {
    pacing: Mutex<Pacing>,
    /// Whether there is anything to ask for; only to spare the lock.
    capped: AtomicBool,
    began: Instant,
}

impl Pacer {
    /// With a cap in bytes a second, or without one.
    pub(crate) fn new(cap: Option<u64>) -> Self {
        Self { pacing: Mutex::new(Pacing::new(cap)), capped: cap.is_some().into(), began: Instant::now() }
    }

    /// Changes the cap. Channels that wait for their turn still do: for milliseconds.
    pub(crate) fn change(&self, cap: Option<u64>) {
        let mut pacing = self.pacing.lock().unwrap_or_else(PoisonError::into_inner);
        pacing.change(cap);
        self.capped.store(pacing.is_capped(), Ordering::Relaxed);
    }

    /// Waits until some of `wanted` bytes may be sent; how many that are.
    pub(crate) fn wait(&self, wanted: usize) -> usize {
        if !self.capped.load(Ordering::Relaxed) {
            return wanted;
        }
        let now = self.began.elapsed();
        let grant = self.pacing.lock().unwrap_or_else(PoisonError::into_inner).grant(now, wanted as u64);
        let early = grant.at.saturating_sub(now);
        if early > Duration::ZERO {
            std::thread::sleep(early);
        }
        usize::try_from(grant.bytes).unwrap_or(wanted)
    }
}
