//! The threads that check, how often each does, and whether each still does.
//!
//! In a guest whose kernel is interpreted a wake-up costs a millisecond, so the pauses between two steps decide what
//! watching costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::clock::{Clock, now_ns};
use crate::report::{Fault, Report};

/// Something that is checked again and again.
pub(crate) trait Check: Send + 'static {
    /// Its thread's name.
    const NAME: &'static str;

    /// From one step to the next, when the guest is to idle; with `--spin` a quarter.
    const PERIOD: Duration;

    /// Does a little, in a few milliseconds at most.
    ///
    /// # Errors
    /// What was wrong.
    fn step(&mut self, report: &Report) -> Result<(), Fault>;
}

/// The threads.
pub(crate) struct Duty {
    pub(crate) report: Arc<Report>,
    pub(crate) spin: bool,
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Duty {
    pub(crate) fn begin(report: &Arc<Report>, spin: bool) -> Self {
        Self { report: report.clone(), spin, ended: Arc::default(), threads: Vec::new() }
    }

    /// A thread that does the check's steps.
    pub(crate) fn start<C: Check>(&mut self, mut check: C) {
        let period = if self.spin { C::PERIOD / 4 } else { C::PERIOD };
        self.thread(C::NAME, move |on| {
            while on.goes_on() {
                if let Err(fault) = check.step(&on.report) {
                    on.report.error(&fault);
                }
                thread::sleep(period);
            }
        });
    }

    /// A thread that does anything for as long as it may.
    pub(crate) fn thread(&mut self, name: &'static str, body: impl FnOnce(&On) + Send + 'static) {
        let seen_ns = Arc::new(AtomicU64::new(now_ns(Clock::Monotonic)));
        self.report.expect_steps(name, seen_ns.clone());
        let on = On { report: self.report.clone(), ended: self.ended.clone(), seen_ns };
        let thread = thread::Builder::new().name(name.into()).spawn(move || body(&on));
        self.threads.push(thread.expect("a thread can be started"));
    }

    /// Ends and joins all threads.
    pub(crate) fn end(self) {
        self.ended.store(true, Relaxed);
        for thread in self.threads {
            thread.join().expect("a check does not panic");
        }
    }
}

/// What a thread is given.
pub(crate) struct On {
    pub(crate) report: Arc<Report>,
    ended: Arc<AtomicBool>,
    seen_ns: Arc<AtomicU64>,
}

impl On {
    /// To be asked before each step, which is how a thread that got stuck is noticed.
    pub(crate) fn goes_on(&self) -> bool {
        self.seen_ns.store(now_ns(Clock::Monotonic), Relaxed);
        !self.ended.load(Relaxed)
    }
}
