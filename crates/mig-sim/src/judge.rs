//! Once nothing is left to happen: how did each side end, and do the ends fit?

use mig_core::destination::End;
use mig_core::progress::OutcomeKind;
use mig_core::{Blame, Fault, Side, Step};

use crate::arbiter::Register;
use crate::mishap::Mishap;
use crate::network::CLOSED;
use crate::scenario::Operator;
use crate::verdict::{DestinationEnd, SourceEnd, Summary, Violation};
use crate::world::World;

impl World {
    /// Once nothing is left to happen: what became of it?
    pub(crate) fn judge(&self) -> Result<Summary, Violation> {
        let source = self.source_end()?;
        let destination = self.destination_end()?;
        self.ends_fit(source, destination)?;
        self.doubts_are_resolved(source, destination)?;
        self.copy_is_kept()?;
        self.told()?;
        match source {
            SourceEnd::Moved => self.check_report()?,
            SourceEnd::StillHere => self.check_guest_stays()?,
            SourceEnd::Discarded | SourceEnd::InDoubt if self.guest.runs => {
                return Err(Violation::Ends("in doubt, and yet the source runs the guest".into()));
            }
            SourceEnd::Discarded | SourceEnd::InDoubt | SourceEnd::Crashed => {}
        }
        if self.guest.tracked && source != SourceEnd::Crashed {
            return Err(Violation::StillTracked);
        }
        if !self.guest.throttle.is_none() && source != SourceEnd::Crashed {
            return Err(Violation::StillSlowed);
        }
        let rounds = self.source.report.as_ref().map_or(0, |report| report.rounds);
        let alive = self.alive(source, destination)?;
        let [source_doubted, destination_doubted] = self.doubted;
        Ok(Summary { source, destination, alive, rounds, source_doubted, destination_doubted, attempts: 1 })
    }

    fn source_end(&self) -> Result<SourceEnd, Violation> {
        let side = Side::Source;
        match (&self.source.report, self.source.crashed) {
            (_, true) => Ok(SourceEnd::Crashed),
            (Some(report), _) => Ok(match report.outcome {
                OutcomeKind::Moved => SourceEnd::Moved,
                OutcomeKind::StillHere => SourceEnd::StillHere,
                OutcomeKind::Discarded => SourceEnd::Discarded,
            }),
            (None, false) if self.is_in_doubt(side) => Ok(SourceEnd::InDoubt),
            (None, false) => Err(Violation::Stuck { side, what: format!("{:?}", self.step(side)) }),
        }
    }

    fn destination_end(&self) -> Result<DestinationEnd, Violation> {
        let side = Side::Destination;
        match (&self.destination.end, self.destination.crashed) {
            (_, true) => Ok(DestinationEnd::Crashed),
            (Some(End::Running(_)), _) => Ok(DestinationEnd::Running),
            (Some(End::NotReceived(_)), _) => Ok(DestinationEnd::NotReceived),
            (Some(End::Lost(_)), _) => Ok(DestinationEnd::Lost),
            (None, false) if self.is_in_doubt(side) => Ok(DestinationEnd::Held),
            (None, false) => Err(Violation::Stuck { side, what: format!("{:?}", self.step(side)) }),
        }
    }

