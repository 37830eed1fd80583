//! Carrying out what the destination's machine asks for.

use mig_core::destination::{Action, Event};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::frame::Fate;
use mig_wire::section::Section;

use crate::arbiter::Register;
use crate::link::TO_SOURCE;
use crate::mishap::Work;
use crate::queue::{Happening, Job};
use crate::verdict::Violation;
use crate::world::World;

impl World {
    pub(super) fn destination_does(&mut self, action: Action) -> Result<(), Violation> {
        let costs = self.scenario.costs;
        match action {
            Action::Send(message) => {
                match message {
                    Message::RoundAck { .. } => self.destination.acknowledged_at = self.now,
                    Message::Ready { .. } => self.destination.was_ready = true,
                    _ => {}
                }
                self.say(TO_SOURCE, message)?;
            }
            Action::Prepare(_) => {
                self.destination_works(costs.prepare, Job::Plain(Work::Prepare));
            }
            Action::Accept { channels } => self.accept(channels),
            Action::Verify(digests) => self.destination_works(costs.verify, Job::Verify(digests)),
            Action::Load(sections) => self.destination_works(costs.load, Job::Load(sections)),
            Action::Claim => {
                self.destination.given_at = self.now;
                self.claim(Side::Destination)?;
            }
            Action::Answer(fate) => {
                self.destination.promised |= fate == Fate::Never;
                if let Some(number) = self.destination.asker.take() {
                    self.answers(number, fate);
                }
            }
            Action::Resume(permit) => {
                if !self.scenario.arbitrated {
                    self.destination.given_at = self.now;
                }
                let given = self.register.as_ref().and_then(Register::given);
                let forfeited = given == Some(Side::Destination) && !self.guest.runs;
                self.permits.taken_over(self.destination.word, forfeited)?;
                self.same_as_at_the_pause()?;
                self.destination.ran = true;
                self.destination_works(costs.resume, Job::Resume(permit));
            }
            Action::FindGap => self.destination_works(costs.gap, Job::Plain(Work::FindGap)),
            Action::Tell(_) => {}
            Action::End(end) => self.destination.end = Some(end),
        }
        Ok(())
    }

    fn destination_works(&mut self, cost: u64, job: Job) {
        self.destination.jobs += 1;
        self.destination.issued_at = self.now;
        self.destination.busy_until = self.destination.busy_until.max(self.now) + cost;
        let delay = self.destination.busy_until - self.now;
        self.after(delay, Happening::Done(Side::Destination, job));
    }

    fn accept(&mut self, channels: u16) {
        self.destination.accepts = channels;
        if self.work_fails(Side::Destination, Work::Accept) {
            let fault = Fault::new(Side::Destination, Step::Attach, Blame::Local, "it was made to fail");
            self.after(1, Happening::Destination(Event::Failed(fault)));
        }
    }

    fn same_as_at_the_pause(&self) -> Result<(), Violation> {
        let pairs = self.guest.memory.iter().zip(&self.destination.memory);
        if let Some(page) = pairs.zip(0..).find(|((here, there), _)| here != there).map(|(_, page)| page) {
            return Err(Violation::MemoryDiffers { page });
        }
        let state = self.destination.loaded.as_deref().and_then(<[Section]>::first);
        if state.is_none_or(|section| section.body != self.guest.writes.to_le_bytes()) {
            return Err(Violation::StateDiffers);
        }
        Ok(())
    }
}
