//! One migration: its clock, and everything that happens in its order.

use std::time::Duration;

use mig_core::destination::{Action, Destination, Event as DestinationEvent};
use mig_core::progress::OutcomeKind;
use mig_core::source::Event as SourceEvent;
use mig_core::{Claim, Side, Step, Word};
use mig_wire::hello::SessionId;

use crate::arbiter::Register;
use crate::destination::DestinationSide;
use crate::guest::Guest;
use crate::link::{TO_DESTINATION, TO_SOURCE};
use crate::mishap::{Blow, Mishaps};
use crate::mutant::Mutant;
use crate::network::Network;
use crate::permits::Permits;
use crate::queue::{Entry, Happening, Queue};
use crate::random::Random;
use crate::scenario::Scenario;
use crate::source::SourceSide;
use crate::verdict::Violation;

/// No run needs as many.
const MOST_EVENTS: u64 = 100_000;

/// What a migration starts with.
pub(crate) struct Start {
    pub(crate) guest: Guest,
    pub(crate) random: Random,
    pub(crate) register: Option<Register>,
    /// Copies that destinations of earlier attempts still hold, and the sessions that they are of.
    pub(crate) held: Vec<(Destination, SessionId)>,
    /// Its number, from 1.
    pub(crate) attempt: u8,
}

/// One migration.
pub(crate) struct World {
    pub(crate) scenario: Scenario,
    pub(crate) random: Random,
    pub(crate) guest: Guest,
    pub(crate) now: u64,
    pub(crate) source: SourceSide,
    pub(crate) destination: DestinationSide,
    pub(crate) network: Network,
    pub(crate) permits: Permits,
    pub(crate) mishaps: Mishaps,
    pub(crate) queue: Queue,
    /// The name of this attempt.
    pub(crate) session: SessionId,
    pub(crate) register: Option<Register>,
    held: Vec<(Destination, SessionId)>,
    /// Whether the source, and the destination, was in doubt.
    pub(crate) doubted: [bool; 2],
    /// Whether the operator is going to look, and how often he has.
    pub(crate) operator_called: bool,
    pub(crate) looks: u32,
    trace: bool,
}

impl World {
    pub(crate) fn new(scenario: Scenario, start: Start, trace: bool) -> Self {
        let Start { guest, mut random, mut register, held, attempt } = start;
        let session = [attempt; 16];
        if let Some(register) = &mut register
            && !(attempt > 1 && scenario.is(Mutant::BeginSkipped))
        {
            register.begin(session);
        }
        let now = random.within(0..1_000_000);
        let mut world = Self {
            source: SourceSide::new(&scenario, &guest, session),
            destination: DestinationSide::new(&scenario, &guest),
            network: Network::new(scenario.links()),
            permits: Permits::new(),
            mishaps: Mishaps::new(&scenario.mishaps),
            queue: Queue::default(),
            session,
            register,
            held,
            doubted: [false; 2],
            operator_called: false,
            looks: 0,
            now,
            scenario,
            random,
            guest,
            trace,
        };
        world.after(1, Happening::Source(SourceEvent::Connected));
        world
    }

    /// Lets everything happen that is going to.
    pub(crate) fn run(&mut self) -> Result<(), Violation> {
        self.strike_where_due(Side::Source);
        self.strike_where_due(Side::Destination);
        for _ in 0..MOST_EVENTS {
            let Some(entry) = self.queue.pop() else { return Ok(()) };
            self.now = entry.at;
            self.happen(entry)?;
            self.check_bounds()?;
        }
        Err(Violation::Endless)
    }

