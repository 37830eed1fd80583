//! The source's host: a driver that feeds the machine of `mig-core` events and carries out its actions.

mod act;
mod asking;
mod pages;
mod work;

use std::time::Duration;

use mig_core::domain::PAGE_BYTES;
use mig_core::hot::Hot;
use mig_core::progress::{PageCounts, Report};
use mig_core::source::{Event, Source, SourceConfig};
use mig_core::{Bitmap, Side};
use mig_wire::Message;
use mig_wire::describe::Description;
use mig_wire::frame::Fate;
use mig_wire::hello::{Capabilities, SessionId};
use mig_wire::section::Section;

use crate::arbiter;
use crate::guest::Guest;
use crate::link::{Cargo, TO_DESTINATION};
use crate::mutant::Mutant;
use crate::scenario::Scenario;
use crate::verdict::Violation;
use crate::world::World;

/// The source's host.
pub(crate) struct SourceSide {
    pub(crate) machine: Option<Source>,
    pub(crate) busy_until: u64,
    /// Jobs under way.
    pub(crate) jobs: usize,
    pub(crate) dirty: Bitmap,
    pub(crate) hot: Hot,
    /// Channels work for one epoch; what they still do for an older one is dropped.
    pub(crate) epoch: u32,
    round: u32,
    channels: u16,
    channels_done: u16,
    pages: PageCounts,
    sections: Vec<Section>,
    pub(crate) crashed: bool,
    pub(crate) committed_at: Option<u64>,
    pub(crate) resume_failed: bool,
    resuming: bool,
    /// Whether the guest ran here after it was paused for the switchover.
    pub(crate) ran_again: bool,
    /// A claim is on its way to the arbiter, or its answer back.
    pub(crate) claiming: bool,
    /// The question that is on its way, and how many there were.
    question: Option<u64>,
    questions: u64,
    /// It has ended, and asks for the copy that it left.
    recalling: bool,
    unknown_there: u32,
    /// An operator said something while this side was in doubt.
    pub(crate) word: bool,
    pub(crate) report: Option<Report>,
    pub(crate) pause_ordered_at: u64,
    pub(crate) paused_at: u64,
    pub(crate) paused_heard_at: u64,
    pub(crate) running_heard_at: u64,
    pub(crate) ready_heard_at: u64,
    /// Whether it heard how the destination timed its start.
    pub(crate) start_heard: bool,
    /// The pages that really differed, by guest address, where that was asked.
    pub(crate) differing: Option<Vec<u64>>,
}

impl SourceSide {
    pub(crate) fn new(scenario: &Scenario, guest: &Guest, session: SessionId) -> Self {
        let nanos = Duration::from_nanos;
        let description = Description {
            architecture: String::new(),
            page_bytes: PAGE_BYTES as u32,
            vcpus: 1,
            regions: scenario.regions.clone(),
            boot_id: None,
            schemas: Vec::new(),
            platform: Vec::new(),
        };
        let config = SourceConfig {
            policy: scenario.policy.clone(),
            channels: scenario.channels_asked,
            suited_channels: false,
            page_encodings: Capabilities::empty(),
            verify: scenario.verify,
            session,
            arbiter: scenario.arbitrated.then_some(arbiter::IDENTITY),
            description,
            ram_bytes: guest.domain.bytes(),
            pause_bytes_per_second: None,
            can_throttle: true,
            pause: nanos(scenario.costs.pause),
            save: nanos(scenario.costs.save),
            verify_cost: nanos(scenario.costs.verify),
        };
        Self {
            machine: Some(Source::new(config)),
            busy_until: 0,
            jobs: 0,
            dirty: Bitmap::empty(&guest.domain),
            hot: Hot::new(&guest.domain),
            epoch: 0,
            round: 0,
            channels: 0,
            channels_done: 0,
            pages: PageCounts::default(),
            sections: Vec::new(),
            crashed: false,
            committed_at: None,
            resume_failed: false,
            resuming: false,
            ran_again: false,
            claiming: false,
            question: None,
            questions: 0,
            recalling: false,
            unknown_there: 0,
            word: false,
            report: None,
            pause_ordered_at: 0,
            paused_at: 0,
            paused_heard_at: 0,
            running_heard_at: 0,
            ready_heard_at: 0,
            start_heard: false,
            differing: None,
        }
    }
}

impl World {
    pub(crate) fn tell_source(&mut self, event: Event) -> Result<(), Violation> {
        let Some(machine) = self.source.machine.take() else { return Ok(()) };
        match &event {
            Event::Paused => self.source.paused_heard_at = self.now,
            Event::Message(Message::Running { .. }) => self.source.running_heard_at = self.now,
            Event::Message(Message::Ready { .. }) => self.source.ready_heard_at = self.now,
            Event::Message(Message::Started { .. }) => self.source.start_heard = true,
            Event::Answered(Fate::Running { running_for, .. }) => {
                self.source.running_heard_at = self.now - running_for.as_nanos() as u64;
            }
            Event::Claimed(_) => self.source.claiming = false,
            _ => {}
        }
        let doubted = machine.is_in_doubt();
        let (machine, actions) = machine.handle(self.clock(Side::Source), event);
        let (ended, doubts) = (machine.has_ended(), machine.is_in_doubt() && !doubted);
        self.source.machine = Some(machine);
        for action in actions {
            if self.ends_here(Side::Source) {
                return Ok(());
            }
            self.trace(|| format!("source: {action:?}"));
            if self.source.report.is_some() {
                return Err(Violation::AfterTheEnd { side: Side::Source, what: format!("{action:?}") });
            }
            self.source_does(action)?;
        }
        if doubts && self.scenario.is(Mutant::InDoubtResumes) {
            self.permits.taken_back(false)?;
        }
        if ended {
            if self.source.report.is_none() {
                return Err(Violation::Ends("the source's machine ended without an end".into()));
            }
            self.send(TO_DESTINATION, Cargo::Closed);
            if self.source.machine.take().is_some_and(|machine| machine.left_a_copy()) {
                self.recall();
            }
            self.source.epoch += 1;
        }
        self.call_operator();
        self.strike_where_due(Side::Source);
        Ok(())
    }
}
