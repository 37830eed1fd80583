//! What was checked and what was wrong, and the lines that say so.

use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::clock::{Clock, now_ns};

/// Errors told of one kind; all are counted.
const TOLD: u64 = 10;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    /// Pages whose pattern was compared.
    Patterns,
    /// Pages whose checksum was compared.
    Pages,
    /// Nodes of the heap that were visited.
    Nodes,
    /// Rounds of reading all clocks.
    Clocks,
    /// Time stamps handed from one CPU to another.
    Bounces,
    /// Expirations of the 1 s timer.
    Ticks,
    /// Short sleeps.
    Sleeps,
    /// Signals of a timer.
    Alarms,
    /// Messages through the pipes and back.
    Echoes,
    /// Signals that the other process acknowledged.
    Signals,
    /// Register sets compared.
    Fpu,
    /// Files re-read.
    Files,
}

const NAMES: [&str; 12] = [
    "patterns", "pages", "nodes", "clocks", "bounces", "ticks", "sleeps", "alarms", "echoes", "signals",
    "fpu", "files",
];

/// Something that should not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) what: &'static str,
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl Fault {
    pub(crate) fn new(what: &'static str, expected: impl Display, found: impl Display) -> Self {
        Self { what, expected: expected.to_string(), found: found.to_string() }
    }
}

/// Shared by all threads.
pub(crate) struct Report {
    counts: [AtomicU64; NAMES.len()],
    errors: AtomicU64,
    read_ns: AtomicU64,
    jump_ns: AtomicU64,
    late_ns: AtomicU64,
    late_limit: Duration,
    lines: AtomicU64,
    told: Mutex<Vec<(&'static str, u64)>>,
    steps: Mutex<Vec<Steps>>,
}

/// When a thread was last seen to begin a step.
struct Steps {
    thread: &'static str,
    seen_ns: Arc<AtomicU64>,
}

impl Report {
    pub(crate) fn new(late_limit: Duration) -> Self {
        Self {
            counts: Default::default(),
            errors: AtomicU64::new(0),
            read_ns: AtomicU64::new(0),
            jump_ns: AtomicU64::new(0),
            late_ns: AtomicU64::new(0),
            late_limit,
            lines: AtomicU64::new(0),
            told: Mutex::default(),
            steps: Mutex::default(),
        }
    }

    /// A timer that is later than this is an error.
    pub(crate) fn late_limit(&self) -> Duration {
        self.late_limit
    }

    pub(crate) fn checked(&self, what: Count, n: u64) {
        self.counts[what as usize].fetch_add(n, Relaxed);
    }

    /// Some thread read the monotonic clock: how far it went since any thread last did is a jump.
    pub(crate) fn clock_was_read(&self, mono_ns: u64) {
        let last_ns = self.read_ns.fetch_max(mono_ns, Relaxed);
        if last_ns != 0 {
            self.jump_ns.fetch_max(mono_ns.saturating_sub(last_ns), Relaxed);
        }
    }

    /// A timer was so late, unless it was an error.
    pub(crate) fn late(&self, lateness: Result<u64, Fault>) {
        match lateness {
            Ok(ns) => drop(self.late_ns.fetch_max(ns, Relaxed)),
            Err(fault) => self.error(&fault),
        }
    }

    /// Tells it, if that kind was not told often enough.
    pub(crate) fn error(&self, fault: &Fault) {
        self.errors.fetch_add(1, Relaxed);
        let times = {
            let mut told = self.told.lock().expect("no thread panics with it");
            let known = told.iter().position(|(what, _)| *what == fault.what);
            let at = known.unwrap_or_else(|| {
                told.push((fault.what, 0));
                told.len() - 1
            });
            told[at].1 += 1;
            told[at].1
        };
        if times <= TOLD {
            let last = if times == TOLD { " (no more of these are told)" } else { "" };
            print(&format!(
                "watch ERROR {}: expected {}, found {}{last}\n",
                fault.what, fault.expected, fault.found
            ));
        }
    }

    /// A thread will store the monotonic time there as it goes on.
    pub(crate) fn expect_steps(&self, thread: &'static str, seen_ns: Arc<AtomicU64>) {
        self.steps.lock().expect("no thread panics with it").push(Steps { thread, seen_ns });
    }

