//! The clock, what is going to happen, the links between the sides, and the mishaps.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

use mig_core::destination::{End, Event as DestinationEvent};
use mig_core::progress::{OutcomeKind, Verification};
use mig_core::source::Event as SourceEvent;
use mig_core::{Blame, Fault, RunPermit, Side, Step};
use mig_wire::Message;
use mig_wire::section::Section;

use crate::drivers::{DestinationSide, SourceSide};
use crate::guest::Guest;
use crate::link::{Cargo, FIRST_CHANNEL, Link, TO_DESTINATION, TO_SOURCE};
use crate::random::Random;
use crate::scenario::{Blow, Mishap, Mutant, Scenario, Work};
use crate::verdict::{DestinationEnd, SourceEnd, Summary, Violation};

/// No run needs as many.
const MOST_EVENTS: u64 = 100_000;
/// What a closed connection says.
const CLOSED: &str = "the peer closed the connection";

/// Something under way at a side, with what it needs.
#[derive(Debug)]
pub(crate) enum Job {
    Plain(Work),
    Locate(Vec<u64>),
    Resume(RunPermit),
    Verify(Vec<u64>),
    Load(Vec<Section>),
}

impl Job {
    pub(crate) fn work(&self) -> Work {
        match self {
            Self::Plain(work) => *work,
            Self::Locate(_) => Work::Locate,
            Self::Resume(_) => Work::Resume,
            Self::Verify(_) => Work::Verify,
            Self::Load(_) => Work::Load,
        }
    }
}

/// Something that is going to happen.
#[derive(Debug)]
pub(crate) enum Happening {
    Source(SourceEvent),
    Destination(DestinationEvent),
    Arrives {
        link: usize,
        cargo: Cargo,
    },
    Done(Side, Job),
    /// A channel of the source turns to a chunk.
    Channel {
        epoch: u32,
        channel: u16,
        chunk: u64,
    },
    Struck(Side, Blow),
}

#[derive(Debug)]
struct Entry {
    at: u64,
    /// What is done comes first, so that who waited for it sees it; then what was scheduled first.
    order: (bool, u64),
    what: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// The earliest is the greatest, as the heap wants it.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Who may run the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Source,
    /// The source spent its permit, the destination has not minted one.
    Nobody,
    Destination,
}

/// One migration.
pub(crate) struct World {
    pub(crate) scenario: Scenario,
    pub(crate) random: Random,
    pub(crate) guest: Guest,
    pub(crate) now: u64,
    pub(crate) source: SourceSide,
    pub(crate) destination: DestinationSide,
    pub(crate) links: Vec<Link>,
    pub(crate) network_down: bool,
    queue: BinaryHeap<Entry>,
    scheduled: u64,
    holder: Holder,
    /// Which mishaps have happened.
    spent: Vec<bool>,
    counts: Vec<u64>,
    trace: bool,
}

impl World {
    pub(crate) fn new(scenario: Scenario, guest: Guest, mut random: Random, trace: bool) -> Self {
        let start = random.within(0..1_000_000);
        let mishaps = scenario.mishaps.len();
        let mut world = Self {
            source: SourceSide::new(&scenario, &guest),
            destination: DestinationSide::new(&scenario, &guest),
            links: vec![Link::default(); FIRST_CHANNEL + usize::from(scenario.channels_asked)],
            network_down: false,
            queue: BinaryHeap::new(),
            scheduled: 0,
            holder: Holder::Source,
            spent: vec![false; mishaps],
            counts: vec![0; mishaps],
            now: start,
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
        }
        Err(Violation::Endless)
    }

    fn happen(&mut self, entry: Entry) -> Result<(), Violation> {
        let side = match &entry.what {
            Happening::Source(_) => Some(Side::Source),
            Happening::Destination(_) => Some(Side::Destination),
            Happening::Arrives { link: TO_SOURCE, .. } => Some(Side::Source),
            Happening::Arrives { link: TO_DESTINATION, .. } => Some(Side::Destination),
            Happening::Struck(side, blow) if !matches!(blow, Blow::Crash | Blow::PowerLoss) => Some(*side),
            _ => None,
        };
        let busy = match side {
            Some(Side::Source) if self.scenario.source_blocks => self.source.busy_until,
            Some(Side::Destination) if self.scenario.destination_blocks => self.destination.busy_until,
            _ => 0,
        };
        if self.now < busy {
            self.queue.push(Entry { at: busy, ..entry });
            return Ok(());
        }
        let what = entry.what;
        if self.trace {
            eprintln!("{:>12} {what:?}", self.now);
        }
        match what {
            Happening::Source(event) => self.tell_source(event),
            Happening::Destination(event) => self.tell_destination(event),
            Happening::Arrives { link, cargo } => self.arrives(link, cargo),
            Happening::Done(Side::Source, job) => self.source_did(job),
            Happening::Done(Side::Destination, job) => self.destination_did(job),
            Happening::Channel { epoch, channel, chunk } => self.channel_turns(epoch, channel, chunk),
            Happening::Struck(side, blow) => self.struck(side, blow),
        }
    }

