//! How busy a guest is, from the processor time its vCPUs have used.

use std::time::{Duration, Instant};

/// Over less than this, slices of a throttle and of the host's scheduler are all there is to see.
const LEAST_TIME: Duration = Duration::from_millis(100);

/// What was seen last.
#[derive(Debug)]
pub(crate) struct Busy {
    at: Instant,
    times: Vec<Duration>,
}

impl Busy {
    pub(crate) fn new() -> Self {
        Self { at: Instant::now(), times: Vec::new() }
    }

    /// What the busiest vCPU used of a processor since the last look, in percent, where that is known. A look that
    /// follows too soon is none.
    pub(crate) fn look(&mut self, times: &[Duration]) -> Option<u8> {
        let now = Instant::now();
        if times.len() == self.times.len() && now.saturating_duration_since(self.at) < LEAST_TIME {
            return None;
        }
        let percent = percent(&self.times, times, now.saturating_duration_since(self.at));
        *self = Self { at: now, times: times.to_vec() };
        percent
    }
}

fn percent(before: &[Duration], now: &[Duration], passed: Duration) -> Option<u8> {
    let used = before.iter().zip(now).map(|(before, now)| now.saturating_sub(*before)).max()?;
    let percent = (used.as_nanos() * 100).div_ceil(passed.as_nanos().max(1)).min(100);
    u8::try_from(percent).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_vcpu_counts() {
        let ms = |times: [u64; 2]| times.map(Duration::from_millis);
        let over = Duration::from_millis(200);
        assert_eq!(percent(&ms([100, 500]), &ms([150, 510]), over), Some(25));
        assert_eq!(percent(&ms([0, 0]), &ms([900, 0]), over), Some(100), "no more than there is");
        assert_eq!(percent(&ms([7, 7]), &ms([7, 0]), Duration::ZERO), Some(0));
        assert_eq!(percent(&[], &ms([1, 1]), over), None, "the first look");
        assert_eq!(percent(&[], &[], over), None);
    }
}