    /// Tells of threads that do not go on. `now_ns` is monotonic.
    pub(crate) fn look_for_stalls(&self, now_ns: u64) {
        let limit = self.late_limit.as_nanos();
        for Steps { thread, seen_ns } in &*self.steps.lock().expect("no thread panics with it") {
            let since = now_ns.saturating_sub(seen_ns.load(Relaxed));
            if u128::from(since) > limit {
                let expected = format!("a step within {} ms", limit / 1_000_000);
                self.error(&Fault::new(thread, expected, format!("none for {} ms", since / 1_000_000)));
            }
        }
    }

    /// The line of a second. Jump and lateness begin anew.
    pub(crate) fn line(&self) {
        let seq = self.lines.fetch_add(1, Relaxed) + 1;
        print(&self.format(seq, now_ns(Clock::Monotonic), now_ns(Clock::Realtime), crate::clock::tsc()));
    }

    /// The last line; answers how many errors there were.
    pub(crate) fn end(&self) -> u64 {
        let errors = self.errors.load(Relaxed);
        print(&format!("watch END lines={} errors={errors}\n", self.lines.load(Relaxed)));
        errors
    }

    fn format(&self, seq: u64, mono_ns: u64, real_ns: u64, tsc: u64) -> String {
        let mut line = format!(
            "watch {seq} mono_ms={} real_ms={} tsc={tsc} jump_ms={} late_ms={} errors={}",
            mono_ns / 1_000_000,
            real_ns / 1_000_000,
            tenths_of_ms(self.jump_ns.swap(0, Relaxed)),
            tenths_of_ms(self.late_ns.swap(0, Relaxed)),
            self.errors.load(Relaxed),
        );
        for (name, count) in NAMES.iter().zip(&self.counts) {
            write!(line, " {name}={}", count.load(Relaxed)).expect("a String takes everything");
        }
        line.push('\n');
        line
    }
}

fn tenths_of_ms(ns: u64) -> String {
    format!("{}.{}", ns / 1_000_000, ns / 100_000 % 10)
}

/// By one write, so that lines of several threads do not mix.
fn print(line: &str) {
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match nix::unistd::write(std::io::stdout(), rest) {
            Ok(n) => rest = &rest[n..],
            Err(nix::Error::EINTR) => {}
            // Nobody reads any more.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_everything_and_begins_jump_and_lateness_anew() {
        let report = Report::new(Duration::from_secs(5));
        report.checked(Count::Files, 3);
        report.checked(Count::Patterns, 7);
        for read_ns in [1_000, 2_000, 12_347_678, 12_347_600, 12_348_000] {
            report.clock_was_read(read_ns);
        }
        report.late(Ok(300_000));
        report.late(Err(Fault::new("a test", 1, 2)));
        let line = report.format(4, 5_000_000, 6_999_999, 8);
        assert!(
            line.starts_with(
                "watch 4 mono_ms=5 real_ms=6 tsc=8 jump_ms=12.3 late_ms=0.3 errors=1 patterns=7 "
            )
        );
        assert!(line.ends_with(" fpu=0 files=3\n"), "{line}");
        let line = report.format(5, 0, 0, 0);
        assert!(line.contains(" jump_ms=0.0 late_ms=0.0 errors=1 "), "{line}");
        assert_eq!(report.end(), 1);
    }

    #[test]
    fn a_thread_that_does_not_go_on_is_an_error() {
        let report = Report::new(Duration::from_secs(5));
        let seen = Arc::new(AtomicU64::new(1_000_000_000));
        report.expect_steps("a thread", seen.clone());
        report.look_for_stalls(5_900_000_000);
        assert_eq!(report.errors.load(Relaxed), 0);
        report.look_for_stalls(6_100_000_000);
        assert_eq!(report.errors.load(Relaxed), 1);
        seen.store(6_000_000_000, Relaxed);
        report.look_for_stalls(6_200_000_000);
        assert_eq!(report.errors.load(Relaxed), 1);
    }

    #[test]
    fn every_count_has_its_name() {
        assert_eq!(NAMES[Count::Patterns as usize], "patterns");
        assert_eq!(NAMES[Count::Bounces as usize], "bounces");
        assert_eq!(NAMES[Count::Signals as usize], "signals");
        assert_eq!(NAMES[Count::Files as usize], "files");
    }
}
