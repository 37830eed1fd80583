//! Where and when a guest writes: one pattern, or phases of several.

use mig_core::policy::Throttle;

use crate::random::Random;
use crate::scenario::{Pattern, Scenario};

/// A phase has so many writes.
const PHASE_WRITES: u64 = 25;

/// What a guest writes next.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    profile: Pattern,
    pattern: Pattern,
    /// Nanoseconds between two writes: in general, and now.
    usual: u64,
    every: u64,
    next_at: u64,
    writes: u64,
    random: Random,
}

impl Writer {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        let (profile, usual) = (scenario.pattern, scenario.write_every);
        let pattern = if profile == Pattern::Phases { Pattern::Uniform } else { profile };
        let random = Random::new(scenario.speed.latency ^ usual);
        Self { profile, pattern, usual, every: usual, next_at: 0, writes: 0, random }
    }

    /// Writes again only after `now`.
    pub(crate) fn restart(&mut self, now: u64) {
        self.next_at = now + self.every;
    }

    /// Which of `count` places it writes next, unless that comes after `now`.
    pub(crate) fn next_until(&mut self, now: u64, count: u64, throttle: Throttle) -> Option<u64> {
        while self.next_at <= now {
            self.next_at += self.every * 100 / u64::from(throttle.kept_percent());
            self.writes += 1;
            let pattern = self.pattern;
            if self.profile == Pattern::Phases && self.writes.is_multiple_of(PHASE_WRITES) {
                self.change();
            }
            match pattern {
                Pattern::Sequential => return Some(self.writes % count),
                Pattern::Hot => return Some(self.random.within(0..count.min(3))),
                Pattern::Uniform | Pattern::Phases => return Some(self.random.within(0..count)),
                Pattern::Idle => {}
            }
        }
        None
    }

    fn change(&mut self) {
        let all = [Pattern::Uniform, Pattern::Hot, Pattern::Sequential, Pattern::Idle];
        self.pattern = self.random.one_of(&all);
        self.every = self.usual * self.random.within(1..8) / 2 + 1;
    }
}
