//! What a holder answers to those who control it.

use super::Holder;
use crate::control::{Answer, Commands, Request, Resolved};
use crate::event::Event;
use crate::failure::Failure;
use crate::machine::Machine;

impl<M: Machine> Commands for Holder<M> {
    fn answer(&self, request: &Request, watch: &(dyn Fn(&Event) + Sync)) -> Answer {
        let done = |result: Result<(), Failure>| result.map(|()| Answer::ok(&()));
        let answered = match request {
            Request::Status => Ok(Answer::ok(&self.status())),
            Request::Screen => self.screen().map(|screen| Answer::ok(&screen)),
            Request::Check => self.check().map(|check| Answer::ok(&check)),
            Request::Estimate(estimate) => self.estimate(estimate).map(|estimated| Answer::ok(&estimated)),
            Request::Bandwidth { rate } => done(self.change_bandwidth(rate.0)),
            Request::Cancel => done(self.cancel()),
            Request::Resolve { word } => {
                self.resolve((*word).into()).map(|state| Answer::ok(&Resolved { state }))
            }
            Request::Pause => done(self.pause()),
            Request::Resume => done(self.resume()),
            Request::Quit => done(self.quit()),
            Request::Migrate(migrate) => {
                migrate.settings().map(|(to, settings)| match self.migrate(&to, &settings, watch) {
                    Ok(report) => Answer::ok(&()).with_report(Some(&report)),
                    Err(e) => Answer::error(&e.failure).with_report(e.report.as_deref()),
                })
            }
        };
        answered.unwrap_or_else(|failure| Answer::error(&failure))
    }
}

impl<M: Machine> Holder<M> {
    /// That it cannot be done as things are.
    pub(super) fn wrong_state(&self, what: &str, state: &str) -> Failure {
        let (cause, remedy) = match state {
            "running" | "paused" | "migrating" | "receiving" if what == "resolve" => {
                ("no guest is in doubt here", "nothing needs to be done; status says what the guest does")
            }
            "running" | "paused" | "receiving" if what == "change the bandwidth" => {
                ("no migration runs from here", "give --bandwidth with the migration")
            }
            "running" if what == "cancel" => {
                ("no migration runs", "nothing needs to be done; the guest runs")
            }
            "running" => ("the guest runs", "nothing needs to be done"),
            "paused" if what == "cancel" => {
                ("no migration runs", "nothing needs to be done; the guest is paused")
            }
            "paused" if what == "pause" => ("the guest is paused", "nothing needs to be done"),
            "paused" => ("the guest is paused", "resume it first"),
            "migrating" => ("the guest is migrating", "cancel the migration or wait for its end"),
            "receiving" => ("no guest has been received yet", "send one first"),
            "in-doubt" => (
                "it is not known whether the guest runs on the other side",
                "find out, and resolve: resume if it certainly does not run there and never will, discard if it does",
            ),
            _ => ("the guest has ended here", ""),
        };
        self.failure("control", format!("cannot {what}: {cause}"), remedy)
    }
}
