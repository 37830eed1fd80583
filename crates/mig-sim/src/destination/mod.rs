//! The destination's host: a driver that feeds the machine of `mig-core` events and carries out its actions.

mod act;
mod listener;
mod pages;
mod work;

use mig_core::destination::{Destination, End, Event};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::hello::Secret;
use mig_wire::section::Section;

use crate::arbiter;
use crate::guest::{Guest, Page};
use crate::link::{Cargo, TO_SOURCE};
use crate::mutant::Mutant;
use crate::scenario::Scenario;
use crate::verdict::Violation;
use crate::world::World;

/// What its sessions are proved with.
pub(crate) const SECRET: Secret = [2; 16];

/// The destination's host.
pub(crate) struct DestinationSide {
    pub(crate) machine: Option<Destination>,
    pub(crate) busy_until: u64,
    /// Jobs under way.
    pub(crate) jobs: usize,
    memory: Vec<Page>,
    received: Vec<bool>,
    accepts: u16,
    attached: u16,
    loaded: Option<Vec<Section>>,
    pub(crate) crashed: bool,
    pub(crate) ran: bool,
    /// A claim is on its way to the arbiter, or its answer back.
    pub(crate) claiming: bool,
    /// The source was told Ready: from then on it may come to ask.
    was_ready: bool,
    /// It has answered "never".
    promised: bool,
    /// The question that is being answered.
    asker: Option<u64>,
    /// An operator said something while this side was in doubt.
    pub(crate) word: bool,
    pub(crate) end: Option<End>,
    pub(crate) resumed_at: u64,
    pub(crate) resume_taken_at: Option<u64>,
    /// When it was told to run the guest, and took it.
    pub(crate) given_at: u64,
    pub(crate) ready_said_at: u64,
    pub(crate) verify_took: u64,
    pub(crate) load_took: u64,
    issued_at: u64,
    /// When it last acknowledged a round, and when it heard the state: with both, only digests are missing.
    acknowledged_at: u64,
    state_heard_at: u64,
}

impl DestinationSide {
    pub(crate) fn new(scenario: &Scenario, guest: &Guest) -> Self {
        Self {
            machine: Some(Destination::new(
                SECRET,
                scenario.channels_granted,
                scenario.arbitrated.then_some(arbiter::IDENTITY),
            )),
            busy_until: 0,
            jobs: 0,
            memory: vec![Page::default(); guest.memory.len()],
            received: vec![false; guest.memory.len()],
            accepts: 0,
            attached: 0,
            loaded: None,
            crashed: false,
            ran: false,
            claiming: false,
            was_ready: false,
            promised: false,
            asker: None,
            word: false,
            end: None,
            resumed_at: 0,
            resume_taken_at: None,
            given_at: 0,
            ready_said_at: 0,
            verify_took: 0,
            load_took: 0,
            issued_at: 0,
            acknowledged_at: 0,
            state_heard_at: 0,
        }
    }
}

impl World {
    pub(crate) fn destination_hears(&mut self, message: Message) -> Result<(), Violation> {
        let gave_up = matches!(self.destination.end, Some(End::NotReceived(_)));
        let taken = gave_up && self.scenario.is(Mutant::LateCommitTaken)
            || self.destination.promised && self.scenario.is(Mutant::CommitTakenAfterNever);
        if message == Message::Commit && taken {
            return self.permits.taken_over(false, false);
        }
        self.tell_destination(Event::Message(message))
    }

    pub(crate) fn tell_destination(&mut self, event: Event) -> Result<(), Violation> {
        let Some(machine) = self.destination.machine.take() else { return Ok(()) };
        match event {
            Event::Verified => {
                let complete_at = self.destination.acknowledged_at.max(self.destination.state_heard_at);
                self.destination.verify_took = self.now - complete_at;
            }
            Event::Message(Message::State { .. }) => self.destination.state_heard_at = self.now,
            Event::Loaded => {
                self.destination.load_took = self.now - self.destination.issued_at;
                self.destination.ready_said_at = self.now;
            }
            Event::Claimed(_) => self.destination.claiming = false,
            Event::Resumed { .. } => self.destination.resume_taken_at = Some(self.now),
            _ => {}
        }
        let (machine, actions) = machine.handle(self.clock(Side::Destination), event);
        let ended = machine.has_ended();
        self.destination.machine = Some(machine);
        for action in actions {
            if self.ends_here(Side::Destination) {
                return Ok(());
            }
            self.trace(|| format!("destination: {action:?}"));
            if self.destination.end.is_some() {
                let what = format!("{action:?}");
                return Err(Violation::AfterTheEnd { side: Side::Destination, what });
            }
            self.destination_does(action)?;
        }
        if ended {
            if self.destination.end.is_none() {
                return Err(Violation::Ends("the destination's machine ended without an end".into()));
            }
            self.destination.machine = None;
            self.send(TO_SOURCE, Cargo::Closed);
        }
        if self.scenario.is(Mutant::HeldCopyDropped) && self.is_in_doubt(Side::Destination) {
            let fault = Fault::new(Side::Destination, Step::Commit, Blame::Network, "the source is gone");
            self.destination.end = Some(End::NotReceived(fault));
            self.destination.machine = None;
        }
        self.call_operator();
        self.strike_where_due(Side::Destination);
        Ok(())
    }
}
