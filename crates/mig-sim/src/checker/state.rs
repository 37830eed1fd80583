//! A state of the checked world: two sides with their machines, what is on its way between them, and what only
//! the checker knows.
//!
//! Invariant: states that cannot be told apart by what may still happen are equal ([`State::settle`]).

use std::time::Duration;

use mig_core::Side;
use mig_core::progress::OutcomeKind;
use mig_wire::frame::Fate;

use super::line::Line;
use super::machines::{DestinationEnd, MachineId, MessageId, Work};

/// Everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) source: Host,
    pub(super) destination: Host,
    pub(super) to_source: Lane<MessageId>,
    pub(super) to_destination: Lane<MessageId>,
    /// The page channel.
    pub(super) pages: Lane<Token>,
    /// The destination has answered the page channel's Attach.
    pub(super) attached: bool,
    pub(super) source_end: Option<OutcomeKind>,
    pub(super) destination_end: Option<DestinationEnd>,
    /// The destination has said that it never ran the guest and never will.
    pub(super) promised: bool,
    /// The question that the source waits to be answered.
    pub(super) question: Question,
    /// One that it does not wait for any more, but that may still arrive.
    pub(super) stray: bool,
    /// How often it has asked in vain.
    pub(super) in_vain: u8,
    /// The source has ended with the guest, and asks for the copy it left.
    pub(super) recalls: bool,
    /// The destination's listener has forgotten the session.
    pub(super) forgotten: bool,
    /// Whom the arbiter gave the guest. It survives every crash.
    pub(super) register: Option<Side>,
}

/// A question of a source in doubt, on a connection of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Question {
    None,
    OnItsWay,
    /// The answer is.
    Answered(Fate),
}

/// A side: its process, its driver, its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Host {
    /// `None` once it has ended, or crashed.
    pub(super) machine: Option<MachineId>,
    /// Its process lives.
    pub(super) alive: bool,
    /// Its driver still uses the control connection.
    pub(super) link: bool,
    /// A run permit is live here: the guest runs, or is about to. One that is paused takes a new one.
    pub(super) permit: bool,
    /// A permit was spent on a resume that failed.
    pub(super) resume_failed: bool,
    pub(super) work: Line<Work, 4>,
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lane<T> {
    pub(super) queue: Line<T, 5>,
    /// From here on everything is lost, and nobody is told.
    pub(super) cut: bool,
}

/// What travels on the page channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Token {
    Attach,
    RoundEnd(u32),
}

impl Host {
    pub(super) fn new(machine: MachineId, permit: bool) -> Self {
        let (alive, link, resume_failed) = (true, true, false);
        Self { machine: Some(machine), alive, link, permit, resume_failed, work: Line::EMPTY }
    }

    /// Whether what arrives on the control connection is heard.
    pub(super) fn listens(&self) -> bool {
        self.machine.is_some() && self.link
    }

    /// Its guest runs, for all to see.
    pub(super) fn runs(&self) -> bool {
        self.permit && !self.work.contains(Work::Resume)
    }

    fn ends(&mut self) {
        self.machine = None;
        self.link = false;
        self.work = Line::EMPTY;
    }

    fn crashes(&mut self) {
        self.ends();
        self.alive = false;
        self.permit = false;
        self.resume_failed = false;
    }
}

impl<T: Copy + Ord> Lane<T> {
    pub(super) const OPEN: Self = Self { queue: Line::EMPTY, cut: false };

    pub(super) fn send(&mut self, item: T) {
        if !self.cut {
            self.queue.push(item);
        }
    }

    /// What arrived before arrived; what is on its way and what comes later does not.
    pub(super) fn cuts(&mut self) {
        *self = Self { queue: Line::EMPTY, cut: true };
    }
}

impl State {
    pub(super) fn new(source: MachineId, destination: MachineId) -> Self {
        Self {
            source: Host::new(source, true),
            destination: Host::new(destination, false),
            to_source: Lane::OPEN,
            to_destination: Lane::OPEN,
            pages: Lane::OPEN,
            attached: false,
            source_end: None,
            destination_end: None,
            promised: false,
            question: Question::None,
            stray: false,
            in_vain: 0,
            recalls: false,
            forgotten: false,
            register: None,
        }
    }