    pub(crate) fn trace(&self, what: impl Fn() -> String) {
        if self.trace {
            eprintln!("{:>12}     {}", self.now, what());
        }
    }

    pub(crate) fn after(&mut self, delay: u64, what: Happening) {
        self.at(self.now + delay, what);
    }

    fn at(&mut self, at: u64, what: Happening) {
        self.scheduled += 1;
        let order = (!matches!(what, Happening::Done(..)), self.scheduled);
        self.queue.push(Entry { at, order, what });
    }

    /// The machines know the time of their own host only.
    pub(crate) fn clock(&self, side: Side) -> Duration {
        let ahead = if side == Side::Source { 0 } else { self.scenario.clock_ahead };
        Duration::from_nanos(self.now + ahead)
    }

    // ---- links

    pub(crate) fn send(&mut self, link: usize, cargo: Cargo) {
        if self.network_down {
            return;
        }
        let pages = match &cargo {
            Cargo::Pages(pages) => pages.iter().filter(|(_, page)| !page.is_zero()).count() as u64 * 16 + 1,
            _ => 1,
        };
        let (busy, latency, jitter) =
            (pages * self.scenario.nanos_per_page / 16, self.scenario.latency, self.scenario.jitter);
        let sent = self.links[link].sent;
        let closes = matches!(cargo, Cargo::Closed);
        let arrival = self.links[link].send(self.now, busy, latency, jitter, &mut self.random);
        self.at(arrival, Happening::Arrives { link, cargo });
        let cut = Mishap::Cut { link, after: sent };
        if !closes && self.spend(|mishap| *mishap == cut) {
            self.cut();
        }
    }

    /// The network goes, and with it some of what is under way; each side notices in its own time.
    fn cut(&mut self) {
        self.network_down = true;
        for link in &mut self.links {
            if self.random.chance(50) {
                link.lost_after = Some(self.now);
            }
        }
        self.trace(|| "the network is cut".into());
        for side in [Side::Source, Side::Destination] {
            let delay = self.random.within(1..10_000_000);
            self.notices(side, delay, "the link was lost");
        }
    }

    pub(crate) fn notices(&mut self, side: Side, delay: u64, cause: &str) {
        let fault = Fault::new(side, self.step(side).unwrap_or(Step::Resume), Blame::Network, cause);
        match side {
            Side::Destination if self.scenario.is(Mutant::NoDeadline) => {}
            Side::Source => self.after(delay, Happening::Source(SourceEvent::Failed(fault))),
            Side::Destination => self.after(delay, Happening::Destination(DestinationEvent::Failed(fault))),
        }
    }

    fn arrives(&mut self, link: usize, cargo: Cargo) -> Result<(), Violation> {
        if self.links[link].lost_after.is_some_and(|lost| self.now > lost) {
            return Ok(());
        }
        match (link, cargo) {
            (TO_SOURCE, Cargo::Control(message)) => self.tell_source(SourceEvent::Message(message)),
            (TO_SOURCE, Cargo::Closed) => {
                let step = self.step(Side::Source).unwrap_or(Step::Resume);
                let fault = Fault::new(Side::Source, step, Blame::Network, CLOSED);
                self.tell_source(SourceEvent::Failed(fault))
            }
            (TO_DESTINATION, Cargo::Control(message)) => self.destination_hears(message),
            (TO_DESTINATION, Cargo::Closed) => {
                let step = self.step(Side::Destination).unwrap_or(Step::Resume);
                let fault = Fault::new(Side::Destination, step, Blame::Network, CLOSED);
                self.tell_destination(DestinationEvent::Failed(fault))
            }
            (_, cargo) => self.channel_receives(cargo),
        }
    }

