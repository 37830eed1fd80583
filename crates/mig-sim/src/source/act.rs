//! Carrying out what the source's machine asks for.

use mig_core::hot::Hot;
use mig_core::progress::Progress;
use mig_core::source::{Action, Event};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;

use crate::guest;
use crate::link::{Cargo, FIRST_CHANNEL, TO_DESTINATION};
use crate::mishap::Work;
use crate::mutant::Mutant;
use crate::network::PATIENCE;
use crate::queue::{Happening, Job};
use crate::verdict::Violation;
use crate::world::World;

impl World {
    pub(super) fn source_does(&mut self, action: Action) -> Result<(), Violation> {
        let costs = self.scenario.costs;
        match action {
            Action::Send(message) => self.say(TO_DESTINATION, message)?,
            Action::Attach { channels, .. } => self.attach(channels),
            Action::StartTracking => self.source_works(costs.sync, Job::Plain(Work::StartTracking)),
            Action::SendRound { round, hold_back_pages } => {
                self.source.hot.hold_back(&mut self.source.dirty, hold_back_pages);
                if hold_back_pages > 0 && self.scenario.is(Mutant::HeldPagesForgotten) {
                    self.source.hot = Hot::new(&self.guest.domain);
                }
                self.send_pages(round);
            }
            Action::Sync => self.source_works(costs.sync, Job::Plain(Work::Sync)),
            Action::Pause => {
                self.source.pause_ordered_at = self.now;
                self.source_works(costs.pause, Job::Plain(Work::Pause));
            }
            Action::Throttle(throttle) => {
                self.guest.run_to(self.now);
                if !throttle.is_none() || !self.scenario.is(Mutant::ThrottleLeftOn) {
                    self.guest.throttle = throttle;
                }
            }
            Action::Save => self.source_works(costs.save, Job::Plain(Work::Save)),
            Action::SendLast { round, verify } => {
                self.send_state(round, verify)?;
                self.send_pages(round);
            }
            Action::Locate(samples) => {
                let pages = self.differing(&samples);
                self.source_works(costs.sync, Job::Locate(pages));
            }
            Action::Commit(permit) => {
                drop(permit);
                if self.guest.runs {
                    return Err(Violation::TwoRunners { side: Side::Source });
                }
                self.permits.given_away()?;
                self.source.committed_at = Some(self.now);
                self.say(TO_DESTINATION, Message::Commit)?;
                self.after(20 * PATIENCE, Happening::Deadline);
                // a send that fails may have sent it all the same
                let failed = self.work_fails(Side::Source, Work::SendCommit) || self.network.is_cut();
                if failed && self.scenario.is(Mutant::CommitFailureResumes) {
                    self.permits.taken_back(false)?;
                }
            }
            Action::Resume(permit) => {
                self.source.epoch += 1;
                self.permits.taken_back(self.source.word)?;
                self.source.resuming = true;
                self.source_works(costs.resume, Job::Resume(permit));
            }
            Action::Query { after } => self.query(after)?,
            Action::Claim => self.claim(Side::Source)?,
            Action::StopTracking => {
                if !self.scenario.is(Mutant::TrackingLeftOn) {
                    self.guest.tracked = false;
                }
            }
            Action::Tell(progress) => {
                if let Progress::Round(report) = progress
                    && report.pages.total() > self.guest.domain.pages()
                {
                    return Err(Violation::Ends(format!("a round of {:?}", report.pages)));
                }
            }
            Action::End(_) if self.source.resuming => {
                return Err(Violation::Ends("the source ended with a resume under way".into()));
            }
            Action::End(report) => self.source.report = Some(*report),
        }
        Ok(())
    }

    /// The coordinator does one thing after the other.
    fn source_works(&mut self, cost: u64, job: Job) {
        self.source.jobs += 1;
        self.source.busy_until = self.source.busy_until.max(self.now) + cost;
        let delay = self.source.busy_until - self.now;
        self.after(delay, Happening::Done(Side::Source, job));
    }

    fn attach(&mut self, channels: u16) {
        self.source.channels = channels;
        if self.work_fails(Side::Source, Work::Attach) {
            self.source_fails(Step::Attach);
            return;
        }
        for channel in 0..usize::from(channels) {
            self.send(FIRST_CHANNEL + channel, Cargo::Attach);
        }
    }

    pub(super) fn source_fails(&mut self, step: Step) {
        let fault = Fault::new(Side::Source, step, Blame::Local, "it was made to fail");
        self.after(1, Happening::Source(Event::Failed(fault)));
    }

    /// The destination has had all the time it may take to run the guest.
    pub(crate) fn too_late(&mut self) {
        let waits = self.step(Side::Source) == Some(Step::Commit) && self.source.running_heard_at == 0;
        if waits && !self.is_in_doubt(Side::Source) {
            self.notices(Side::Source, 0, "the peer did not answer in time");
        }
    }

    fn send_state(&mut self, round: u32, verify: bool) -> Result<(), Violation> {
        let sections = std::mem::take(&mut self.source.sections);
        let state = Message::State { round, sections };
        let mut messages = vec![state];
        if verify {
            let digests = guest::digests(&self.guest.domain, &self.guest.memory);
            let (front, back) = digests.split_at(self.random.within(0..digests.len() as u64) as usize);
            let first_chunk = front.len() as u64;
            let parts = [(0, front), (first_chunk, back)]
                .map(|(first_chunk, digests)| Message::Digests { first_chunk, digests: digests.to_vec() });
            let at = if self.scenario.digests_first { 0 } else { messages.len() };
            messages.splice(at..at, parts);
        }
        for message in messages {
            self.say(TO_DESTINATION, message)?;
        }
        Ok(())
    }
}
