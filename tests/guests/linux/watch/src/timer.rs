//! Timers and sleeps: never early, and soon after they are due.

use std::thread;
use std::time::Duration;

use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};

use crate::clock::{Clock, now_ns};
use crate::duty::{Check, Duty};
use crate::report::{Count, Fault, Report};

const SECOND_NS: u64 = 1_000_000_000;
const NAP: Duration = Duration::from_millis(30);

/// How late something was, in ns.
///
/// # Errors
/// It was early, or later than the limit.
pub(crate) fn lateness(what: &'static str, due_ns: u64, now_ns: u64, limit: Duration) -> Result<u64, Fault> {
    match now_ns.checked_sub(due_ns) {
        None => Err(Fault::new(what, format!("not before {due_ns} ns"), format!("{now_ns} ns"))),
        Some(late) if u128::from(late) > limit.as_nanos() => Err(Fault::new(
            what,
            format!("at most {} ms late", limit.as_millis()),
            format!("{} ms", late / 1_000_000),
        )),
        Some(late) => Ok(late),
    }
}

/// Prints the report's line a second by a periodic absolute timer; `seconds` of them, or for ever with 0.
pub(crate) fn tick_every_second(report: &Report, seconds: u64) -> std::io::Result<()> {
    let timer = TimerFd::new(TimerClock::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    let start_ns = now_ns(Clock::Monotonic);
    let mut ticks = Ticks { start_ns, expired: 0 };
    timer.set(
        Expiration::IntervalDelayed(timespec(start_ns + SECOND_NS), timespec(SECOND_NS)),
        TimerSetTimeFlags::TFD_TIMER_ABSTIME,
    )?;
    let mut lines = 0;
    loop {
        let before_ns = now_ns(Clock::Monotonic);
        let mut expirations = [0; 8];
        match nix::unistd::read(&timer, &mut expirations) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let expirations = u64::from_ne_bytes(expirations);
        let after_ns = now_ns(Clock::Monotonic);
        report.late(ticks.expire(expirations, before_ns, after_ns, report.late_limit()));
        report.checked(Count::Ticks, expirations);
        report.look_for_stalls(after_ns);
        report.line();
        lines += 1;
        if lines == seconds {
            return Ok(());
        }
    }
}

/// What a periodic timer said.
struct Ticks {
    start_ns: u64,
    expired: u64,
}

impl Ticks {
    /// `expirations` were read at some time between these two.
    ///
    /// # Errors
    /// That cannot be all, or is too many; or the first of them was read too late.
    fn expire(
        &mut self,
        expirations: u64,
        before_ns: u64,
        after_ns: u64,
        limit: Duration,
    ) -> Result<u64, Fault> {
        let first_due_ns = self.start_ns + (self.expired + 1) * SECOND_NS;
        self.expired += expirations;
        let seconds = |ns: u64| ns.saturating_sub(self.start_ns) / SECOND_NS;
        let (least, most) = (seconds(before_ns), seconds(after_ns));
        if self.expired < least || self.expired > most {
            let fault = Fault::new("expirations of a 1 s timer", format!("{least} to {most}"), self.expired);
            self.expired = most;
            return Err(fault);
        }
        lateness("1 s timer", first_due_ns, after_ns, limit)
    }
}

fn timespec(ns: u64) -> TimeSpec {
    TimeSpec::nanoseconds(i64::try_from(ns).expect("centuries after 1970"))
}

/// Short sleeps, of both kinds in turns.
struct Sleeps {
    limit: Duration,
    relative: bool,
}

pub(crate) fn start(duty: &mut Duty) {
    let limit = duty.report.late_limit();
    duty.start(Sleeps { limit, relative: true });
}

impl Check for Sleeps {
    const NAME: &'static str = "sleeps";
    const PERIOD: Duration = Duration::from_millis(400);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        let nap_ns = u64::try_from(NAP.as_nanos()).expect("short");
        let lateness = if self.relative {
            let due = now_ns(Clock::Monotonic) + nap_ns;
            thread::sleep(NAP);
            lateness("nanosleep", due, now_ns(Clock::Monotonic), self.limit)
        } else {
            let due = now_ns(Clock::Realtime) + nap_ns;
            let until = timespec(due);
            while clock_nanosleep(ClockId::CLOCK_REALTIME, ClockNanosleepFlags::TIMER_ABSTIME, &until)
                .is_err()
            {}
            lateness("clock_nanosleep to a time of day", due, now_ns(Clock::Realtime), self.limit)
        };
        self.relative = !self.relative;
        report.late(lateness);
        report.checked(Count::Sleeps, 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn early_and_very_late_are_errors() {
        assert_eq!(lateness("t", 100, 100, LIMIT), Ok(0));
        assert_eq!(lateness("t", 100, 5_000_000_100, LIMIT), Ok(5_000_000_000));
        assert_eq!(lateness("t", 100, 99, LIMIT), Err(Fault::new("t", "not before 100 ns", "99 ns")));
        let fault = lateness("t", 100, 5_001_000_100, LIMIT).unwrap_err();
        assert_eq!(fault, Fault::new("t", "at most 5000 ms late", "5001 ms"));
    }

    #[test]
    fn ticks_that_are_lost_or_too_many_are_errors() {
        let s = SECOND_NS;
        let mut ticks = Ticks { start_ns: 10 * s, expired: 0 };
        assert_eq!(ticks.expire(1, 10 * s, 11 * s + 5, LIMIT), Ok(5));
        // Asleep over three more: the first of them was late.
        assert_eq!(ticks.expire(3, 11 * s + 7, 14 * s + 9, LIMIT), Ok(2 * s + 9));
        let fault = ticks.expire(2, 14 * s + 10, 15 * s + 1, LIMIT).unwrap_err();
        assert_eq!((fault.expected.as_str(), fault.found.as_str()), ("4 to 5", "6"));
        // One was due before it was read, and is not there.
        let fault = ticks.expire(1, 17 * s, 17 * s + 1, LIMIT).unwrap_err();
        assert_eq!((fault.expected.as_str(), fault.found.as_str()), ("7 to 7", "6"));
        assert_eq!(ticks.expire(1, 17 * s + 2, 18 * s, LIMIT), Ok(0));
    }
}
