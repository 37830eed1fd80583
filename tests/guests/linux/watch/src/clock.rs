//! Clocks, and the rules they keep: they never go backwards, and nobody sets the time.

#![allow(unsafe_code)]

use nix::time::{ClockId, clock_gettime};

use crate::report::Fault;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    Monotonic,
    MonotonicRaw,
    Boottime,
    Realtime,
}

/// What a clock says, in ns.
pub(crate) fn now_ns(clock: Clock) -> u64 {
    let id = match clock {
        Clock::Monotonic => ClockId::CLOCK_MONOTONIC,
        Clock::MonotonicRaw => ClockId::CLOCK_MONOTONIC_RAW,
        Clock::Boottime => ClockId::CLOCK_BOOTTIME,
        Clock::Realtime => ClockId::CLOCK_REALTIME,
    };
    let time = clock_gettime(id).expect("Linux has these clocks");
    let whole = |n: i64| u64::try_from(n).expect("no time before 1970");
    whole(time.tv_sec()) * 1_000_000_000 + whole(time.tv_nsec())
}

/// The time stamp counter, read after everything before it (SDM volume 2, RDTSC: LFENCE before).
pub(crate) fn tsc() -> u64 {
    // SAFETY: x86-64 has SSE2, and no kernel here sets CR4.TSD.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

/// A clock that never goes backwards.
#[derive(Debug, Clone)]
pub(crate) struct Forward {
    what: &'static str,
    last: u64,
}

impl Forward {
    pub(crate) fn new(what: &'static str, first: u64) -> Self {
        Self { what, last: first }
    }

    /// How far it went.
    ///
    /// # Errors
    /// It went backwards.
    pub(crate) fn advance(&mut self, now: u64) -> Result<u64, Fault> {
        let last = std::mem::replace(&mut self.last, now);
        now.checked_sub(last).ok_or_else(|| Fault::new(self.what, format!("{last} or more"), now))
    }
}

/// Two clocks that are a constant apart, which nobody knows exactly: each reading narrows it down.
#[derive(Debug, Clone)]
pub(crate) struct Apart {
    what: &'static str,
    low: i128,
    high: i128,
}

impl Apart {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, low: i128::MIN, high: i128::MAX }
    }

    /// `other` was read after `before` and before `after`, of the first clock.
    ///
    /// # Errors
    /// No distance fits this reading and all before it. From then on only new readings count.
    pub(crate) fn narrow(&mut self, before: u64, other: u64, after: u64) -> Result<(), Fault> {
        let (low, high) = (i128::from(other) - i128::from(after), i128::from(other) - i128::from(before));
        let (known_low, known_high) = (self.low, self.high);
        self.low = known_low.max(low);
        self.high = known_high.min(high);
        if self.low <= self.high {
            return Ok(());
        }
        (self.low, self.high) = (low, high);
        Err(Fault::new(self.what, format!("{known_low} to {known_high} ns"), format!("{low} to {high} ns")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_goes_backwards_is_an_error() {
        let mut clock = Forward::new("a clock", 10);
        assert_eq!(clock.advance(10), Ok(0));
        assert_eq!(clock.advance(15), Ok(5));
        assert_eq!(clock.advance(14), Err(Fault::new("a clock", "15 or more", 14)));
        assert_eq!(clock.advance(15), Ok(1));
    }

    #[test]
    fn a_clock_that_is_set_is_an_error_once() {
        let mut apart = Apart::new("real against mono");
        apart.narrow(100, 1_105, 110).unwrap();
        apart.narrow(200, 1_202, 204).unwrap();
        let fault = apart.narrow(300, 1_310, 304).unwrap_err();
        assert_eq!(fault, Fault::new("real against mono", "998 to 1002 ns", "1006 to 1010 ns"));
        apart.narrow(400, 1_409, 404).unwrap();
        apart.narrow(500, 1_501, 504).unwrap_err();
    }

    #[test]
    fn the_clocks_of_this_machine_keep_the_rules() {
        let mut mono = Forward::new("mono", 0);
        let mut tsc_forward = Forward::new("tsc", 0);
        let mut boot = Apart::new("boot against mono");
        for _ in 0..1000 {
            let before = now_ns(Clock::Monotonic);
            let other = now_ns(Clock::Boottime);
            boot.narrow(before, other, now_ns(Clock::Monotonic)).unwrap();
            mono.advance(before).unwrap();
            tsc_forward.advance(tsc()).unwrap();
        }
    }
}