    fn happen(&mut self, entry: Entry) -> Result<(), Violation> {
        let busy = self.busy_for(&entry.what);
        if self.now < busy {
            self.queue.put_off(entry, busy);
            return Ok(());
        }
        let Some(what) = self.stalls(entry.what) else { return Ok(()) };
        if self.trace {
            eprintln!("{:>12} {what:?}", self.now);
        }
        match what {
            Happening::Source(event) => self.tell_source(event),
            Happening::Destination(event) => self.tell_destination(event),
            Happening::Arrives(link) => self.arrives(link),
            Happening::AttachAnswered => self.tell_source(SourceEvent::Attached),
            Happening::Deadline => {
                self.too_late();
                Ok(())
            }
            Happening::Claims(side) => {
                self.claims(side);
                Ok(())
            }
            Happening::Asks(number) => self.asks(number),
            Happening::Asked(number) => self.asked(number),
            Happening::Answered(number, fate) => self.answered(number, fate),
            Happening::Unanswered(number) => self.unanswered(number),
            Happening::OperatorLooks => self.operator_looks(),
            Happening::Done(Side::Source, job) => self.source_did(job),
            Happening::Done(Side::Destination, job) => self.destination_did(job),
            Happening::Channel { epoch, channel, chunk } => self.channel_turns(epoch, channel, chunk),
            Happening::Struck(side, blow) => self.struck(side, blow),
            Happening::Silence { side, outage } => {
                self.silence(side, outage);
                Ok(())
            }
            Happening::PeerGone(side) => {
                self.hangs_up(side);
                Ok(())
            }
            Happening::Heals { outage } => {
                self.heals(outage);
                Ok(())
            }
        }
    }

    /// Until when the coordinator that this is for does something else.
    fn busy_for(&self, what: &Happening) -> u64 {
        let side = match what {
            Happening::Source(_) | Happening::Arrives(TO_SOURCE) => Side::Source,
            Happening::Destination(_)
            | Happening::Arrives(TO_DESTINATION)
            | Happening::Asked(_)
            | Happening::Struck(_, Blow::StrayQuestion) => Side::Destination,
            Happening::Struck(side, Blow::Cancel | Blow::Silence | Blow::Nonsense | Blow::Word(_)) => *side,
            _ => return 0,
        };
        match side {
            Side::Source if self.scenario.source_blocks => self.source.busy_until,
            Side::Destination if self.scenario.destination_blocks => self.destination.busy_until,
            Side::Source | Side::Destination => 0,
        }
    }

    pub(crate) fn trace(&self, what: impl Fn() -> String) {
        if self.trace {
            eprintln!("{:>12}     {}", self.now, what());
        }
    }

    pub(crate) fn after(&mut self, delay: u64, what: Happening) {
        self.queue.push(self.now + delay, what);
    }

    /// The machines know the time of their own host only.
    pub(crate) fn clock(&self, side: Side) -> Duration {
        let ahead = if side == Side::Source { 0 } else { self.scenario.clock_ahead };
        Duration::from_nanos(self.now + ahead)
    }

    /// What a side's machine is doing, while there is one.
    pub(crate) fn step(&self, side: Side) -> Option<Step> {
        match side {
            Side::Source => self.source.machine.as_ref().map(|machine| machine.step()),
            Side::Destination => self.destination.machine.as_ref().map(|machine| machine.step()),
        }
    }

    /// What another attempt starts with, where there can be one.
    pub(crate) fn guest_that_stayed(mut self) -> Option<Start> {
        let report = self.source.report.as_ref()?;
        if report.outcome != OutcomeKind::StillHere || !self.guest.runs {
            return None;
        }
        self.guest.run_to(self.now);
        self.guest.old_dirty = Some(self.source.dirty);
        self.guest.restart_clock();
        let session = self.session;
        self.held.extend(self.destination.machine.map(|machine| (machine, session)));
        Some(Start {
            guest: self.guest,
            random: self.random,
            register: self.register,
            held: self.held,
            attempt: session[0] + 1,
        })
    }

    /// A word where an earlier attempt left its copy, by somebody who does not look: with an arbiter none of them
    /// runs once another session was begun.
    pub(crate) fn careless_words(&mut self) -> Result<(), Violation> {
        let now = self.clock(Side::Destination);
        let Some(register) = &mut self.register else { return Ok(()) };
        for (held, session) in self.held.clone() {
            let (held, mut actions) = held.handle(now, DestinationEvent::Resolve(Word::Resume));
            if actions.iter().any(|action| matches!(action, Action::Claim)) {
                let granted = register.claim(&session, Side::Destination);
                let claim = if granted { Claim::Granted } else { Claim::Denied };
                (_, actions) = held.handle(now, DestinationEvent::Claimed(claim));
            }
            if actions.iter().any(|action| matches!(action, Action::Resume(_))) {
                return Err(Violation::TwoRunners { side: Side::Destination });
            }
        }
        Ok(())
    }
}
