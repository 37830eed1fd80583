//! What encoding takes, as time on the wall without what others took of that.
//!
//! A channel that waits for a core waits for other channels, which encode too: that counts, for they share the cores for
//! as long as encoding goes on. Or it waits for somebody else, once: that does not.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// Work that has begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    began: Instant,
    /// Processor time of this thread; not known on a host without that clock.
    used: Option<Duration>,
}

impl Effort {
    pub(super) fn begin() -> Self {
        Self { began: Instant::now(), used: used() }
    }

    /// What it took, where so many channels share each core: at least one.
    pub(super) fn took(&self, sharing: f64) -> Duration {
        let wall = self.began.elapsed();
        match (self.used, used()) {
            (Some(before), Some(now)) => wall.min(now.saturating_sub(before).mul_f64(sharing)),
            _ => wall,
        }
    }
}

/// How many of so many channels share a core.
pub(super) fn sharing(channels: usize) -> f64 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (channels as f64 / cores as f64).max(1.0)
}

fn used() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nothing_is_done_here_takes_nothing() {
        let effort = Effort::begin();
        std::thread::sleep(Duration::from_millis(50));
        let took = effort.took(1.0);
        assert!(took < Duration::from_millis(25), "{took:?} of 50 ms");
    }

    #[test]
    fn work_takes_as_much_longer_as_cores_are_shared_and_never_longer_than_it_did() {
        let effort = Effort::begin();
        let mut sum = 0_u64;
        while effort.took(1.0) < Duration::from_millis(5) {
            sum = std::hint::black_box(sum.wrapping_mul(3) + 1);
        }
        let (alone, shared) = (effort.took(1.0), effort.took(1.5));
        assert!(alone >= Duration::from_millis(5) && shared >= alone, "{alone:?} {shared:?}");
        assert!(effort.took(1e6) <= effort.began.elapsed());
    }
}
