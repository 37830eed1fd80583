//! The heartbeat port: a write is one sign of life, stamped with CLOCK_MONOTONIC.
//!
//! Cheap, since guests write it thousands of times a second: a clock read and three relaxed atomics.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

pub(crate) const PORT: u16 = crate::workload::HEARTBEAT_PORT;

/// Counts heartbeats; times are nanoseconds of CLOCK_MONOTONIC, 0 for never.
#[derive(Debug, Default)]
pub(crate) struct Heartbeat {
    count: AtomicU64,
    last_ns: AtomicU64,
    first_here_ns: AtomicU64,
}

/// What moves with the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeartbeatState {
    pub(crate) count: u64,
    pub(crate) last_ns: u64,
}

impl Heartbeat {
    pub(crate) fn beat(&self) {
        let now = now_ns();
        self.count.fetch_add(1, Relaxed);
        self.last_ns.store(now, Relaxed);
        if self.first_here_ns.load(Relaxed) == 0 {
            self.first_here_ns.store(now, Relaxed);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    pub(crate) fn last_ns(&self) -> u64 {
        self.last_ns.load(Relaxed)
    }

    /// The first one since this machine was made or restored.
    pub(crate) fn first_here_ns(&self) -> u64 {
        self.first_here_ns.load(Relaxed)
    }

    pub(crate) fn save(&self) -> HeartbeatState {
        HeartbeatState { count: self.count(), last_ns: self.last_ns() }
    }

    pub(crate) fn restore(&self, state: HeartbeatState) {
        self.count.store(state.count, Relaxed);
        self.last_ns.store(state.last_ns, Relaxed);
        self.first_here_ns.store(0, Relaxed);
    }
}

#[allow(unsafe_code)]
fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is valid for writes. The clock exists, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_on_after_a_restore_and_the_first_beat_here_is_known() {
        let there = Heartbeat::default();
        there.beat();
        there.beat();
        let here = Heartbeat::default();
        here.beat();
        here.restore(there.save());
        assert_eq!((here.count(), here.last_ns(), here.first_here_ns()), (2, there.last_ns(), 0));
        here.beat();
        here.beat();
        assert_eq!(here.count(), 4);
        assert!(there.last_ns() <= here.first_here_ns() && here.first_here_ns() <= here.last_ns());
    }
}
