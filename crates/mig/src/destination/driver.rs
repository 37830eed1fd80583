//! Carries out what the destination's machine asks for: one coordinator (the caller's thread), a thread a
//! page channel, one that listens, one that reads the control channel and one that watches the peer's
//! liveness.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};
use crossbeam::select;
use mig_core::destination::{Action, Destination, End, Event};
use mig_core::progress::{PageCounts, Progress};
use mig_core::{Blame, Claim, Fault, Side, Step};
use mig_wire::describe::Refusal;
use mig_wire::frame::{ChunkDigests, DestinationCosts, MAX_MISMATCHES};
use mig_wire::hello::{Attach, Capabilities, Hello, MAX_CHANNELS, Query, session_tag};
use mig_wire::{Description, Message};

use super::fates::{Known, same};
use super::filled::Filled;
use super::listen::{Arrival, Desk, Listener, tell};
use super::worker::{Worker, local};
use super::{HeldCopy, ReceiveOptions, ReceiveReport, Received};
use crate::arbiter::{self, Arbiter};
use crate::control::{Control, Order};
use crate::digest;
use crate::guest::{DestinationVm, Incoming, RestoreState};
use crate::link::{Link, LinkEvent, ReadError, SILENCE_DEADLINE};
use crate::memory::Pages;
use crate::observe::Observer;
use crate::patience;
use crate::random;
use crate::streams::{self, Streams};
use crate::transport::Stream;

const NOTES: usize = 256;
/// Sources that are refused because another's guest is being received, and kept until they have read it.
const MAX_REFUSED: usize = 16;
/// Orders that wait for a coordinator which is busy; one more is dropped, and may be given again.
const ORDERS: usize = 64;
/// How long the guest may take to show a sign of life before the gap it felt counts as unknown.
const GAP_PATIENCE: Duration = Duration::from_secs(1);

/// What another thread tells the coordinator.
#[derive(Debug)]
pub(super) enum Note {
    /// From the control channel.
    Link(LinkEvent),
    /// A channel has received its part of a round.
    ChannelEnded {
        /// The round.
        round: u32,
        /// Its pages.
        pages: PageCounts,
        /// Its bytes.
        bytes: u64,
    },
    /// A thread failed.
    Failed(Fault),
}

/// Runs a receive to its end.
pub(super) fn run<I: Incoming>(
    listener: &Listener,
    incoming: &mut I,
    options: &ReceiveOptions,
    control: &Control,
    observer: &dyn Observer,
) -> Received<I::Vm> {
    let desk = listener.desk();
    let streams = Arc::new(Streams::default());
    let (order, orders) = channel::bounded(ORDERS);
    let _hook = control.on_order(move |given| {
        let _ = order.try_send(given);
    });
    let open = desk.open();
    let received = std::thread::scope(|scope| match await_source(desk.arrivals(), &orders, observer) {
        Ok((stream, hello)) => {
            Driver::new(scope, incoming, options, observer, desk, &orders, streams, stream, &hello)
                .and_then(|driver| driver.drive(hello))
                .unwrap_or_else(Received::NotReceived)
        }
        Err(fault) => Received::NotReceived(fault),
    });
    drop(open);
    if !matches!(received, Received::NotReceived(_)) {
        desk.clear();
    }
    received
}

/// Closes every stream when it is dropped, which ends every thread that waits for one.
struct HangUp {
    link: Arc<Link>,
    streams: Arc<Streams>,
}

impl Drop for HangUp {
    fn drop(&mut self) {
        self.link.close();
        self.streams.close();
    }
}

fn await_source(
    arrivals: &Receiver<Arrival>,
    orders: &Receiver<Order>,
    observer: &dyn Observer,
) -> Result<(Stream, Hello), Fault> {
    loop {
        select! {
            recv(arrivals) -> arrival => match arrival {
                Ok(Arrival::Hello(stream, hello)) => return Ok((stream, hello)),
                Ok(Arrival::Attach(stream, _)) => {
                    turn_away(observer, stream.peer(), "a page channel of a session that is not here");
                }
                // its receive has just ended: it is known when it asks again
                Ok(Arrival::Query(..)) => {}
                Ok(Arrival::Stranger { peer, cause }) => turn_away(observer, peer, &cause),
                Ok(Arrival::Deaf(error)) => return Err(local(Step::Connect, error)),
                Err(_) => return Err(local(Step::Connect, "the listening thread ended")),
            },
            recv(orders) -> order => match order {
                Ok(Order::Cancel(reason)) => {
                    return Err(Fault::cancelled(Side::Destination, Step::Connect, reason));
                }
                Ok(Order::Resolve(_) | Order::Bandwidth(_)) => {}
                Err(_) => return Err(local(Step::Connect, "nobody can cancel it any more")),
            }
        }
    }
}