    pub(super) fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    pub(super) fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    /// What is on its way to a side.
    pub(super) fn to(&self, side: Side) -> &Lane<MessageId> {
        match side {
            Side::Source => &self.to_source,
            Side::Destination => &self.to_destination,
        }
    }

    pub(super) fn to_mut(&mut self, side: Side) -> &mut Lane<MessageId> {
        match side {
            Side::Source => &mut self.to_source,
            Side::Destination => &mut self.to_destination,
        }
    }

    pub(super) fn both_live(&self) -> bool {
        self.source.alive && self.destination.alive
    }

    pub(super) fn all_over(&self) -> bool {
        self.source.machine.is_none() && self.destination.machine.is_none()
    }

    /// How both sides ended, once they have.
    pub(super) fn ends(&self) -> Option<(&'static str, &'static str)> {
        if !self.all_over() {
            return None;
        }
        let source = self.source_end.filter(|_| self.source.alive).map_or("crashed", OutcomeKind::name);
        let destination = match self.destination_end.filter(|_| self.destination.alive) {
            None => "crashed",
            Some(DestinationEnd::Running) => "running",
            Some(DestinationEnd::NotReceived) => "not-received",
            // a copy that could not be started was tried again
            Some(DestinationEnd::Lost) if self.destination.permit => "running",
            Some(DestinationEnd::Lost) => "lost",
        };
        Some((source, destination))
    }

    pub(super) fn runners(&self) -> usize {
        usize::from(self.source.permit) + usize::from(self.destination.permit)
    }

    /// Whether a side still has the guest although its machine has ended: its resume failed, and its holder can
    /// try again.
    pub(super) fn holds_a_copy(&self, side: Side) -> bool {
        let host = self.host(side);
        host.machine.is_none() && host.alive && host.resume_failed && !host.permit
    }

    pub(super) fn end(&mut self, side: Side) {
        self.host_mut(side).ends();
    }

    pub(super) fn crash(&mut self, side: Side) {
        self.host_mut(side).crashes();
    }

    /// Gives the current question up: it may still arrive, its answer does not.
    pub(super) fn stop_waiting(&mut self) {
        self.stray |= self.question == Question::OnItsWay;
        self.question = Question::None;
    }

    /// What the destination's listener answers for it once its machine has ended, or after a crash.
    pub(super) fn fate(&self) -> Fate {
        let known = self.destination_end.filter(|_| self.destination.alive && !self.forgotten);
        match known {
            Some(DestinationEnd::NotReceived) => Fate::Never,
            Some(DestinationEnd::Running) => {
                Fate::Running { resume: Duration::ZERO, running_for: Duration::ZERO }
            }
            Some(DestinationEnd::Lost) => Fate::Lost,
            None => Fate::Unknown,
        }
    }

    /// Drops what can have no effect any more.
    pub(super) fn settle(&mut self) {
        if self.source.machine.is_none() {
            self.stop_waiting();
        }
        for side in [Side::Source, Side::Destination] {
            if !self.host(side).listens() {
                self.to_mut(side).queue = Line::EMPTY;
            }
        }
        if self.destination.machine.is_none() {
            self.pages.queue = Line::EMPTY;
            self.stray = false;
        }
        self.recalls &= self.source.alive && self.destination.machine.is_some();
        if !self.source.work.contains(Work::Attach) {
            self.attached = false;
        }
        if !self.source.link && !self.destination.link {
            (self.to_source, self.to_destination) = (Lane::OPEN, Lane::OPEN);
        }
        if self.all_over() {
            self.pages = Lane::OPEN;
            (self.in_vain, self.register, self.forgotten) = (0, None, false);
        }
    }
}

/// The other side.
pub(super) fn peer(side: Side) -> Side {
    match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    }
}
