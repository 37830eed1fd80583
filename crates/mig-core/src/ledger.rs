//! What a source's machine notes down on the way, for its report.

use std::time::Duration;

use mig_wire::describe::Description;
use mig_wire::fault::Fault;
use mig_wire::hello::{Capabilities, Secret};

use crate::domain::Domain;
use crate::policy::{StopReason, Throttle};
use crate::progress::{Downtime, OutcomeKind, PageCounts, Report, Shortfall, Slowed, Verification};

/// Notes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Ledger {
    /// When the control channel was there.
    pub(crate) began: Option<Duration>,
    pub(crate) copying_since: Duration,
    pub(crate) channels: u16,
    pub(crate) secret: Secret,
    /// Encodings of pages that both sides understand.
    pub(crate) page_encodings: Capabilities,
    /// Whether the destination tells how it timed its start.
    pub(crate) start_is_told: bool,
    /// Whether the dirty log was switched on.
    pub(crate) tracking: bool,
    /// Whether the guest was paused.
    pub(crate) paused: bool,
    /// Whether the guest goes on here while the destination may hold all of it, and has not said that it does not.
    pub(crate) copy_left: bool,
    pub(crate) throttling: Throttling,
    /// Whether hot pages are held back.
    pub(crate) holding: bool,
    /// What was predicted after the last rounds.
    pub(crate) lately: Lately,
    pub(crate) rounds: u32,
    pub(crate) pages: PageCounts,
    pub(crate) sent_bytes: u64,
    pub(crate) stop_reason: Option<StopReason>,
    pub(crate) predicted_downtime: Option<Downtime>,
    pub(crate) shortfall: Option<Shortfall>,
    pub(crate) downtime: Downtime,
    pub(crate) guest_gap: Option<Duration>,
    pub(crate) verification: Option<Verification>,
}

/// How much of its time the guest was denied.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Throttling {
    now: Throttle,
    since: Duration,
    most: Throttle,
    lasted: Duration,
    held: Duration,
    /// How busy the guest was in percent of a processor while it had all its time, and then while it had not.
    busy_before: Option<u8>,
    least_busy: Option<u8>,
}

impl Throttling {
    pub(crate) fn now(&self) -> Throttle {
        self.now
    }

    pub(crate) fn change(&mut self, now: Duration, throttle: Throttle) {
        let so_far = self.so_far(now);
        // one that could not be slowed was not
        let most = if so_far.lasted.is_zero() { throttle } else { self.most.max(throttle) };
        *self = Self { now: throttle, since: now, most, ..so_far };
    }

    /// With everything up to `now` noted down.
    fn so_far(&self, now: Duration) -> Self {
        let passed = if self.now.is_none() { Duration::ZERO } else { now.saturating_sub(self.since) };
        let held = passed * u32::from(self.now.percent()) / 100;
        Self { since: now, lasted: self.lasted + passed, held: self.held + held, ..self.clone() }
    }

    /// How busy the guest was lately, in percent of a processor.
    pub(crate) fn busy(&mut self, percent: u8) {
        let percent = percent.min(100);
        if self.now.is_none() {
            self.busy_before = Some(percent);
        } else {
            self.least_busy = Some(self.least_busy.map_or(percent, |least| least.min(percent)));
        }
    }

    /// The time it needs to keep its speed, in percent: all of it where that is not known.
    pub(crate) fn needed_percent(&self) -> u8 {
        self.busy_before.unwrap_or(100)
    }

    pub(crate) fn report(&self, now: Duration) -> Option<Slowed> {
        let Self { most, lasted, held, busy_before, least_busy, .. } = self.so_far(now);
        let speed = |(before, least): (u8, u8)| u32::from(least) * 100 / u32::from(before.max(1));
        let least_speed_percent =
            busy_before.zip(least_busy).map(speed).map(|percent| percent.min(100) as u8);
        (!most.is_none()).then_some(Slowed { most, lasted, held, least_speed_percent })
    }
}

/// The downtimes predicted after the last rounds, the newest last.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Lately {
    predicted: [Option<Duration>; 8],
}

impl Lately {
    pub(crate) fn lowest(&self) -> Option<Duration> {
        self.predicted.iter().flatten().min().copied()
    }

    pub(crate) fn note(&mut self, predicted: Duration) {
        self.predicted.rotate_left(1);
        self.predicted[7] = Some(predicted);
    }
}

impl Ledger {
    pub(crate) fn sent(&mut self, pages: PageCounts, bytes: u64) {
        self.pages += pages;
        self.sent_bytes += bytes;
    }

    pub(crate) fn chunks(&self, description: &Description) -> u64 {
        Domain::new(&description.regions).map_or(0, |d| d.chunks())
    }

    pub(crate) fn report(
        &self,
        now: Duration,
        outcome: OutcomeKind,
        fault: Option<Fault>,
        ram_bytes: u64,
    ) -> Report {
        Report {
            outcome,
            stop_reason: self.stop_reason,
            rounds: self.rounds,
            total: self.began.map_or(Duration::ZERO, |began| now.saturating_sub(began)),
            downtime: (outcome == OutcomeKind::Moved).then_some(self.downtime),
            predicted_downtime: self.predicted_downtime,
            shortfall: self.shortfall,
            guest_gap: self.guest_gap,
            slowed: self.throttling.report(now),
            sent_bytes: self.sent_bytes,
            pages: self.pages,
            ram_bytes,
            verification: self.verification.clone().unwrap_or(Verification::Off),
            fault,
        }
    }
}
