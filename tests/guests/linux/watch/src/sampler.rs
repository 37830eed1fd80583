//! Reads the clocks again and again. The largest step between two successive readings, by whichever thread, is the
//! pause as the guest sees it, or up to a nap more.

use std::thread;
use std::time::Duration;

use crate::clock::{Apart, Clock, Forward, now_ns, tsc};
use crate::duty::{Duty, On};
use crate::priority;
use crate::report::Count;

/// From one reading to the next at most, and with `--spin`.
const NAP: Duration = Duration::from_millis(40);
const SHORT_NAP: Duration = Duration::from_millis(8);

/// Starts the sampler, which goes before all others on its CPU, so that it need not wait for its turn; and when
/// spinning a second one, which reads clocks for as long as nothing else is to be done.
pub(crate) fn start(duty: &mut Duty) {
    let nap = if duty.spin { SHORT_NAP } else { NAP };
    duty.thread("sampler", move |on| {
        priority::before_all_others();
        let mut clocks = Clocks::new();
        while on.goes_on() {
            thread::sleep(nap);
            clocks.read(on);
        }
    });
    if duty.spin {
        duty.thread("spinner", |on| {
            priority::after_all_others();
            let mut clocks = Clocks::new();
            while on.goes_on() {
                clocks.read(on);
            }
        });
    }
}

struct Clocks {
    monotonic: Forward,
    raw: Forward,
    boottime: Forward,
    tsc: Forward,
    realtime: Apart,
}

impl Clocks {
    fn new() -> Self {
        Self {
            monotonic: Forward::new("CLOCK_MONOTONIC", now_ns(Clock::Monotonic)),
            raw: Forward::new("CLOCK_MONOTONIC_RAW", now_ns(Clock::MonotonicRaw)),
            boottime: Forward::new("CLOCK_BOOTTIME", now_ns(Clock::Boottime)),
            tsc: Forward::new("time stamp counter", tsc()),
            realtime: Apart::new("CLOCK_REALTIME against CLOCK_MONOTONIC"),
        }
    }

    /// Reads them all, once.
    fn read(&mut self, on: &On) {
        let before = now_ns(Clock::Monotonic);
        let real = now_ns(Clock::Realtime);
        let after = now_ns(Clock::Monotonic);
        on.report.clock_was_read(before);
        on.report.clock_was_read(after);
        let faults = [
            self.monotonic.advance(before).and_then(|_| self.monotonic.advance(after)).err(),
            self.realtime.narrow(before, real, after).err(),
            self.raw.advance(now_ns(Clock::MonotonicRaw)).err(),
            self.boottime.advance(now_ns(Clock::Boottime)).err(),
            self.tsc.advance(tsc()).err(),
        ];
        faults.into_iter().flatten().for_each(|fault| on.report.error(&fault));
        on.report.checked(Count::Clocks, 1);
    }
}
