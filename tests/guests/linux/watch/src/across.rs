//! Two CPUs hand time stamps to each other: neither may see the other's before its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::thread;
use std::time::Duration;

use crate::clock::{Clock, now_ns, tsc};
use crate::duty::{Duty, On};
use crate::fpu::{cpus, pin};
use crate::report::{Count, Fault};

/// Both sides wake when the monotonic clock is a multiple of this.
const PERIOD_NS: u64 = 500_000_000;
/// A side that the other keeps waiting so long gives up this meeting.
const PATIENCE_NS: u64 = 20_000_000;
const BOUNCES: u64 = 50;

/// What one CPU tells the other. The number is stored last and read first.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Stamp {
    number: AtomicU64,
    tsc: AtomicU64,
    mono_ns: AtomicU64,
}

impl Stamp {
    fn store(&self, number: u64, (tsc, mono_ns): (u64, u64)) {
        self.tsc.store(tsc, Relaxed);
        self.mono_ns.store(mono_ns, Relaxed);
        self.number.store(number, Release);
    }

    /// None if it is another one.
    fn load(&self, number: u64) -> Option<(u64, u64)> {
        (self.number.load(Acquire) == number).then(|| (self.tsc.load(Relaxed), self.mono_ns.load(Relaxed)))
    }
}

/// Both directions.
type Stamps = Arc<[Stamp; 2]>;

pub(crate) fn start(duty: &mut Duty) -> io::Result<()> {
    let cpus = cpus()?;
    if let [first, second, ..] = cpus[..] {
        let stamps = Stamps::default();
        for (side, cpu) in [first, second].into_iter().enumerate() {
            let stamps = stamps.clone();
            duty.thread("across CPUs", move |on| {
                if let Err(fault) = pin(cpu) {
                    on.report.error(&fault);
                }
                while on.goes_on() {
                    let now = now_ns(Clock::Monotonic);
                    thread::sleep(Duration::from_nanos(PERIOD_NS - now % PERIOD_NS));
                    meet(on, &stamps, side);
                }
            });
        }
    }
    Ok(())
}

/// Numbers of a meeting follow from its time, so that both sides know them.
fn meet(on: &On, stamps: &[Stamp; 2], side: usize) {
    let first = now_ns(Clock::Monotonic) / PERIOD_NS * BOUNCES * 2 + 1;
    let until = now_ns(Clock::Monotonic) + PATIENCE_NS;
    for number in first..first + BOUNCES * 2 {
        let turn = usize::from(number % 2 == 0);
        if turn == side {
            stamps[side].store(number, (tsc(), now_ns(Clock::Monotonic)));
            continue;
        }
        let sent = loop {
            if let Some(sent) = stamps[turn].load(number) {
                break sent;
            }
            if now_ns(Clock::Monotonic) > until {
                return;
            }
            std::hint::spin_loop();
        };
        if let Err(fault) = later(sent, (tsc(), now_ns(Clock::Monotonic))) {
            on.report.error(&fault);
        }
        on.report.checked(Count::Bounces, 1);
    }
}

fn later(sent: (u64, u64), here: (u64, u64)) -> Result<(), Fault> {
    if here.0 < sent.0 {
        return Err(Fault::new("time stamp counters of two CPUs", format!("{} or more", sent.0), here.0));
    }
    if here.1 < sent.1 {
        return Err(Fault::new("CLOCK_MONOTONIC on two CPUs", format!("{} or more", sent.1), here.1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_from_the_future_is_an_error() {
        assert_eq!(later((5, 9), (5, 9)), Ok(()));
        assert_eq!(later((6, 9), (5, 9)).unwrap_err().what, "time stamp counters of two CPUs");
        assert_eq!(later((5, 9), (5, 8)).unwrap_err().what, "CLOCK_MONOTONIC on two CPUs");
    }

    #[test]
    fn a_stamp_is_seen_whole_or_not_at_all() {
        let stamp = Stamp::default();
        stamp.store(3, (7, 8));
        assert_eq!((stamp.load(3), stamp.load(4)), (Some((7, 8)), None));
    }
}
