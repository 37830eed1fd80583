//! A timer that sends SIGALRM: its handler runs once each time, never early.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

use crate::clock::{Clock, now_ns};
use crate::duty::Duty;
use crate::report::{Count, Fault};
use crate::timer::lateness;

const AHEAD_NS: u64 = 50_000_000;
const PAUSE: Duration = Duration::from_millis(600);

/// Runs of the handler.
static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handler(_: libc::c_int) {
    HANDLED.fetch_add(1, Relaxed);
}

/// Blocks the signal in this thread and those it will start, and installs the handler.
pub(crate) fn block() -> std::io::Result<()> {
    let mut alarm = SigSet::empty();
    alarm.add(Signal::SIGALRM);
    alarm.thread_block()?;
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing but an atomic addition.
    unsafe { sigaction(Signal::SIGALRM, &action)? };
    Ok(())
}

pub(crate) fn start(duty: &mut Duty) {
    let pause = if duty.spin { PAUSE / 4 } else { PAUSE };
    duty.thread("alarms", move |on| {
        let event = SigEvent::new(SigevNotify::SigevSignal { signal: Signal::SIGALRM, si_value: 0 });
        let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, event).expect("Linux has timers");
        while on.goes_on() {
            on.report.late(ring(&mut timer, on.report.late_limit()));
            on.report.checked(Count::Alarms, 1);
            thread::sleep(pause);
        }
    });
}

/// Sets the timer and waits for it; answers how late it was.
fn ring(timer: &mut Timer, limit: Duration) -> Result<u64, Fault> {
    let handled = HANDLED.load(Relaxed);
    let due = now_ns(Clock::Monotonic) + AHEAD_NS;
    let at = Expiration::OneShot(TimeSpec::nanoseconds(i64::try_from(due).expect("centuries after 1970")));
    timer
        .set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME)
        .and_then(|()| SigSet::empty().suspend())
        // That let the signal in and waited, in one: it cannot slip by. A lost one is a stall.
        .map_err(|e| Fault::new("a timer with a signal", "success", e))?;
    let now = now_ns(Clock::Monotonic);
    once(handled, HANDLED.load(Relaxed))?;
    lateness("SIGALRM of a timer", due, now, limit)
}

fn once(before: u64, after: u64) -> Result<(), Fault> {
    match after - before {
        1 => Ok(()),
        runs => Err(Fault::new("runs of a SIGALRM handler", 1, runs)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_lost_or_doubled_is_an_error() {
        assert_eq!(once(5, 6), Ok(()));
        assert_eq!(once(5, 7), Err(Fault::new("runs of a SIGALRM handler", 1, 2)));
        assert!(once(5, 5).is_err());
    }
}