fn turn_away(observer: &dyn Observer, peer: String, cause: &str) {
    observer.progress(&Progress::TurnedAway { peer, cause: cause.into() });
}

struct Driver<'s, 'e, 'a, I: Incoming> {
    scope: &'s Scope<'s, 'e>,
    incoming: &'a mut I,
    observer: &'a dyn Observer,
    arbiter: Option<&'a Arc<dyn Arbiter>>,
    desk: &'a Desk,
    orders: &'a Receiver<Order>,
    streams: Arc<Streams>,
    link: Arc<Link>,
    /// The session and its secret: what a source in doubt asks with.
    session: Query,
    /// Whether the source may come to doubt: it was told Ready.
    was_ready: bool,
    /// When the guest was resumed.
    resumed_at: Option<Instant>,
    /// A source in doubt that waits for its answer.
    asker: Option<Stream>,
    notes: Receiver<Note>,
    note: Sender<Note>,
    /// Dropped to end the watching thread.
    _watch: Sender<()>,
    _hang_up: HangUp,
    patience: patience::WithSource,
    looks: Receiver<Instant>,
    clock: Instant,
    machine: Option<Destination>,
    guest: Option<Guest<I::Vm>>,
    /// Which page channels are attached, once they may.
    attached: Vec<bool>,
    pages: PageCounts,
    bytes: u64,
    /// Kept open until the end, so that the answer to them is not lost.
    refused: Vec<Stream>,
    /// The control channel has given its last event.
    link_ended: bool,
    end: Option<End>,
}

struct Guest<V> {
    vm: V,
    pages: Arc<Pages>,
    filled: Arc<Filled>,
}

