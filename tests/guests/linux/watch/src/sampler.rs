//! Reads the clocks again and again. The largest step between two readings is the pause as the guest sees it.

use std::thread;
use std::time::Duration;

use crate::clock::{Apart, Clock, Forward, now_ns, tsc};
use crate::duty::{Duty, On};
use crate::report::{Count, Fault};

/// Between two readings when the guest is to idle; what a jump is above this.
const NAP: Duration = Duration::from_millis(40);
/// Readings of the monotonic clock for one of all others, when spinning.
const MONOTONIC_READINGS: u64 = 64;

pub(crate) fn start(duty: &mut Duty) {
    if duty.spin {
        duty.thread("sampler", |on| {
            lowest_priority();
            let mut clocks = Clocks::new();
            while on.goes_on() {
                sample(on, &mut clocks, MONOTONIC_READINGS, Duration::ZERO);
            }
        });
    } else {
        duty.thread("sampler", |on| {
            let mut clocks = Clocks::new();
            while on.goes_on() {
                thread::sleep(NAP);
                sample(on, &mut clocks, 1, NAP);
            }
        });
    }
}

fn sample(on: &On, clocks: &mut Clocks, readings: u64, expected: Duration) {
    let expected = u64::try_from(expected.as_nanos()).expect("short");
    for _ in 0..readings {
        match clocks.monotonic.advance(now_ns(Clock::Monotonic)) {
            Ok(ns) => on.report.jumped(ns.saturating_sub(expected)),
            Err(fault) => on.report.error(&fault),
        }
    }
    clocks.read_others().into_iter().for_each(|fault| on.report.error(&fault));
    on.report.checked(Count::Clocks, 1);
}

/// Whatever else is to be done on this CPU is done first, so that a jump is not waiting for its turn.
fn lowest_priority() {
    #![allow(unsafe_code)]
    // SAFETY: takes numbers only; 0 is the calling thread. Without effect it is as good as before.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
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

    fn read_others(&mut self) -> Vec<Fault> {
        let before = now_ns(Clock::Monotonic);
        let real = now_ns(Clock::Realtime);
        let after = now_ns(Clock::Monotonic);
        [
            self.realtime.narrow(before, real, after).err(),
            self.raw.advance(now_ns(Clock::MonotonicRaw)).err(),
            self.boottime.advance(now_ns(Clock::Boottime)).err(),
            self.tsc.advance(tsc()).err(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
