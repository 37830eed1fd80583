//! Carries out what the source's machine asks for: one coordinator (the caller's thread), a thread a page
//! channel, one that reads the control channel and one that watches the peer's liveness; in doubt, one that
//! asks.

mod asking;
mod sending;

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};
use crossbeam::select;
use mig_core::bitmap::PageRun;
use mig_core::hot::Hot;
use mig_core::pacing::Bandwidth;
use mig_core::policy::Throttle;
use mig_core::progress::{PageCounts, Report};
use mig_core::source::{Action, Event, Source, SourceConfig};
use mig_core::{Bitmap, Blame, Claim, Fault, RunPermit, Side, Step};
use mig_wire::frame::{ChunkDigests, Fate};
use mig_wire::hello::{MAX_CHANNELS, session_tag};
use mig_wire::{Message, Section};

use self::sending::{LastRound, Sending};
use super::busy::Busy;
use super::worker::{Job, Worker};
use super::{SourceOptions, dial, local};
use crate::arbiter;
use crate::control::{Control, Order};
use crate::digest;
use crate::encoding::encoder::Settings;
use crate::guest::SourceVm;
use crate::link::{Link, LinkEvent, ReadError, SILENCE_DEADLINE};
use crate::memory::Pages;
use crate::observe::Observer;
use crate::pace::Pacer;
use crate::patience;
use crate::random;
use crate::streams::{self, Streams};
use crate::transport::{Address, Stream};

/// Batches that wait for a channel: enough to keep it busy, few enough to cancel at once.
const JOBS_PER_CHANNEL: usize = 4;
const NOTES: usize = 256;
/// Orders that wait for a coordinator which is busy; one more is dropped, and may be given again.
const ORDERS: usize = 64;

/// What another thread tells the coordinator.
#[derive(Debug)]
pub(super) enum Note {
    /// From the control channel.
    Link(LinkEvent),
    /// A channel has written its part of a round.
    ChannelSent {
        /// The pages.
        pages: PageCounts,
        /// The bytes.
        bytes: u64,
    },
    /// The page channels are open.
    Opened(Vec<Stream>),
    /// A thread failed.
    Failed(Fault),
    /// The destination said what became of the guest, or did not.
    Answered(Result<Fate, Fault>),
    /// The arbiter has answered.
    Claimed(Claim),
}

/// Runs a migration to its end. The report says where the guest is.
pub(super) fn run<V: SourceVm>(
    vm: &mut V,
    to: &Address,
    options: &SourceOptions,
    control: &Control,
    observer: &dyn Observer,
) -> Report {
    let began = Instant::now();
    match prepare(vm, to, options, control) {
        Ok((config, pages, stream)) => {
            let tag = session_tag(&config.session);
            let streams = Streams::default();
            let pacer = Pacer::new(options.bandwidth.cap_bytes_per_second);
            let link = Link::new(stream, tag, 0);
            let machine = Source::new(config);
            std::thread::scope(|scope| {
                let mut driver = Driver::new(
                    scope, vm, to, options, pages, &link, &streams, &pacer, machine, control, observer, began,
                );
                driver.bandwidth = options.bandwidth;
                driver.drive()
            })
        }
        Err(fault) => {
            let ram_bytes = vm.memory().regions().iter().map(|r| r.bytes).sum();
            Report::still_here(fault, ram_bytes, began.elapsed())
        }
    }
}

