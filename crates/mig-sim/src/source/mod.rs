//! The source's host: a driver that feeds the machine of `mig-core` events and carries out its actions.

mod act;
mod pages;
mod work;

use std::time::Duration;

use mig_core::domain::PAGE_BYTES;
use mig_core::progress::{PageCounts, Report};
use mig_core::source::{Event, Source, SourceConfig};
use mig_core::{Bitmap, Blame, Side};
use mig_wire::Message;
use mig_wire::describe::Description;
use mig_wire::section::Section;

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
    /// Channels work for one epoch; what they still do for an older one is dropped.
    pub(crate) epoch: u32,
    round: u32,
    channels: u16,
    channels_done: u16,
    pages: PageCounts,
    sections: Vec<Section>,
    pub(crate) crashed: bool,
    pub(crate) committed: bool,
    pub(crate) resume_failed: bool,
    resuming: bool,
    pub(crate) report: Option<Report>,
    pub(crate) pause_ordered_at: u64,
    pub(crate) paused_at: u64,
    pub(crate) paused_heard_at: u64,
    pub(crate) running_heard_at: u64,
    /// The pages that really differed, by guest address, where that was asked.
    pub(crate) differing: Option<Vec<u64>>,
}

impl SourceSide {
    pub(crate) fn new(scenario: &Scenario, guest: &Guest) -> Self {
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
            verify: scenario.verify,
            session: [1; 16],
            description,
            ram_bytes: guest.domain.bytes(),
            pause: nanos(scenario.costs.pause),
            save: nanos(scenario.costs.save),
            verify_cost: nanos(scenario.costs.verify),
        };
        Self {
            machine: Some(Source::new(config)),
            busy_until: 0,
            jobs: 0,
            dirty: Bitmap::empty(&guest.domain),
            epoch: 0,
            round: 0,
            channels: 0,
            channels_done: 0,
            pages: PageCounts::default(),
            sections: Vec::new(),
            crashed: false,
            committed: false,
            resume_failed: false,
            resuming: false,
            report: None,
            pause_ordered_at: 0,
            paused_at: 0,
            paused_heard_at: 0,
            running_heard_at: 0,
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
            _ => {}
        }
        let lost_link = matches!(&event, Event::Failed(fault) if fault.blame == Blame::Network);
        let doubts = machine.is_committed() && lost_link;
        let (machine, actions) = machine.handle(self.clock(Side::Source), event);
        let ended = machine.has_ended();
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
        if ended {
            if self.source.report.is_none() {
                return Err(Violation::Ends("the source's machine ended without an end".into()));
            }
            if doubts && self.scenario.is(Mutant::InDoubtResumes) {
                self.permits.taken_back()?;
            }
            self.source.machine = None;
            self.source.epoch += 1;
            self.send(TO_DESTINATION, Cargo::Closed);
        }
        self.strike_where_due(Side::Source);
        Ok(())
    }
}
