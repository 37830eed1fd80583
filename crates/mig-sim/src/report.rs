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

    pub(crate) fn check_report(&self) -> Result<(), Violation> {
        let Some(report) = &self.source.report else { return Ok(()) };
        let downtime = report.downtime.unwrap_or_default();
        let whole = self.source.running_heard_at - self.source.pause_ordered_at;
        let blackout = self.destination.resumed_at - self.source.paused_at;
        let Some(resumed_at) = self.destination.resume_taken_at else { return Ok(()) };
        let parts = [
            ("all of it", downtime.total(), whole),
            ("pause", downtime.pause, self.source.paused_heard_at - self.source.pause_ordered_at),
            ("verify", downtime.verify, self.destination.verify_took),
            ("load", downtime.load, self.destination.load_took),
            ("resume", downtime.resume, resumed_at - self.destination.given_at),
        ];
        // on an operator's word the guest may have run there before Commit was sent, or even before Ready was
        // heard: the parts up to there are counted in full
        let on_commit = self.source.committed_at.is_some_and(|at| at <= self.destination.given_at);
        if !on_commit && downtime.total() < Duration::from_nanos(whole) {
            let (reported_ns, actual_ns) = (downtime.total().as_nanos() as u64, whole);
            return Err(Violation::Downtime { what: "all of it", reported_ns, actual_ns });
        }
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
