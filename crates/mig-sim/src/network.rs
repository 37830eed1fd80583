//! The links between the sides: what arrives when, cuts in one direction or both, and how they heal.
//!
//! As with TCP, what was on its way into a cut arrives after the network has healed, in its order, unless a
//! side has hung up meanwhile: each side notices a cut by the peer's silence, in its own time.

use mig_core::destination::Event as DestinationEvent;
use mig_core::source::Event as SourceEvent;
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::header::{HEADER_BYTES, Header};

use crate::link::{Cargo, FIRST_CHANNEL, Link, TO_DESTINATION, TO_SOURCE};
use crate::mishap::{Last, Mishap};
use crate::mutant::Mutant;
use crate::queue::Happening;
use crate::verdict::Violation;
use crate::world::World;

/// What a closed connection says.
pub(crate) const CLOSED: &str = "the peer closed the connection";
/// How long a side waits for a word from its peer, in nanoseconds: at most this.
pub(crate) const PATIENCE: u64 = 10_000_000;

/// All links, and which directions are dead.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) links: Vec<Link>,
    dead: [bool; 2],
    outages: u32,
    /// What was due while the network was cut, besides what is on the links.
    stalled: Vec<Happening>,
    /// Which sides have closed the session's connections, because they heard nothing.
    hung_up: [bool; 2],
}

impl Network {
    pub(crate) fn new(links: usize) -> Self {
        let links = (0..links).map(|_| Link::default()).collect();
        Self { links, dead: [false; 2], outages: 0, stalled: Vec::new(), hung_up: [false; 2] }
    }

    /// Whether nothing reaches this side now.
    pub(crate) fn is_dead_to(&self, side: Side) -> bool {
        self.dead[index(side)]
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.dead != [false; 2]
    }
}

fn index(to: Side) -> usize {
    match to {
        Side::Source => 0,
        Side::Destination => 1,
    }
}

/// The link on which a side speaks.
pub(crate) fn link_from(side: Side) -> usize {
    if side == Side::Source { TO_DESTINATION } else { TO_SOURCE }
}

fn leads_from(link: usize) -> Side {
    if link == TO_SOURCE { Side::Destination } else { Side::Source }
}

/// A message as it really travels: as a frame of so many bytes, read back from them.
pub(crate) fn through_the_wire(message: &Message, sequence: u64) -> Result<u64, Violation> {
    let frame = message.encode(sequence, 1).map_err(|e| Violation::Wire(e.to_string()))?;
    let (header, body) = frame.split_first_chunk::<HEADER_BYTES>().expect("a frame has a header");
    let read = Header::decode(header).and_then(|header| Message::decode(&header, body));
    if read.as_ref() != Ok(message) {
        return Err(Violation::Wire(format!("{message:?} is read back as {read:?}")));
    }
    Ok(frame.len() as u64)
}

/// Where a link leads.
fn leads_to(link: usize) -> Side {
    if link == TO_SOURCE { Side::Source } else { Side::Destination }
}

impl World {
    /// Sends a message.
    pub(crate) fn say(&mut self, link: usize, message: Message) -> Result<(), Violation> {
        let sequence = self.network.links[link].sent;
        let bytes = through_the_wire(&message, sequence)?;
        self.send(link, Cargo::Control(message, bytes));
        Ok(())
    }

    pub(crate) fn send(&mut self, link: usize, cargo: Cargo) {
        if self.network.hung_up[index(leads_from(link))] {
            return;
        }
        let speed = self.scenario.speed(link);
        let arrival = self.network.links[link].send(self.now, cargo, speed, &mut self.random);
        self.queue.push(arrival, Happening::Arrives(link));
    }

    /// The first on its way arrives, unless the network is cut, or is cut right now.
    pub(crate) fn arrives(&mut self, link: usize) -> Result<(), Violation> {
        let on_its_way = &self.network.links[link];
        let Some(bytes) = on_its_way.front().map(Cargo::bytes) else { return Ok(()) };
        let whole = (on_its_way.arrived_bytes + bytes, on_its_way.arrived_frames + 1);
        if self.network.is_dead_to(leads_to(link)) {
            self.network.links[link].stalled += 1;
            return Ok(());
        }
        let torn = |mishap: &Mishap| matches!(mishap, Mishap::Cut { link: l, after: Last::Byte(byte), .. } if *l == link && *byte < whole.0);
        if !self.network.is_cut()
            && let Some(Mishap::Cut { half_open, heals_after, .. }) = self.mishaps.take(torn)
        {
            self.network.links[link].stalled += 1;
            self.cut(leads_to(link), half_open, heals_after);
            return Ok(());
        }
        let Some(cargo) = self.network.links[link].arrive() else { return Ok(()) };
        if let Some((epoch, chunk)) = self.network.links[link].waiting.take() {
            let channel = (link - FIRST_CHANNEL) as u16;
            self.after(0, Happening::Channel { epoch, channel, chunk });
        }
        self.delivered(link, cargo)?;
        let right_after = |mishap: &Mishap| match mishap {
            Mishap::Cut { link: l, after: Last::Byte(byte), .. } => (*l, *byte) == (link, whole.0),
            Mishap::Cut { link: l, after: Last::Frame(frame), .. } => (*l, *frame) == (link, whole.1),
            _ => false,
        };
        if let Some(Mishap::Cut { half_open, heals_after, .. }) = self.mishaps.take(right_after) {
            self.cut(leads_to(link), half_open, heals_after);
        }
        Ok(())
    }