/// Everything that can fail before the destination hears of it.
fn prepare<V: SourceVm>(
    vm: &V,
    to: &Address,
    options: &SourceOptions,
    control: &Control,
) -> Result<(SourceConfig, Arc<Pages>, Stream), Fault> {
    let channels = options.channels.unwrap_or_else(streams::suited_channels);
    if !(1..=MAX_CHANNELS).contains(&channels) {
        let cause = format!("{channels} channels; 1 to {MAX_CHANNELS} are possible");
        return Err(Fault::new(Side::Source, Step::Connect, Blame::Configuration, cause));
    }
    let description = vm.describe().map_err(|e| local(Step::Describe, e))?;
    let pages = Pages::new(vm.memory()).map_err(|e| local(Step::Describe, e))?;
    reach!(SourceConnecting);
    let stream = dial::connect(to, control)?;
    let session = random::id().map_err(|e| local(Step::Connect, e))?;
    if let Some(arbiter) = &options.arbiter {
        arbiter.begin(&session).map_err(|e| {
            let why = arbiter::why(&e);
            local(Step::Connect, format!("the arbiter does not begin a session: {why}"))
                .remedy("see that the lease file can be written")
        })?;
    }
    let costs = vm.pause_costs();
    let config = SourceConfig {
        policy: options.policy.clone(),
        channels,
        suited_channels: options.channels.is_none(),
        page_encodings: options.compress.encodings(),
        verify: options.verify,
        session,
        arbiter: options.arbiter.as_ref().map(|arbiter| arbiter.identity()),
        description,
        ram_bytes: pages.domain().bytes(),
        pause_bytes_per_second: options.bandwidth.known_in_pause(),
        can_throttle: vm.can_throttle(),
        pause: costs.pause,
        save: costs.save,
        verify_cost: if options.verify { digest::expected_cost(&pages) } else { Duration::ZERO },
    };
    Ok((config, Arc::new(pages), stream))
}

struct Driver<'s, 'e, V: SourceVm> {
    scope: &'s Scope<'s, 'e>,
    vm: &'s mut V,
    to: &'s Address,
    options: &'s SourceOptions,
    observer: &'s dyn Observer,
    orders: Receiver<Order>,
    _hook: crate::control::HookGuard,
    began: Instant,
    machine: Option<Source>,
    session: [u8; 16],
    pages: Arc<Pages>,
    dirty: Bitmap,
    hot: Hot,
    link: &'e Link,
    streams: &'e Streams,
    pacer: &'e Pacer,
    bandwidth: Bandwidth,
    busy: Busy,
    notes: Receiver<Note>,
    note: Sender<Note>,
    jobs: Vec<Sender<Job>>,
    spent: (Sender<Vec<PageRun>>, Receiver<Vec<PageRun>>),
    sending: Option<Sending>,
    sections: Vec<Section>,
    told: Instant,
    patience: patience::WithDestination,
    looks: Receiver<Instant>,
    /// The control channel has given its last event.
    link_ended: bool,
    /// Ends a question that waits for its time when it is dropped.
    questions: (Sender<()>, Receiver<()>),
    report: Option<Report>,
}

