//! Whether what the source reports is what happened.

use std::time::Duration;

use mig_core::progress::Verification;

use crate::verdict::Violation;
use crate::world::World;

impl World {
    pub(crate) fn check_guest_stays(&self) -> Result<(), Violation> {
        if !self.guest.runs && !self.source.resume_failed {
            return Err(Violation::NotResumed);
        }
        let Some(report) = &self.source.report else { return Ok(()) };
        if let Verification::Mismatch { guest_addresses } = &report.verification {
            let differing = self.source.differing.clone().unwrap_or_default();
            if self.source.differing.is_some() && *guest_addresses != differing {
                return Err(Violation::Digests(format!("{guest_addresses:x?}, but {differing:x?} differ")));
            }
        }
        Ok(())
    }

    /// The downtime as two sides can tell that compare no clocks: off from what it was by half of the ways of
    /// Ready and Commit at most, since one of them may have taken all of that.
    fn downtime_by_both_clocks(&self, resumed_at: u64) -> Result<u64, Violation> {
        let (source, destination) = (&self.source, &self.destination);
        let Some(committed_at) = source.committed_at else { return Ok(0) };
        let answering = committed_at - source.ready_heard_at;
        let both_ways = (destination.given_at - destination.ready_said_at).saturating_sub(answering);
        let resume = resumed_at - destination.given_at;
        let reported_ns = committed_at - source.pause_ordered_at + both_ways / 2 + resume;
        let actual_ns = resumed_at - source.pause_ordered_at;
        if reported_ns.abs_diff(actual_ns) > both_ways.div_ceil(2) {
            return Err(Violation::Downtime { what: "what it was", reported_ns, actual_ns });
        }
        Ok(reported_ns)
    }

    pub(crate) fn check_report(&self) -> Result<(), Violation> {
        let Some(report) = &self.source.report else { return Ok(()) };
        let downtime = report.downtime.unwrap_or_default();
        let whole = self.source.running_heard_at - self.source.pause_ordered_at;
        let blackout = self.destination.resumed_at - self.source.paused_at;
        let Some(resumed_at) = self.destination.resume_taken_at else { return Ok(()) };
        // on an operator's word the guest may have run there before Commit was sent, or even before Ready was
        // heard: the parts up to there are counted in full
        let on_commit = self.source.committed_at.is_some_and(|at| at <= self.destination.given_at);
        let least = if self.source.start_heard {
            resumed_at.saturating_sub(self.source.pause_ordered_at)
        } else {
            whole
        };
        if !on_commit && downtime.total() < Duration::from_nanos(least) {
            let (reported_ns, actual_ns) = (downtime.total().as_nanos() as u64, least);
            return Err(Violation::Downtime { what: "all of it", reported_ns, actual_ns });
        }
        let both_told = on_commit && self.source.start_heard;
        let expected = if both_told { self.downtime_by_both_clocks(resumed_at)?.min(whole) } else { whole };
        let parts = [
            ("all of it", downtime.total(), expected),
            ("pause", downtime.pause, self.source.paused_heard_at - self.source.pause_ordered_at),
            ("verify", downtime.verify, self.destination.verify_took),
            ("load", downtime.load, self.destination.load_took),
            ("resume", downtime.resume, resumed_at - self.destination.given_at),
        ];
        for (what, reported, actual_ns) in parts.into_iter().filter(|_| on_commit) {
            let reported_ns = reported.as_nanos() as u64;
            if reported_ns != actual_ns {
                return Err(Violation::Downtime { what, reported_ns, actual_ns });
            }
        }
        // what the guest felt lies within; beyond it are only the way into the pause and the news of its end
        if whole < blackout {
            let what = "what the guest felt";
            return Err(Violation::Downtime { what, reported_ns: whole, actual_ns: blackout });
        }
        if self.scenario.verify != matches!(report.verification, Verification::Ok { .. }) {
            return Err(Violation::Digests(format!("reported as {:?}", report.verification)));
        }
        Ok(())
    }
}
