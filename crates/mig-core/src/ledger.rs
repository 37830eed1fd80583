//! What a source's machine notes down on the way, for its report.

use std::time::Duration;

use mig_wire::describe::Description;
use mig_wire::fault::Fault;
use mig_wire::hello::{Capabilities, Secret};

use crate::domain::Domain;
use crate::policy::StopReason;
use crate::progress::{Downtime, OutcomeKind, PageCounts, Report, Verification};

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
    pub(crate) rounds: u32,
    pub(crate) pages: PageCounts,
    pub(crate) sent_bytes: u64,
    pub(crate) stop_reason: Option<StopReason>,
    pub(crate) predicted_downtime: Option<Downtime>,
    pub(crate) downtime: Downtime,
    pub(crate) guest_gap: Option<Duration>,
    pub(crate) verification: Option<Verification>,
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
            guest_gap: self.guest_gap,
            sent_bytes: self.sent_bytes,
            pages: self.pages,
            ram_bytes,
            verification: self.verification.clone().unwrap_or(Verification::Off),
            fault,
        }
    }
}