    /// The table of what may be left.
    fn ends_fit(&self, source: SourceEnd, destination: DestinationEnd) -> Result<(), Violation> {
        use {DestinationEnd as D, SourceEnd as S};
        let (committed, ran) = (self.source.committed_at.is_some(), self.destination.ran);
        let given = self.register.as_ref().and_then(Register::given);
        let fit = match (source, destination) {
            (S::Moved, D::Running | D::Crashed) => ran,
            (S::StillHere, D::NotReceived) => !ran,
            // its copy is stale: the source kept the guest, or got it back from the arbiter
            (S::StillHere, D::Held) => !ran && (!committed || given == Some(Side::Source)),
            (S::StillHere, D::Crashed) => !ran || self.source.word,
            (S::StillHere, D::Lost) => ran && self.source.word,
            (S::Discarded, D::Running | D::Crashed) => ran && self.source.word,
            // the arbiter may have given it away before Commit, on a word at the destination
            (S::InDoubt, _) => committed || given == Some(Side::Destination) && self.destination.word,
            // a paused guest that could not be started again, and then was where its copy was
            (S::StillHere, D::Running) => self.source.resume_failed && self.destination.word,
            (S::Crashed, D::Running | D::Lost) => committed || self.destination.word,
            (S::Crashed, D::NotReceived | D::Held | D::Crashed) => true,
            (S::Moved, D::NotReceived | D::Lost | D::Held)
            | (S::Discarded, D::NotReceived | D::Lost | D::Held) => false,
        };
        let aborted_by_policy = self.source.report.as_ref().is_some_and(|report| {
            report.stop_reason.is_some()
                && self.scenario.policy.on_stall == mig_core::policy::OnStall::Abort
                && source == S::StillHere
                && !committed
        });
        let undisturbed = self.mishaps.happened().next().is_none();
        // who says that the guest is lost has really failed to start it
        let fit = fit && (destination != D::Lost || self.destination.resumed_at == 0);
        if !fit || undisturbed && source != S::Moved && !aborted_by_policy {
            let faults = (self.source.report.as_ref().map(|r| &r.fault), &self.destination.end);
            return Err(Violation::Ends(format!("{source:?} and {destination:?}: {faults:?}")));
        }
        Ok(())
    }

    /// Once the link has healed and if nobody crashed, the source knows; and a careful operator leaves no
    /// doubt anywhere that the arbiter does not keep up.
    fn doubts_are_resolved(&self, source: SourceEnd, destination: DestinationEnd) -> Result<(), Violation> {
        use {DestinationEnd as D, SourceEnd as S};
        let careful = self.scenario.operator == Operator::Careful;
        let given = self.register.as_ref().and_then(Register::given);
        let heard = !self.network.is_cut() && !matches!(destination, D::Crashed | D::Lost);
        let stays = |side, why| Err(Violation::DoubtStays { side, why });
        match (source, destination) {
            (S::InDoubt, _) if heard => stays(Side::Source, "the destination can be asked"),
            (S::InDoubt, _) if careful && given != Some(Side::Destination) => {
                stays(Side::Source, "there is an operator")
            }
            // it asks for the copy that it left, unless that may be the only one that can be run
            (S::StillHere, D::Held) if heard && !self.source.resume_failed => {
                stays(Side::Destination, "its source asks for the copy")
            }
            (_, D::Held) if careful && given != Some(Side::Source) => {
                stays(Side::Destination, "there is an operator")
            }
            _ => Ok(()),
        }
    }

    /// A complete copy is dropped only on somebody's word, never because the source fell silent.
    fn copy_is_kept(&self) -> Result<(), Violation> {
        match &self.destination.end {
            Some(End::NotReceived(fault))
                if (fault.side, fault.step, fault.blame)
                    == (Side::Destination, Step::Commit, Blame::Network)
                    && !self.destination.word =>
            {
                Err(Violation::CopyDropped(fault.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// How many copies of the guest run: never two, and one wherever nothing broke that none could survive.
    fn alive(&self, source: SourceEnd, destination: DestinationEnd) -> Result<u32, Violation> {
        use {DestinationEnd as D, SourceEnd as S};
        let here = self.guest.runs && source != S::Crashed;
        let there = self.destination.resumed_at != 0 && destination != D::Crashed;
        let alive = u32::from(here) + u32::from(there);
        let may_be_none = matches!(source, S::InDoubt | S::Crashed)
            || matches!(destination, D::Crashed | D::Lost)
            || self.source.resume_failed;
        if alive > 1 || alive == 0 && !may_be_none {
            return Err(Violation::Alive(alive));
        }
        Ok(alive)
    }

    /// Where the link held, each side was told by a message, not by a closed connection.
    fn told(&self) -> Result<(), Violation> {
        let severed = self.mishaps.happened().any(Mishap::severs);
        let by_closing = |fault: &Fault| fault.cause == CLOSED;
        let source = self.source.report.as_ref().and_then(|report| report.fault.as_ref());
        if !severed && source.is_some_and(by_closing) {
            return Err(Violation::NotTold(Side::Source));
        }
        match &self.destination.end {
            Some(End::NotReceived(fault)) if !severed && by_closing(fault) => {
                Err(Violation::NotTold(Side::Destination))
            }
            _ => Ok(()),
        }
    }
}