impl<'s, 'e: 's, V: SourceVm> Driver<'s, 'e, V> {
    #[allow(clippy::too_many_arguments)] // one call, each once
    fn new(
        scope: &'s Scope<'s, 'e>,
        vm: &'s mut V,
        to: &'s Address,
        options: &'s SourceOptions,
        pages: Arc<Pages>,
        link: &'e Link,
        streams: &'e Streams,
        pacer: &'e Pacer,
        machine: Source,
        control: &Control,
        observer: &'s dyn Observer,
        began: Instant,
    ) -> Self {
        let (note, notes) = channel::bounded(NOTES);
        let (order, orders) = channel::bounded(ORDERS);
        let reader = note.clone();
        scope.spawn(move || {
            link.read_all(0, |event| {
                // without a coordinator nobody cares
                let _ = reader.send(Note::Link(event));
            });
        });
        let hook = control.on_order(move |given| {
            let _ = order.try_send(given);
        });
        Self {
            scope,
            vm,
            to,
            options,
            observer,
            orders,
            _hook: hook,
            began,
            session: machine.session(),
            patience: patience::WithDestination::new(machine.step()),
            looks: channel::tick(patience::LOOK_INTERVAL),
            machine: Some(machine),
            dirty: Bitmap::empty(pages.domain()),
            hot: Hot::new(pages.domain()),
            pages,
            link,
            streams,
            pacer,
            bandwidth: Bandwidth::default(),
            busy: Busy::new(),
            notes,
            note,
            jobs: Vec::new(),
            spent: channel::bounded(64),
            sending: None,
            sections: Vec::new(),
            told: began,
            link_ended: false,
            questions: channel::bounded(0),
            report: None,
        }
    }

    fn drive(&mut self) -> Report {
        self.feed(Event::Connected);
        // after Hello, which must be the first message
        let _watching = self.watch();
        loop {
            if let Some(report) = self.report.take() {
                self.farewell();
                if self.machine().left_a_copy() {
                    asking::recall(self.to.clone(), self.question());
                }
                return report;
            }
            self.step();
        }
    }

    /// Watches the peer's liveness until the result is dropped.
    fn watch(&self) -> Sender<()> {
        let (watching, stop) = channel::bounded(0);
        let (link, streams) = (self.link, self.streams);
        self.scope.spawn(move || {
            link.watch(&stop, || streams.close());
        });
        watching
    }

    /// Plans, sends or waits: whichever is possible next.
    fn step(&mut self) {
        self.plan_ahead();
        let waiting = self.sending.as_mut().and_then(|s| s.waiting.pop_front());
        let Some((channel, job)) = waiting else {
            select! {
                recv(self.notes) -> note => self.noted(note.ok()),
                recv(self.orders) -> order => self.ordered(order.ok()),
                recv(self.looks) -> _ => self.look(),
            }
            return;
        };
        let mut job = Some(job);
        select! {
            send(self.jobs[channel], job.take().expect("taken only when it is sent")) -> sent => {
                if sent.is_err() {
                    // the worker has ended, and said why in a note
                    self.sending = None;
                }
            }
            recv(self.notes) -> note => {
                self.put_back(channel, job);
                self.noted(note.ok());
            }
            recv(self.orders) -> order => {
                self.put_back(channel, job);
                self.ordered(order.ok());
            }
            recv(self.looks) -> _ => {
                self.put_back(channel, job);
                self.look();
            }
        }
    }

    /// Gives up a destination that lives but does not go on; not for what it has said, and nobody has heard yet.
    fn look(&mut self) {
        let sent = self.sending.is_none();
        if self.notes.is_empty()
            && let Some(fault) = self.patience.look(sent, self.link, self.streams)
        {
            self.feed(Event::Failed(fault));
        }
    }

    fn noted(&mut self, note: Option<Note>) {
        match note {
            Some(Note::Link(LinkEvent::Message(message))) => self.feed(Event::Message(message)),
            Some(Note::Link(LinkEvent::RoundTrip(time))) => self.feed(Event::RoundTrip(time)),
            Some(Note::Link(LinkEvent::Lost(error))) => {
                self.link_ended = true;
                let fault = self.lost(&error);
                self.feed(Event::Failed(fault));
                if self.machine().is_committed() {
                    // what was not said yet is never said: a commit must not arrive after the answer
                    self.link.close();
                }
            }
            Some(Note::ChannelSent { pages, bytes }) => self.channel_sent(pages, bytes),
            Some(Note::Opened(channels)) => self.opened(channels),
            Some(Note::Failed(fault)) => self.feed(Event::Failed(fault)),
            Some(Note::Answered(Ok(fate))) => self.feed(Event::Answered(fate)),
            Some(Note::Answered(Err(fault))) => self.feed(Event::Unanswered(fault)),
            Some(Note::Claimed(claim)) => self.feed(Event::Claimed(claim)),
            None => {}
        }
    }

    fn ordered(&mut self, order: Option<Order>) {
        match order {
            Some(Order::Cancel(reason)) => self.feed(Event::Cancelled { reason }),
            Some(Order::Resolve(word)) => self.feed(Event::Resolve(word)),
            Some(Order::Bandwidth(cap)) => self.change_bandwidth(cap),
            None => {}
        }
    }

    fn lost(&self, error: &ReadError) -> Fault {
        let silence = self.link.silence();
        let fault = error.fault(Side::Source, self.machine().step());
        if silence > SILENCE_DEADLINE && error.is_silence() {
            let cause = format!("the destination has been silent for {:.1} s", silence.as_secs_f64());
            return Fault { cause, blame: Blame::Network, ..fault };
        }
        fault
    }

    /// Gives the machine an event and does what it asks for, and so on.
    fn feed(&mut self, event: Event) {
        let before = self.machine().step();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            reach!(source::heard(&event, self.machine().step()));
            let machine = self.machine.take().expect("put back below");
            let (machine, actions) = machine.handle(self.began.elapsed(), event);
            self.machine = Some(machine);
            for action in actions {
                // in the pause the guest is not busy, and its owner waits
                if matches!(action, Action::Sync) && self.machine().step() != Step::LastSync {
                    let percent = self.busy.look(&self.vm.processor_times());
                    events.extend(percent.map(|percent| Event::Busy { percent }));
                }
                events.extend(self.perform(action));
            }
        }
        let step = self.machine().step();
        if step != before {
            self.patience.enter(step, self.link, self.streams);
        }
    }

    fn machine(&self) -> &Source {
        self.machine.as_ref().expect("only away within `feed`")
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        reach!(source::before(&action));
        let result = match action {
            Action::Send(message) => self.say(&message).map(|()| None),
            Action::Attach { channels, secret } => {
                let opened = self.note.clone();
                dial::open_page_channels(self.to.clone(), self.session, secret, channels, move |channels| {
                    // without a coordinator nobody cares
                    let _ = opened.send(channels.map_or_else(Note::Failed, Note::Opened));
                });
                Ok(None)
            }
            Action::StartTracking => self.start_tracking().map(|()| Some(Event::Tracking)),
            Action::SendRound { round, hold_back_pages } => {
                self.hot.hold_back(&mut self.dirty, hold_back_pages);
                self.start_round(round, true, None);
                Ok(None)
            }
            Action::Sync => self.sync().map(Some),
            Action::Throttle(throttle) => Ok(self.throttle(throttle)),
            Action::Pause => self.vm.pause().map(|()| Some(Event::Paused)).map_err(|e| local(Step::Pause, e)),
            Action::Save => self.save().map(|()| Some(Event::Saved)),
            Action::SendLast { round, verify } => {
                self.pacer.change(self.bandwidth.pause_cap_bytes_per_second());
                self.start_round(round, false, Some(LastRound { verify }));
                Ok(None)
            }
            Action::Locate(samples) => {
                Ok(Some(Event::Located { guest_addresses: differing(&self.pages, &samples) }))
            }
            Action::Commit(permit) => self.commit(permit).map(|()| None),
            Action::Resume(permit) => {
                self.sending = None;
                self.vm.resume(permit).map(|()| Some(Event::Resumed)).map_err(|e| local(Step::Resume, e))
            }
            Action::Query { after } => {
                self.query(after);
                Ok(None)
            }
            Action::Claim => {
                self.claim();
                Ok(None)
            }
            Action::StopTracking => {
                if let Err(error) = self.vm.tracker().stop() {
                    tracing::warn!(%error, "the dirty log stays on");
                }
                Ok(None)
            }
            Action::Tell(progress) => {
                self.observer.progress(&progress);
                Ok(None)
            }
            Action::End(report) => {
                self.sending = None;
                self.report = Some(*report);
                Ok(None)
            }
        };
        result.unwrap_or_else(|fault| Some(Event::Failed(fault)))
    }

    fn opened(&mut self, channels: Vec<Stream>) {
        if self.machine().step() != Step::Attach {
            return;
        }
        let tag = session_tag(&self.session);
        let count = channels.len();
        for stream in channels {
            match stream.fit_to_pages(count).and_then(|()| stream.try_clone()) {
                Ok(closer) => self.streams.add(closer),
                Err(error) => return self.feed(Event::Failed(local(Step::Attach, error))),
            }
            self.spawn_worker(stream, tag, count);
        }
        self.feed(Event::Attached);
    }

    fn spawn_worker(&mut self, stream: Stream, tag: u64, channels: usize) {
        let (sender, jobs) = channel::bounded(JOBS_PER_CHANNEL);
        let cache_bytes = self.options.cache_bytes(self.pages.domain().bytes());
        let settings = Settings {
            compress: self.options.compress,
            understood: self.machine().page_encodings(),
            channels,
            cache_bytes: usize::try_from(cache_bytes).unwrap_or(usize::MAX) / channels,
            in_pause: self.bandwidth.in_pause,
        };
        let (pages, spent, note) = (self.pages.clone(), self.spent.0.clone(), self.note.clone());
        let pacer = self.pacer;
        self.scope.spawn(move || {
            Worker::new(&stream, &pages, pacer, tag, &settings).run(&jobs, &spent, &note);
        });
        self.jobs.push(sender);
    }

    fn start_tracking(&mut self) -> Result<(), Fault> {
        self.dirty = Bitmap::full(self.pages.domain());
        self.vm.tracker().start().map_err(|e| local(Step::Track, e))?;
        self.busy.look(&self.vm.processor_times());
        Ok(())
    }

    fn throttle(&mut self, throttle: Throttle) -> Option<Event> {
        let error = self.vm.throttle(throttle).err()?;
        tracing::warn!(%error, "the guest is not slowed");
        Some(Event::NotThrottled)
    }

    fn sync(&mut self) -> Result<Event, Fault> {
        let step = self.machine().step();
        self.vm.tracker().sync(&mut self.dirty).map_err(|e| local(step, e))?;
        let hot_pages = if step == Step::LastSync {
            self.hot.release(&mut self.dirty);
            0
        } else {
            self.hot.synced(&mut self.dirty)
        };
        Ok(Event::Synced { dirty_pages: self.dirty.count(), hot_pages })
    }

    fn save(&mut self) -> Result<(), Fault> {
        self.sections = self.vm.save().map_err(|e| local(Step::Save, e))?;
        Ok(())
    }

    /// The point of no return: the permit is gone before the first byte is written.
    fn commit(&mut self, permit: RunPermit) -> Result<(), Fault> {
        drop(permit);
        self.say(&Message::Commit)
    }

    /// Sends a message. That the link failed is left to the thread that reads it, which first hands on what
    /// the peer still said: its refusal, or its promise that the guest never ran there.
    fn say(&self, message: &Message) -> Result<(), Fault> {
        match self.link.send(message) {
            Ok(()) => {
                reach!(source::sent(message));
                Ok(())
            }
            Err(ReadError::Wire(error)) => Err(local(self.machine().step(), error)),
            Err(_) => {
                self.link.finish();
                Ok(())
            }
        }
    }

    /// Closes so that what was said still arrives, and waits for the peer to do the same.
    fn farewell(&mut self) {
        self.jobs.clear();
        // who waits for its turn has nothing to wait for
        self.pacer.change(None);
        let link = self.link;
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

/// A panic of the embedder's must not leave the other threads waiting for the peer, nor the guest slowed.
impl<V: SourceVm> Drop for Driver<'_, '_, V> {
    fn drop(&mut self) {
        self.link.close();
        self.streams.close();
        self.pacer.change(None);
        if std::thread::panicking() {
            // there is nobody left to tell
            let _ = self.vm.throttle(Throttle::NONE);
        }
    }
}

/// The addresses of the pages of the sampled chunks that differ from the destination's.
fn differing(pages: &Pages, samples: &[ChunkDigests]) -> Vec<u64> {
    let domain = pages.domain();
    let in_chunk = |sample: &ChunkDigests| {
        let own = domain.chunk_pages(sample.chunk).zip(digest::pages_of_chunk(pages, sample.chunk));
        let pairs = own.zip(sample.pages.clone()).filter(|((_, own), theirs)| own != theirs);
        pairs.filter_map(|((page, _), _)| domain.guest_address(page)).collect::<Vec<_>>()
    };
    samples.iter().flat_map(in_chunk).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::two_regions;

    #[test]
    fn differing_pages_are_found_whatever_chunks_and_pages_the_peer_claims() {
        let (_memory, pages) = two_regions(600, 3);
        let mut second = digest::pages_of_chunk(&pages, 1);
        second[7] ^= 1;
        let sample = |chunk, pages: &[u64]| ChunkDigests { chunk, pages: pages.to_vec() };
        let samples = [
            sample(1, &second),
            sample(u64::MAX, &[1, 2]),
            sample(u64::MAX / 512, &[1, 2]),
            sample(3, &[1, 2]),
            sample(2, &[0; 512]),
        ];
        let low = (512 + 7) * 4096;
        let high = [0, 1, 2].map(|page| (1u64 << 32) + page * 4096);
        assert_eq!(differing(&pages, &samples), [&[low], &high[..]].concat());
    }
}