    // ---- mishaps

    /// Whether a mishap of this kind is due; it is then used up.
    pub(crate) fn spend(&mut self, due: impl Fn(&Mishap) -> bool) -> bool {
        let at = (0..self.spent.len()).find(|&i| !self.spent[i] && due(&self.scenario.mishaps[i]));
        if let Some(at) = at {
            self.spent[at] = true;
        }
        at.is_some()
    }

    /// Whether this time the action, or the page on its way, is to fail.
    pub(crate) fn fails(&mut self, this: impl Fn(&Mishap) -> Option<u64>) -> bool {
        for i in 0..self.spent.len() {
            let Some(after) = this(&self.scenario.mishaps[i]) else { continue };
            self.counts[i] += 1;
            if !self.spent[i] && self.counts[i] > after {
                self.spent[i] = true;
                return true;
            }
        }
        false
    }

    pub(crate) fn work_fails(&mut self, of: Side, what: Work) -> bool {
        let fails = self.fails(|mishap| match mishap {
            Mishap::Fails { side, work, after } if (*side, *work) == (of, what) => Some(*after),
            _ => None,
        });
        if fails {
            self.trace(|| format!("{what:?} fails at the {of}"));
        }
        fails
    }

    fn step(&self, side: Side) -> Option<Step> {
        match side {
            Side::Source => self.source.machine.as_ref().map(|machine| machine.step()),
            Side::Destination => self.destination.machine.as_ref().map(|machine| machine.step()),
        }
    }

    pub(crate) fn strike_where_due(&mut self, side: Side) {
        let Some(now_at) = self.step(side).map(step_index) else { return };
        for i in 0..self.spent.len() {
            if let Mishap::Strike { side: at, step, after, blow } = self.scenario.mishaps[i]
                && (at, step) == (side, now_at)
                && !self.spent[i]
            {
                self.spent[i] = true;
                self.after(after, Happening::Struck(side, blow));
            }
        }
    }

    fn struck(&mut self, side: Side, blow: Blow) -> Result<(), Violation> {
        match (blow, side) {
            (Blow::Cancel, Side::Source) => self.tell_source(SourceEvent::Cancelled { reason: None }),
            (Blow::Cancel, Side::Destination) => {
                self.tell_destination(DestinationEvent::Cancelled { reason: None })
            }
            (Blow::Silence, _) => {
                self.notices(side, 0, "the peer is silent");
                Ok(())
            }
            (Blow::Nonsense, Side::Source) => {
                let said = [Message::Commit, Message::Attached, Message::Ping(7)];
                let at = self.random.within(0..3) as usize;
                let message = said.into_iter().nth(at).expect("one of three");
                self.tell_source(SourceEvent::Message(message))
            }
            (Blow::Nonsense, Side::Destination) => {
                let first_chunk = u64::MAX;
                let said = [
                    Message::RoundAck { round: 0 },
                    Message::Running { resume: Duration::MAX },
                    Message::Digests { first_chunk, digests: vec![1] },
                ];
                let at = self.random.within(0..3) as usize;
                let message = said.into_iter().nth(at).expect("one of three");
                self.tell_destination(DestinationEvent::Message(message))
            }
            (Blow::Crash | Blow::PowerLoss, _) => {
                self.crash(side, blow);
                Ok(())
            }
        }
    }

    fn crash(&mut self, side: Side, blow: Blow) {
        let (other, link) = match side {
            Side::Source => (Side::Destination, TO_DESTINATION),
            Side::Destination => (Side::Source, TO_SOURCE),
        };
        match side {
            // one that has handed the guest over, or has it running, may go as it likes
            Side::Source if self.source.machine.is_some() => {
                self.source.crashed = true;
                self.source.machine = None;
                self.source.epoch += 1;
                self.guest.pause(self.now);
            }
            Side::Destination if self.destination.machine.is_some() => {
                self.destination.crashed = true;
                self.destination.machine = None;
            }
            _ => return,
        }
        if blow == Blow::Crash {
            self.send(link, Cargo::Closed);
        } else {
            let delay = self.random.within(1..10_000_000);
            self.notices(other, delay, "the peer is silent");
        }
    }

    // ---- permits

