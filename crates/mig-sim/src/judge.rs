//! Once nothing is left to happen: how did each side end, and do the ends fit?

use mig_core::destination::End;
use mig_core::progress::OutcomeKind;
use mig_core::{Fault, Side};

use crate::mishap::Mishap;
use crate::network::CLOSED;
use crate::verdict::{DestinationEnd, SourceEnd, Summary, Violation};
use crate::world::World;

impl World {
    /// Once nothing is left to happen: what became of it?
    pub(crate) fn judge(&self) -> Result<Summary, Violation> {
        let source = self.source_end()?;
        let destination = self.destination_end()?;
        self.ends_fit(source, destination)?;
        self.told()?;
        match source {
            SourceEnd::Moved => self.check_report()?,
            SourceEnd::StillHere => self.check_guest_stays()?,
            SourceEnd::InDoubt if self.guest.runs => {
                return Err(Violation::Ends("in doubt, and yet the source runs the guest".into()));
            }
            SourceEnd::InDoubt | SourceEnd::Crashed => {}
        }
        if self.guest.tracked && source != SourceEnd::Crashed {
            return Err(Violation::StillTracked);
        }
        let rounds = self.source.report.as_ref().map_or(0, |report| report.rounds);
        Ok(Summary { source, destination, rounds, second_attempt: false })
    }

    fn source_end(&self) -> Result<SourceEnd, Violation> {
        match (&self.source.report, self.source.crashed) {
            (_, true) => Ok(SourceEnd::Crashed),
            (Some(report), _) => Ok(match report.outcome {
                OutcomeKind::Moved => SourceEnd::Moved,
                OutcomeKind::StillHere => SourceEnd::StillHere,
                OutcomeKind::InDoubt => SourceEnd::InDoubt,
            }),
            (None, false) => {
                Err(Violation::Stuck { side: Side::Source, what: format!("{:?}", self.step(Side::Source)) })
            }
        }
    }

    fn destination_end(&self) -> Result<DestinationEnd, Violation> {
        match (&self.destination.end, self.destination.crashed) {
            (_, true) => Ok(DestinationEnd::Crashed),
            (Some(End::Running(_)), _) => Ok(DestinationEnd::Running),
            (Some(End::NotReceived(_)), _) => Ok(DestinationEnd::NotReceived),
            (Some(End::InDoubt(_)), _) => Ok(DestinationEnd::InDoubt),
            (Some(End::Lost(_)), _) => Ok(DestinationEnd::Lost),
            (None, false) => {
                let what = format!("{:?}", self.step(Side::Destination));
                Err(Violation::Stuck { side: Side::Destination, what })
            }
        }
    }

    fn ends_fit(&self, source: SourceEnd, destination: DestinationEnd) -> Result<(), Violation> {
        use {DestinationEnd as D, SourceEnd as S};
        let committed = self.source.committed;
        let fit = match (source, destination) {
            (S::Moved, D::Running | D::Crashed) => self.destination.ran,
            (S::StillHere, D::NotReceived | D::InDoubt | D::Crashed) => !self.destination.ran,
            (S::InDoubt, _) => committed,
            (S::Crashed, D::Running | D::Lost) => committed,
            (S::Crashed, _) => true,
            (S::Moved, _) | (S::StillHere, D::Running | D::Lost) => false,
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

    /// Where the link held, each side was told by a message, not by a closed connection.
    fn told(&self) -> Result<(), Violation> {
        let severed = self.mishaps.happened().any(Mishap::severs);
        let by_closing = |fault: &Fault| fault.cause == CLOSED;
        let source = self.source.report.as_ref().and_then(|report| report.fault.as_ref());
        if !severed && source.is_some_and(by_closing) {
            return Err(Violation::NotTold(Side::Source));
        }
        match &self.destination.end {
            Some(End::NotReceived(fault) | End::InDoubt(fault)) if !severed && by_closing(fault) => {
                Err(Violation::NotTold(Side::Destination))
            }
            _ => Ok(()),
        }
    }
}