    fn delivered(&mut self, link: usize, cargo: Cargo) -> Result<(), Violation> {
        if self.network.hung_up[index(leads_to(link))] {
            return Ok(());
        }
        match (link, cargo) {
            (TO_SOURCE, Cargo::Control(message, _)) => self.tell_source(SourceEvent::Message(message)),
            (TO_SOURCE, Cargo::Closed) => {
                let fault = self.network_fault(Side::Source, CLOSED);
                self.tell_source(SourceEvent::Failed(fault))
            }
            (TO_DESTINATION, Cargo::Control(message, _)) => self.destination_hears(message),
            (TO_DESTINATION, Cargo::Closed) => {
                let fault = self.network_fault(Side::Destination, CLOSED);
                self.tell_destination(DestinationEvent::Failed(fault))
            }
            (_, cargo) => self.channel_receives(cargo),
        }
    }

    /// Keeps what cannot happen before the network has healed.
    pub(crate) fn stalls(&mut self, what: Happening) -> Option<Happening> {
        let stalls = match &what {
            // all attached channels are answered at once: by the time the source has heard it, or later
            Happening::AttachAnswered | Happening::Answered(..) => self.network.is_dead_to(Side::Source),
            // a connection needs both directions
            Happening::Asked(_) => self.network.is_cut(),
            _ => false,
        };
        if stalls {
            // a connection that was given up is not tried again; the last one may be
            let stalled = &mut self.network.stalled;
            stalled.retain(|other| std::mem::discriminant(other) != std::mem::discriminant(&what));
            stalled.push(what);
            return None;
        }
        Some(what)
    }

    /// The direction `to` a side goes, and unless it is half open the other with it.
    pub(crate) fn cut(&mut self, to: Side, half_open: bool, heals_after: Option<u64>) {
        if self.network.is_cut() {
            return;
        }
        self.network.outages += 1;
        let outage = self.network.outages;
        self.network.dead = [!half_open; 2];
        self.network.dead[index(to)] = true;
        self.trace(|| {
            format!("the network is cut (half open: {half_open}), and heals after {heals_after:?}")
        });
        for side in [Side::Source, Side::Destination] {
            let patience = self.random.within(1..PATIENCE);
            self.after(patience, Happening::Silence { side, outage });
        }
        if let Some(heals_after) = heals_after {
            self.after(heals_after, Happening::Heals { outage });
        }
    }

    /// A side's patience with its silent peer is at an end.
    pub(crate) fn silence(&mut self, side: Side, outage: u32) {
        if outage == self.network.outages && self.network.is_dead_to(side) {
            self.hangs_up(side);
        }
    }

    /// A side that heard nothing closes its connections, whether the other can notice or not.
    pub(crate) fn hangs_up(&mut self, side: Side) {
        if self.step(side).is_some() {
            self.send(link_from(side), Cargo::Closed);
            self.network.hung_up[index(side)] = true;
            self.notices(side, 0, "the peer is silent");
        }
    }

    pub(crate) fn heals(&mut self, outage: u32) {
        if outage != self.network.outages {
            return;
        }
        self.network.dead = [false; 2];
        self.trace(|| "the network heals".into());
        for link in 0..self.network.links.len() {
            let sent_again = self.now + self.random.within(1..self.scenario.speed(link).latency);
            let stalled = std::mem::take(&mut self.network.links[link].stalled);
            self.network.links[link].not_before(sent_again);
            for _ in 0..stalled {
                self.queue.push(sent_again, Happening::Arrives(link));
            }
        }
        for what in std::mem::take(&mut self.network.stalled) {
            self.after(1, what);
        }
    }

    /// A side is told after a while that its link is lost.
    pub(crate) fn notices(&mut self, side: Side, delay: u64, cause: &str) {
        let fault = self.network_fault(side, cause);
        match side {
            Side::Destination if self.scenario.is(Mutant::NoDeadline) => {}
            Side::Source => self.after(delay, Happening::Source(SourceEvent::Failed(fault))),
            Side::Destination => self.after(delay, Happening::Destination(DestinationEvent::Failed(fault))),
        }
    }

    fn network_fault(&self, side: Side, cause: &str) -> Fault {
        Fault::new(side, self.step(side).unwrap_or(Step::Resume), Blame::Network, cause)
    }
}