    /// The source spends its permit on the destination.
    pub(crate) fn gives_away(&mut self) -> Result<(), Violation> {
        if self.holder != Holder::Source || self.guest.runs {
            return Err(Violation::TwoRunners { side: Side::Source });
        }
        self.holder = Holder::Nobody;
        Ok(())
    }

    /// The source spends a permit on itself.
    pub(crate) fn takes_back(&mut self) -> Result<(), Violation> {
        if self.holder == Holder::Destination {
            return Err(Violation::TwoRunners { side: Side::Source });
        }
        self.holder = Holder::Source;
        Ok(())
    }

    /// The destination spends a permit.
    pub(crate) fn takes_over(&mut self) -> Result<(), Violation> {
        if self.holder != Holder::Nobody {
            return Err(Violation::TwoRunners { side: Side::Destination });
        }
        self.holder = Holder::Destination;
        Ok(())
    }

    // ---- the verdict

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
        let undisturbed = !self.spent.contains(&true);
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
        let severed = self.scenario.mishaps.iter().zip(&self.spent).any(|(mishap, spent)| {
            let severs = matches!(
                mishap,
                Mishap::Cut { .. }
                    | Mishap::Strike { blow: Blow::Crash | Blow::PowerLoss | Blow::Silence, .. }
            );
            *spent && severs
        });
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

    fn check_guest_stays(&self) -> Result<(), Violation> {
        if !self.guest.runs && !self.source.resume_failed {
            return Err(Violation::NotResumed);
        }
        let Some(report) = &self.source.report else { return Ok(()) };
        if let Verification::Mismatch { guest_addresses } = &report.verification {
            let differing = self.source.differing.clone().unwrap_or_default();
            if self.source.differing.is_some() && *guest_addresses != differing {
                return Err(Violation::Digests(format!("{guest_addresses:x?}, but {differing:x?} differ")));
            }
        }
        Ok(())
    }

    fn check_report(&self) -> Result<(), Violation> {
        let Some(report) = &self.source.report else { return Ok(()) };
        let downtime = report.downtime.unwrap_or_default();
        let whole = self.source.running_heard_at - self.source.pause_ordered_at;
        let blackout = self.destination.resumed_at - self.source.paused_at;
        let Some(resumed_at) = self.destination.resume_taken_at else { return Ok(()) };
        let parts = [
            ("all of it", downtime.total(), whole),
            ("pause", downtime.pause, self.source.paused_heard_at - self.source.pause_ordered_at),
            ("verify", downtime.verify, self.destination.verify_took),
            ("load", downtime.load, self.destination.load_took),
            ("resume", downtime.resume, resumed_at - self.destination.commit_heard_at),
        ];
        for (what, reported, actual_ns) in parts {
            let reported_ns = reported.as_nanos() as u64;
            if reported_ns != actual_ns {
                return Err(Violation::Downtime { what, reported_ns, actual_ns });
            }
        }
        // what the guest felt lies within; beyond it are only the way into the pause and the news of its end
        if whole < blackout {
            let what = "what the guest felt";
            return Err(Violation::Downtime { what, reported_ns: whole, actual_ns: blackout });
        }
        if self.scenario.verify != matches!(report.verification, Verification::Ok { .. }) {
            return Err(Violation::Digests(format!("reported as {:?}", report.verification)));
        }
        Ok(())
    }

    /// The guest for a second attempt, where there can be one.
    pub(crate) fn guest_that_stayed(mut self) -> Option<(Guest, Random)> {
        let stays = self.source.report.as_ref().is_some_and(|r| r.outcome == OutcomeKind::StillHere);
        if !stays || !self.guest.runs {
            return None;
        }
        self.guest.run_to(self.now);
        self.guest.old_dirty = Some(self.source.dirty);
        self.guest.restart_clock();
        Some((self.guest, self.random))
    }
}

/// The place of a step in the order of a migration; all rounds are one.
fn step_index(step: Step) -> usize {
    match step {
        Step::Connect => 0,
        Step::Handshake => 1,
        Step::Describe => 2,
        Step::Prepare => 3,
        Step::Attach => 4,
        Step::Track => 5,
        Step::Round(_) => 6,
        Step::Pause => 7,
        Step::Save => 8,
        Step::LastSync => 9,
        Step::LastRound => 10,
        Step::Verify => 11,
        Step::Load => 12,
        Step::Commit => 13,
        Step::Resume => 14,
    }
}