impl<'s, 'e: 's, 'a, I: Incoming> Driver<'s, 'e, 'a, I> {
    #[allow(clippy::too_many_arguments)] // one call, each once
    fn new(
        scope: &'s Scope<'s, 'e>,
        incoming: &'a mut I,
        options: &'a ReceiveOptions,
        observer: &'a dyn Observer,
        desk: &'a Desk,
        orders: &'a Receiver<Order>,
        streams: Arc<Streams>,
        stream: Stream,
        hello: &Hello,
    ) -> Result<Self, Fault> {
        let secret = random::id().map_err(|e| local(Step::Handshake, e))?;
        let link = Arc::new(Link::new(stream, session_tag(&hello.session), 0));
        let (note, notes) = channel::bounded(NOTES);
        let (watch, stop_watching) = channel::bounded(0);
        let (reading, reader) = (link.clone(), note.clone());
        scope.spawn(move || {
            reading.read_all(1, |event| {
                // without a coordinator nobody cares
                let _ = reader.send(Note::Link(event));
            });
        });
        let (watching, channels) = (link.clone(), streams.clone());
        scope.spawn(move || {
            watching.watch(&stop_watching, || channels.close());
        });
        let hang_up = HangUp { link: link.clone(), streams: streams.clone() };
        Ok(Self {
            scope,
            incoming,
            observer,
            arbiter: options.arbiter.as_ref(),
            desk,
            orders,
            streams,
            link,
            session: Query { session: hello.session, secret },
            was_ready: false,
            resumed_at: None,
            asker: None,
            notes,
            note,
            _watch: watch,
            _hang_up: hang_up,
            patience: patience::WithSource::new(Step::Handshake),
            looks: channel::tick(patience::LOOK_INTERVAL),
            clock: Instant::now(),
            machine: Some(
                Destination::new(
                    secret,
                    MAX_CHANNELS,
                    options.arbiter.as_ref().map(|arbiter| arbiter.identity()),
                )
                .suited_channels(streams::suited_channels()),
            ),
            guest: None,
            attached: Vec::new(),
            pages: PageCounts::default(),
            bytes: 0,
            refused: Vec::new(),
            link_ended: false,
            end: None,
        })
    }

    fn drive(mut self, hello: Hello) -> Result<Received<I::Vm>, Fault> {
        self.feed(Event::Message(Message::Hello(hello)));
        loop {
            if let Some(end) = self.end.take() {
                self.note_fate(&end);
                self.farewell();
                return self.received(end);
            }
            select! {
                recv(self.notes) -> note => self.noted(note.ok()),
                recv(self.desk.arrivals()) -> arrival => self.arrived(arrival.ok()),
                recv(self.orders) -> order => match order {
                    Ok(Order::Cancel(reason)) => self.feed(Event::Cancelled { reason }),
                    Ok(Order::Resolve(word)) => self.feed(Event::Resolve(word)),
                    // a source's
                    Ok(Order::Bandwidth(_)) => {}
                    Err(_) => {}
                },
                recv(self.looks) -> _ => self.look(),
            }
        }
    }

    /// What the listener is to answer from now on.
    fn note_fate(&self, end: &End) {
        if !self.was_ready {
            return;
        }
        let known = match end {
            End::NotReceived(_) => Known::Never,
            End::Running(received) => {
                Known::Running { resume: received.resume, at: self.resumed_at.unwrap_or_else(Instant::now) }
            }
            End::Lost(_) => Known::Lost,
        };
        self.desk.note(&self.session, known);
    }

    /// Gives up a source that lives but does not go on; not for what it has said, and nobody has heard yet.
    fn look(&mut self) {
        if self.notes.is_empty()
            && let Some(fault) = self.patience.look(&self.link, &self.streams)
        {
            self.feed(Event::Failed(fault));
        }
    }

    fn received(self, end: End) -> Result<Received<I::Vm>, Fault> {
        let missing = || local(Step::Prepare, "a receive cannot end so before its guest was prepared");
        match end {
            End::NotReceived(fault) => Ok(Received::NotReceived(fault)),
            End::Running(received) => {
                let guest = self.guest.ok_or_else(missing)?;
                let report = ReceiveReport {
                    rounds: received.rounds,
                    received_bytes: self.bytes,
                    pages: self.pages,
                    ram_bytes: guest.pages.domain().bytes(),
                    verify: received.verify,
                    load: received.load,
                    resume: received.resume,
                    guest_gap: received.guest_gap,
                };
                Ok(Received::Running { vm: guest.vm, report })
            }
            End::Lost(fault) => {
                Ok(Received::Lost(HeldCopy { vm: self.guest.ok_or_else(missing)?.vm, fault }))
            }
        }
    }

    fn noted(&mut self, note: Option<Note>) {
        match note {
            Some(Note::Link(LinkEvent::Message(message))) => self.feed(Event::Message(message)),
            Some(Note::Link(LinkEvent::RoundTrip(_))) | None => {}
            Some(Note::Link(LinkEvent::Lost(error))) => {
                self.link_ended = true;
                let silence = self.link.silence();
                let mut fault = error.fault(Side::Destination, self.step());
                if silence > SILENCE_DEADLINE && error.is_silence() {
                    fault.blame = Blame::Network;
                    fault.cause = format!("the source has been silent for {:.1} s", silence.as_secs_f64());
                }
                self.feed(Event::Failed(fault));
            }
            Some(Note::ChannelEnded { round, pages, bytes }) => {
                self.pages += pages;
                self.bytes += bytes;
                self.feed(Event::ChannelEnded { round });
            }
            Some(Note::Failed(fault)) => self.feed(Event::Failed(fault)),
        }
    }

    fn arrived(&mut self, arrival: Option<Arrival>) {
        match arrival {
            Some(Arrival::Attach(stream, attach)) => self.attach(stream, &attach),
            Some(Arrival::Hello(stream, hello)) => self.busy(stream, &hello),
            Some(Arrival::Query(stream, query)) if same(&query, &self.session) => {
                self.asker = Some(stream);
                self.feed(Event::Query);
                self.asker = None;
            }
            // of a receive that has ended: it is known when it asks again
            Some(Arrival::Query(..)) => {}
            Some(Arrival::Stranger { peer, cause }) => turn_away(self.observer, peer, &cause),
            // the connections there are suffice, unless page channels are missing: then the deadline tells
            Some(Arrival::Deaf(error)) => self.feed(Event::Failed(local(Step::Attach, error))),
            None => {}
        }
    }

    fn busy(&mut self, stream: Stream, hello: &Hello) {
        turn_away(self.observer, stream.peer(), "another guest is being received");
        let refusal = Refusal::new(
            "busy",
            "another guest is being received",
            "wait for its end, or send to another receiver",
        );
        let message = Message::Refuse(vec![refusal]);
        if let Ok(frame) = message.encode(0, session_tag(&hello.session))
            && stream.write_all(&frame).is_ok()
            && self.refused.len() < MAX_REFUSED
        {
            stream.finish_writing();
            self.refused.push(stream);
        }
    }

    fn attach(&mut self, stream: Stream, attach: &Attach) {
        let free = self.attached.get(usize::from(attach.channel)).is_some_and(|taken| !taken);
        let shown = Query { session: attach.session, secret: attach.secret };
        let ours = same(&shown, &self.session);
        let Some(guest) = self.guest.as_ref().filter(|_| ours && free) else {
            return turn_away(self.observer, stream.peer(), "a page channel that does not belong here");
        };
        let tag = session_tag(&self.session.session);
        let ready = stream
            .fit_to_pages(self.attached.len())
            .and_then(|()| Message::Attached.encode(0, tag).map_err(std::io::Error::other))
            .and_then(|frame| stream.write_all(&frame))
            .and_then(|()| stream.try_clone());
        match ready {
            Ok(closer) => self.streams.add(closer),
            Err(error) => return turn_away(self.observer, stream.peer(), &error.to_string()),
        }
        let (pages, filled, note) = (guest.pages.clone(), guest.filled.clone(), self.note.clone());
        let (channel, channels) = (usize::from(attach.channel), self.attached.len());
        let encodings = self.machine.as_ref().map_or(Capabilities::empty(), Destination::page_encodings);
        self.scope.spawn(move || {
            let (stream, pages, filled) = (&stream, &*pages, &*filled);
            Worker { stream, pages, filled, session: tag, channel, channels, encodings }.run(&note);
        });
        self.attached[channel] = true;
        if self.attached.iter().all(|taken| *taken) {
            self.feed(Event::Attached);
        }
    }

    fn step(&self) -> Step {
        self.machine.as_ref().map_or(Step::Handshake, Destination::step)
    }

    /// Gives the machine an event and does what it asks for, and so on.
    fn feed(&mut self, event: Event) {
        let before = self.step();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            reach!(destination::heard(&event));
            let machine = self.machine.take().expect("put back below");
            let (machine, actions) = machine.handle(self.clock.elapsed(), event);
            self.machine = Some(machine);
            for action in actions {
                events.extend(self.perform(action));
            }
        }
        let step = self.step();
        if step != before {
            self.patience.enter(step, &self.link, &self.streams);
        }
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        reach!(destination::before(&action));
        match action {
            Action::Send(message) => {
                if let Message::Ready { .. } = message {
                    self.was_ready = true;
                    self.desk.note(&self.session, Known::Open);
                }
                self.say(&message)
            }
            Action::Answer(fate) => {
                if let Some(asker) = self.asker.take() {
                    tell(&asker, &self.session, fate);
                    reach!(DestinationAnswered);
                }
                None
            }
            Action::Claim => Some(Event::Claimed(self.claim())),
            Action::Prepare(description) => Some(self.prepare(&description)),
            Action::Accept { channels } => {
                self.attached = vec![false; usize::from(channels)];
                None
            }
            Action::Verify(digests) => Some(self.verify(&digests)),
            Action::Load(sections) => {
                Some(self.with_vm(Step::Load, |vm| vm.restore(&sections), Event::Loaded))
            }
            Action::Resume(permit) => {
                let done = self.with_vm(Step::Resume, |vm| vm.resume(permit), Event::Resumed { at: None });
                Some(match done {
                    Event::Resumed { .. } => {
                        let at = self.running_since().unwrap_or_else(|| self.clock.elapsed());
                        self.resumed_at = Some(self.clock + at);
                        Event::Resumed { at: Some(at) }
                    }
                    failed => failed,
                })
            }
            Action::FindGap => {
                Some(Event::Gap(self.guest.as_mut().and_then(|g| g.vm.guest_gap(GAP_PATIENCE))))
            }
            Action::Tell(progress) => {
                self.observer.progress(&progress);
                None
            }
            Action::End(end) => {
                self.end = Some(end);
                None
            }
        }
    }

    fn claim(&self) -> Claim {
        match self.arbiter {
            Some(arbiter) => arbiter::claim(arbiter, &self.session.session, Side::Destination),
            None => Claim::Unavailable("there is none".into()),
        }
    }

    /// Sends a message. That the link failed is left to the thread that reads it, which first hands on what
    /// the peer still said.
    fn say(&self, message: &Message) -> Option<Event> {
        match self.link.send(message) {
            Ok(()) => {
                reach!(destination::sent(message));
                None
            }
            Err(ReadError::Wire(error)) => Some(Event::Failed(local(self.step(), error))),
            Err(_) => {
                self.link.finish();
                None
            }
        }
    }

    fn with_vm(
        &mut self,
        step: Step,
        call: impl FnOnce(&mut I::Vm) -> Result<(), crate::guest::BoxError>,
        done: Event,
    ) -> Event {
        match &mut self.guest {
            Some(guest) => match call(&mut guest.vm) {
                Ok(()) => done,
                Err(error) => Event::Failed(local(step, error)),
            },
            None => Event::Failed(local(step, "no guest was prepared")),
        }
    }

    /// Since when the guest runs, on the machine's clock.
    fn running_since(&self) -> Option<Duration> {
        let since = self.guest.as_ref()?.vm.running_since()?;
        Some(since.saturating_duration_since(self.clock))
    }

    fn prepare(&mut self, description: &Description) -> Event {
        let vm = match self.incoming.prepare(description) {
            Ok(vm) => vm,
            Err(refusals) => return Event::Refused(refusals),
        };
        let pages = match Pages::new(vm.memory()) {
            Ok(pages) => pages,
            Err(error) => return Event::Failed(local(Step::Prepare, error)),
        };
        if vm.memory().regions() != description.regions {
            return Event::Failed(local(Step::Prepare, "the guest made here has other memory regions"));
        }
        let costs = vm.resume_costs();
        let verifies = self.machine.as_ref().is_some_and(Destination::verifies);
        let verify = if verifies { digest::expected_cost(&pages) } else { Duration::ZERO };
        self.patience.allow_for_digests(verify);
        let filled = Arc::new(Filled::new(pages.domain().end_page()));
        self.guest = Some(Guest { vm, pages: Arc::new(pages), filled });
        Event::Prepared(DestinationCosts { load: costs.load, resume: costs.resume, verify })
    }

    fn verify(&self, expected: &[u64]) -> Event {
        let Some(Guest { pages, .. }) = &self.guest else {
            return Event::Failed(local(Step::Verify, "no guest was prepared"));
        };
        let actual = digest::all_chunks(pages);
        let differing: Vec<u64> =
            (0u64..).zip(actual.iter().zip(expected)).filter(|(_, (a, e))| a != e).map(|(c, _)| c).collect();
        if differing.is_empty() && actual.len() == expected.len() {
            return Event::Verified;
        }
        let sample =
            |chunk: &u64| ChunkDigests { chunk: *chunk, pages: digest::pages_of_chunk(pages, *chunk) };
        let samples = differing.iter().take(MAX_MISMATCHES).map(sample).collect();
        Event::Differs { chunks: differing.len() as u64, samples }
    }

    /// Closes so that what was said still arrives, and waits for the peer to do the same.
    fn farewell(&mut self) {
        let link = self.link.clone();
        link.part(|time| {
            if !self.link_ended
                && let Ok(note) = self.notes.recv_timeout(time)
            {
                self.link_ended = matches!(note, Note::Link(LinkEvent::Lost(_)));
            }
            self.link_ended
        });
        self.streams.close();
    }
}
