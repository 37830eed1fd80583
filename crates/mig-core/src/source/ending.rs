//! Every other end: a mismatch, an abort, a failure, a cancel. Before Commit the guest stays, after it there is
//! doubt.

use std::time::Duration;

use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{ChunkDigests, Message};

use super::{Action, Committed, LastRound, Reclaiming, Source, Stage};
use crate::progress::{Downtime, OutcomeKind, Progress, Report, Verification};
use crate::switchover::RunPermit;

impl Source {
    pub(super) fn mismatch(&mut self, now: Duration, samples: Vec<ChunkDigests>) -> Vec<Action> {
        let (Stage::LastRound(_), true) = (&self.stage, self.config.verify) else {
            return self.out_of_turn(now, "mismatch");
        };
        self.ledger.verification = Some(Verification::Mismatch { guest_addresses: Vec::new() });
        self.stage = Stage::Locating;
        vec![Action::Locate(samples)]
    }

    pub(super) fn located(&mut self, now: Duration, guest_addresses: Vec<u64>) -> Vec<Action> {
        let Stage::Locating = self.stage else { return Vec::new() };
        let pages: Vec<String> = guest_addresses.iter().take(8).map(|a| format!("{a:#x}")).collect();
        let cause = match pages.as_slice() {
            [] => "memory differs, in pages that were not found".to_owned(),
            pages => format!("memory differs, in pages at {}", pages.join(", ")),
        };
        self.ledger.verification = Some(Verification::Mismatch { guest_addresses });
        let fault = Fault::new(Side::Destination, Step::Verify, Blame::Local, cause)
            .remedy("the guest stays; report this: a page was lost");
        // the destination has ended with its Mismatch
        self.give_up(now, fault, false)
    }

    pub(super) fn peer_aborted(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        match self.stage {
            // after Commit too: its promise that it never ran and never will
            Stage::Ended | Stage::Resuming(_) | Stage::AwaitingGap(_) => Vec::new(),
            _ => self.give_up(now, fault, false),
        }
    }

    pub(super) fn peer_lost(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        match self.stage {
            Stage::Committed(_) => self.lost(now, fault),
            _ => self.out_of_turn(now, "lost"),
        }
    }

    pub(super) fn failed(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        match &self.stage {
            Stage::Committed(Committed { since, .. }) => self.in_doubt(fault, *since),
            // it is known already; what was under way before does not matter any more
            Stage::Asking(_) => Vec::new(),
            // the destination said that it runs; only the gap stays unknown
            Stage::AwaitingGap(_) => self.moved(now),
            // only the resume itself can still fail: link and peer do not matter any more, nor does what
            // was under way before
            Stage::Resuming(_) if fault.blame == Blame::Local && fault.step == Step::Resume => {
                // a copy at the destination may be the only one that can be run
                self.ledger.copy_left = false;
                self.still_here(now, fault)
            }
            Stage::Resuming(_) | Stage::Reclaiming(_) | Stage::Ended => Vec::new(),
            // the destination hangs up after its Mismatch; which pages is worth knowing all the same
            Stage::Locating if matches!(fault.blame, Blame::Network | Blame::Peer) => Vec::new(),
            Stage::Locating => self.located(now, Vec::new()),
            _ => self.give_up(now, fault, true),
        }
    }

    pub(super) fn cancelled(&mut self, now: Duration, reason: Option<String>) -> Vec<Action> {
        match self.stage {
            // too late; or it ends by itself in a moment, for a reason worth knowing
            Stage::Locating
            | Stage::Committed(_)
            | Stage::AwaitingGap(_)
            | Stage::Asking(_)
            | Stage::Resuming(_)
            | Stage::Reclaiming(_)
            | Stage::Ended => Vec::new(),
            _ => {
                let fault = Fault::cancelled(Side::Source, self.step(), reason);
                self.give_up(now, fault, true)
            }
        }
    }

    /// Ends it before Commit, or on the destination's promise: the guest runs on here.
    pub(super) fn give_up(&mut self, now: Duration, fault: Fault, tell_peer: bool) -> Vec<Action> {
        if let (Stage::LastRound(LastRound { since, .. }), true, Some(_)) =
            (&self.stage, tell_peer, self.config.arbiter)
        {
            // its Ready may have come, and what that took is noted already
            let Downtime { transfer, verify, load, .. } = self.ledger.downtime;
            let since = *since + transfer + verify + load;
            self.stage = Stage::Reclaiming(Reclaiming { fault, since });
            return vec![Action::Claim];
        }
        let complete = matches!(self.stage, Stage::LastRound(_) | Stage::Reclaiming(_));
        self.ledger.copy_left |= tell_peer && complete;
        let told = tell_peer && !matches!(self.stage, Stage::Connecting);
        let abort = told.then(|| Action::Send(Message::Abort(fault.clone())));
        let pausing = matches!(self.stage, Stage::Pausing(_));
        if self.ledger.paused || pausing {
            self.stage = Stage::Resuming(fault);
            // the guest first: a send may wait for a link that is stuck
            return std::iter::once(Action::Resume(RunPermit::mint())).chain(abort).collect();
        }
        let end = self.still_here(now, fault);
        abort.into_iter().chain(end).collect()
    }

    pub(super) fn resumed(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Resuming(fault) = &self.stage else { return Vec::new() };
        let fault = fault.clone();
        let mut actions = vec![Action::Tell(Progress::Resumed)];
        actions.extend(self.still_here(now, fault));
        actions
    }

    fn still_here(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        self.stage = Stage::Ended;
        let report = self.report(now, OutcomeKind::StillHere, Some(fault));
        let stop = self.ledger.tracking.then_some(Action::StopTracking);
        stop.into_iter().chain([Action::End(Box::new(report))]).collect()
    }

    pub(super) fn report(&self, now: Duration, outcome: OutcomeKind, fault: Option<Fault>) -> Report {
        self.ledger.report(now, outcome, fault, self.config.ram_bytes)
    }
}
