//! What the drivers of both sides do, in the simulated world: feed events, carry out actions.

use std::time::Duration;

use mig_core::destination::{Action as DestinationAction, Destination, End, Event as DestinationEvent};
use mig_core::domain::PAGE_BYTES;
use mig_core::progress::{PageCounts, Progress, Report};
use mig_core::source::{Action, Event, Source, SourceConfig};
use mig_core::{Bitmap, Blame, Fault, Side, Step, bitmap};
use mig_wire::Message;
use mig_wire::describe::{Description, Refusal};
use mig_wire::frame::{ChunkDigests, DestinationCosts};
use mig_wire::section::Section;

use crate::guest::{self, Guest, Page};
use crate::link::{Cargo, FIRST_CHANNEL, TO_DESTINATION, TO_SOURCE};
use crate::scenario::{Mishap, Mutant, Scenario, Work};
use crate::verdict::Violation;
use crate::world::{Happening, Job, World};

/// The source's host.
pub(crate) struct SourceSide {
    pub(crate) machine: Option<Source>,
    pub(crate) busy_until: u64,
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

/// The destination's host.
pub(crate) struct DestinationSide {
    pub(crate) machine: Option<Destination>,
    pub(crate) busy_until: u64,
    memory: Vec<Page>,
    received: Vec<bool>,
    accepts: u16,
    attached: u16,
    loaded: Option<Vec<Section>>,
    pub(crate) crashed: bool,
    pub(crate) ran: bool,
    pub(crate) end: Option<End>,
    pub(crate) resumed_at: u64,
    pub(crate) resume_taken_at: Option<u64>,
    pub(crate) commit_heard_at: u64,
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
            machine: Some(Destination::new([2; 16], scenario.channels_granted)),
            busy_until: 0,
            memory: vec![Page::default(); guest.memory.len()],
            received: vec![false; guest.memory.len()],
            accepts: 0,
            attached: 0,
            loaded: None,
            crashed: false,
            ran: false,
            end: None,
            resumed_at: 0,
            resume_taken_at: None,
            commit_heard_at: 0,
            verify_took: 0,
            load_took: 0,
            issued_at: 0,
            acknowledged_at: 0,
            state_heard_at: 0,
        }
    }
}

/// The source.
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
                self.takes_back()?;
            }
            self.source.machine = None;
            self.source.epoch += 1;
            self.send(TO_DESTINATION, Cargo::Closed);
        }
        self.strike_where_due(Side::Source);
        Ok(())
    }

    /// The coordinator does one thing after the other.
    fn source_works(&mut self, cost: u64, job: Job) {
        self.source.busy_until = self.source.busy_until.max(self.now) + cost;
        let delay = self.source.busy_until - self.now;
        self.after(delay, Happening::Done(Side::Source, job));
    }

    fn source_does(&mut self, action: Action) -> Result<(), Violation> {
        let costs = self.scenario.costs;
        match action {
            Action::Send(message) => self.send(TO_DESTINATION, Cargo::Control(message)),
            Action::Attach { channels, .. } => {
                self.source.channels = channels;
                if self.work_fails(Side::Source, Work::Attach) {
                    self.source_fails(Step::Attach);
                    return Ok(());
                }
                for channel in 0..usize::from(channels) {
                    self.send(FIRST_CHANNEL + channel, Cargo::Attach);
                }
            }
            Action::StartTracking => self.source_works(costs.sync, Job::Plain(Work::StartTracking)),
            Action::SendRound { round } => self.send_pages(round),
            Action::Sync => self.source_works(costs.sync, Job::Plain(Work::Sync)),
            Action::Pause => {
                self.source.pause_ordered_at = self.now;
                self.source_works(costs.pause, Job::Plain(Work::Pause));
            }
            Action::Save => self.source_works(costs.save, Job::Plain(Work::Save)),
            Action::SendLast { round, verify } => {
                self.send_state(round, verify);
                self.send_pages(round);
            }
            Action::Locate(samples) => {
                let pages = self.differing(&samples);
                self.source_works(costs.sync, Job::Locate(pages));
            }
            Action::Commit(permit) => {
                drop(permit);
                self.gives_away()?;
                self.source.committed = true;
                self.send(TO_DESTINATION, Cargo::Control(Message::Commit));
                if self.network_down && self.scenario.is(Mutant::CommitFailureResumes) {
                    self.takes_back()?;
                }
            }
            Action::Resume(permit) => {
                self.source.epoch += 1;
                self.takes_back()?;
                self.source.resuming = true;
                self.source_works(costs.resume, Job::Resume(permit));
            }
            Action::StopTracking => {
                if !self.scenario.is(Mutant::TrackingLeftOn) {
                    self.guest.tracked = false;
                }
            }
            Action::Tell(progress) => {
                if let Progress::Round(report) = progress
                    && report.pages.total() > self.guest.domain.pages()
                {
                    return Err(Violation::Ends(format!("a round of {:?}", report.pages)));
                }
            }
            Action::End(_) if self.source.resuming => {
                return Err(Violation::Ends("the source ended with a resume under way".into()));
            }
            Action::End(report) => self.source.report = Some(*report),
        }
        Ok(())
    }

    fn source_fails(&mut self, step: Step) {
        let fault = Fault::new(Side::Source, step, Blame::Local, "it was made to fail");
        self.after(1, Happening::Source(Event::Failed(fault)));
    }

    pub(crate) fn source_did(&mut self, job: Job) -> Result<(), Violation> {
        if self.source.crashed {
            return Ok(());
        }
        let (work, now) = (job.work(), self.now);
        let fails = self.work_fails(Side::Source, work);
        let (step, event) = match (job, work) {
            (Job::Locate(guest_addresses), _) => {
                if !fails {
                    self.source.differing = Some(guest_addresses.clone());
                }
                (Step::Verify, Event::Located { guest_addresses })
            }
            (Job::Resume(permit), _) => {
                drop(permit);
                self.source.resuming = false;
                if fails {
                    self.source.resume_failed = true;
                } else {
                    self.guest.resume(now);
                }
                (Step::Resume, Event::Resumed)
            }
            (_, Work::StartTracking) => {
                // the machine may have ended meanwhile, and switched the log off already
                if self.source.machine.is_some() {
                    self.guest.start_tracking(now);
                    self.source.dirty = match self.guest.old_dirty.take() {
                        Some(old) if self.scenario.is(Mutant::StartKeepsOldPages) => old,
                        _ => Bitmap::full(&self.guest.domain),
                    };
                }
                (Step::Track, Event::Tracking)
            }
            (_, Work::Pause) => {
                // a pause that fails may have stopped the guest all the same
                if !fails || self.random.chance(50) {
                    self.guest.pause(now);
                    self.source.paused_at = now;
                }
                (Step::Pause, Event::Paused)
            }
            (_, Work::Save) => {
                if self.scenario.is(Mutant::SyncBeforeSave) {
                    self.guest.sync(now, &mut self.source.dirty);
                }
                let state = self.guest.save(self.scenario.save_writes_memory);
                let body = state.to_le_bytes().to_vec();
                let name = "sim.guest".into();
                self.source.sections = vec![Section { name, instance: 0, version: 1, critical: true, body }];
                (Step::Save, Event::Saved)
            }
            _ => {
                if !self.scenario.is(Mutant::SyncBeforeSave) || self.guest.runs {
                    self.guest.sync(now, &mut self.source.dirty);
                }
                (Step::LastSync, Event::Synced { dirty_pages: self.source.dirty.count() })
            }
        };
        if fails {
            let fault = Fault::new(Side::Source, step, Blame::Local, "it was made to fail");
            return self.tell_source(Event::Failed(fault));
        }
        self.tell_source(event)
    }

    /// The channels send what is dirty, each its own chunks.
    fn send_pages(&mut self, round: u32) {
        self.source.round = round;
        self.source.channels_done = 0;
        self.source.pages = PageCounts::default();
        let epoch = self.source.epoch;
        for channel in 0..self.source.channels {
            let delay = self.random.within(1..20_000);
            self.after(delay, Happening::Channel { epoch, channel, chunk: u64::from(channel) });
        }
    }

    fn send_state(&mut self, round: u32, verify: bool) {
        let sections = std::mem::take(&mut self.source.sections);
        let state = Message::State { round, sections };
        let mut messages = vec![state];
        if verify {
            let digests = guest::digests(&self.guest.domain, &self.guest.memory);
            let (front, back) = digests.split_at(self.random.within(0..digests.len() as u64) as usize);
            let first_chunk = front.len() as u64;
            let parts = [(0, front), (first_chunk, back)]
                .map(|(first_chunk, digests)| Message::Digests { first_chunk, digests: digests.to_vec() });
            let at = if self.scenario.digests_first { 0 } else { messages.len() };
            messages.splice(at..at, parts);
        }
        for message in messages {
            self.send(TO_DESTINATION, Cargo::Control(message));
        }
    }

    pub(crate) fn channel_turns(&mut self, epoch: u32, channel: u16, chunk: u64) -> Result<(), Violation> {
        if epoch != self.source.epoch || self.source.machine.is_none() {
            return Ok(());
        }
        let link = FIRST_CHANNEL + usize::from(channel);
        let mut words = Vec::new();
        let mut chunk = chunk;
        while chunk < self.guest.domain.chunks() {
            let range = self.guest.domain.chunk_pages(chunk);
            if self.source.dirty.take_words(range, &mut words) > 0 {
                break;
            }
            chunk += u64::from(self.source.channels);
        }
        if chunk >= self.guest.domain.chunks() {
            self.send(link, Cargo::RoundEnd(self.source.round));
            self.source.channels_done += 1;
            if self.source.channels_done == self.source.channels {
                let pages = self.source.pages;
                // the driver may note it long after the last byte left
                let delay = self.random.within(1..2 * (self.scenario.latency + self.scenario.jitter));
                let event = Event::RoundSent { pages, bytes: pages.raw * PAGE_BYTES };
                self.after(delay, Happening::Source(event));
            }
            return Ok(());
        }
        if self.work_fails(Side::Source, Work::SendRound) {
            self.source_fails(Step::Round(self.source.round));
            return Ok(());
        }
        let pages = self.read_chunk(chunk, &words);
        let zero = pages.iter().filter(|(_, page)| page.is_zero()).count() as u64;
        let raw = pages.len() as u64 - zero;
        self.source.pages += PageCounts { zero, raw };
        self.send(link, Cargo::Pages(pages));
        let delay = 2 * self.scenario.costs.read + raw * self.scenario.nanos_per_page + 1;
        let chunk = chunk + u64::from(self.source.channels);
        self.after(delay, Happening::Channel { epoch, channel, chunk });
        Ok(())
    }

    /// Re-arms a chunk and reads it, slowly: the guest goes on writing between any two of the steps.
    fn read_chunk(&mut self, chunk: u64, words: &[u64]) -> Vec<(u64, Page)> {
        let (now, read) = (self.now, self.scenario.costs.read);
        let first = self.guest.domain.chunk_pages(chunk).start;
        let late = self.scenario.is(Mutant::ReadBeforeRearm);
        if !late && !self.scenario.is(Mutant::RearmSkipped) {
            self.guest.rearm(now, first, words);
        }
        let indices = || bitmap::runs(first, words).flat_map(|run| run.first..run.first + run.count);
        self.guest.run_to(now + read);
        let mut pages: Vec<(u64, Page)> = indices().map(|at| (at, self.guest.memory[at as usize])).collect();
        self.guest.run_to(now + 2 * read);
        for (at, page) in &mut pages {
            page.back = self.guest.memory[*at as usize].back;
        }
        if late {
            self.guest.rearm(now + 2 * read, first, words);
        }
        pages
    }

    /// Which pages of the sampled chunks differ, as a driver finds out from their digests.
    fn differing(&self, samples: &[ChunkDigests]) -> Vec<u64> {
        let domain = &self.guest.domain;
        let pages = samples.iter().flat_map(|sample| domain.chunk_pages(sample.chunk).zip(&sample.pages));
        pages
            .filter(|(page, theirs)| self.guest.memory[*page as usize].digest() != **theirs)
            .filter_map(|(page, _)| domain.guest_address(page))
            .collect()
    }
}

/// The destination.
impl World {
    pub(crate) fn destination_hears(&mut self, message: Message) -> Result<(), Violation> {
        if message == Message::Commit {
            self.destination.commit_heard_at = self.now;
            let gave_up = matches!(self.destination.end, Some(End::NotReceived(_) | End::InDoubt(_)));
            if gave_up && self.scenario.is(Mutant::LateCommitTaken) {
                return self.takes_over();
            }
        }
        self.tell_destination(DestinationEvent::Message(message))
    }

    pub(crate) fn tell_destination(&mut self, event: DestinationEvent) -> Result<(), Violation> {
        let Some(machine) = self.destination.machine.take() else { return Ok(()) };
        match event {
            DestinationEvent::Verified => {
                let complete_at = self.destination.acknowledged_at.max(self.destination.state_heard_at);
                self.destination.verify_took = self.now - complete_at;
            }
            DestinationEvent::Message(Message::State { .. }) => self.destination.state_heard_at = self.now,
            DestinationEvent::Loaded => self.destination.load_took = self.now - self.destination.issued_at,
            DestinationEvent::Resumed => self.destination.resume_taken_at = Some(self.now),
            _ => {}
        }
        let (machine, actions) = machine.handle(self.clock(Side::Destination), event);
        let ended = machine.has_ended();
        self.destination.machine = Some(machine);
        for action in actions {
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
        self.strike_where_due(Side::Destination);
        Ok(())
    }

    fn destination_works(&mut self, cost: u64, job: Job) {
        self.destination.issued_at = self.now;
        self.destination.busy_until = self.destination.busy_until.max(self.now) + cost;
        let delay = self.destination.busy_until - self.now;
        self.after(delay, Happening::Done(Side::Destination, job));
    }

    fn destination_does(&mut self, action: DestinationAction) -> Result<(), Violation> {
        let costs = self.scenario.costs;
        match action {
            DestinationAction::Send(message) => {
                if let Message::RoundAck { .. } = message {
                    self.destination.acknowledged_at = self.now;
                }
                self.send(TO_SOURCE, Cargo::Control(message));
            }
            DestinationAction::Prepare(_) => {
                self.destination_works(costs.prepare, Job::Plain(Work::Prepare));
            }
            DestinationAction::Accept { channels } => {
                self.destination.accepts = channels;
                if self.work_fails(Side::Destination, Work::Accept) {
                    let fault =
                        Fault::new(Side::Destination, Step::Attach, Blame::Local, "it was made to fail");
                    self.after(1, Happening::Destination(DestinationEvent::Failed(fault)));
                }
            }
            DestinationAction::Verify(digests) => self.destination_works(costs.verify, Job::Verify(digests)),
            DestinationAction::Load(sections) => self.destination_works(costs.load, Job::Load(sections)),
            DestinationAction::Resume(permit) => {
                self.takes_over()?;
                self.same_as_at_the_pause()?;
                self.destination.ran = true;
                self.destination_works(costs.resume, Job::Resume(permit));
            }
            DestinationAction::FindGap => self.destination_works(costs.gap, Job::Plain(Work::FindGap)),
            DestinationAction::Tell(_) => {}
            DestinationAction::End(end) => self.destination.end = Some(end),
        }
        Ok(())
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

    pub(crate) fn destination_did(&mut self, job: Job) -> Result<(), Violation> {
        if self.destination.crashed {
            return Ok(());
        }
        let costs = self.scenario.costs;
        let work = job.work();
        let fails = self.work_fails(Side::Destination, work);
        let (step, event) = match job {
            Job::Verify(digests) => (Step::Verify, self.verdict_on(&digests)),
            Job::Load(sections) => {
                self.destination.loaded = Some(sections);
                if self.scenario.is(Mutant::RunsOnceLoaded) {
                    self.takes_over()?;
                }
                (Step::Load, DestinationEvent::Loaded)
            }
            Job::Resume(permit) => {
                drop(permit);
                self.destination.resumed_at = if fails { 0 } else { self.now };
                (Step::Resume, DestinationEvent::Resumed)
            }
            Job::Plain(Work::Prepare) if fails => {
                let reasons = vec![Refusal::new("memory", "too little", "")];
                return self.tell_destination(DestinationEvent::Refused(reasons));
            }
            Job::Plain(Work::Prepare) => {
                let nanos = Duration::from_nanos;
                let (load, resume, verify) = (nanos(costs.load), nanos(costs.resume), nanos(costs.verify));
                (Step::Prepare, DestinationEvent::Prepared(DestinationCosts { load, resume, verify }))
            }
            Job::Plain(_) | Job::Locate(_) => {
                let gap = (!fails).then(|| {
                    Duration::from_nanos(self.destination.resumed_at.saturating_sub(self.source.paused_at))
                });
                return self.tell_destination(DestinationEvent::Gap(gap));
            }
        };
        if fails {
            let fault = Fault::new(Side::Destination, step, Blame::Local, "it was made to fail");
            return self.tell_destination(DestinationEvent::Failed(fault));
        }
        self.tell_destination(event)
    }

    fn verdict_on(&self, digests: &[u64]) -> DestinationEvent {
        let (domain, memory) = (&self.guest.domain, &self.destination.memory);
        let mine = guest::digests(domain, memory);
        let differing: Vec<u64> =
            (0..).zip(mine.iter().zip(digests)).filter(|(_, (a, b))| a != b).map(|(c, _)| c).collect();
        if differing.is_empty() || self.scenario.is(Mutant::VerifySkipped) {
            return DestinationEvent::Verified;
        }
        let samples = differing.iter().map(|&chunk| {
            let pages = domain.chunk_pages(chunk).map(|page| memory[page as usize].digest()).collect();
            ChunkDigests { chunk, pages }
        });
        DestinationEvent::Differs { chunks: differing.len() as u64, samples: samples.collect() }
    }

    pub(crate) fn channel_receives(&mut self, cargo: Cargo) -> Result<(), Violation> {
        if self.destination.machine.is_none() {
            return Ok(());
        }
        match cargo {
            Cargo::Attach => {
                self.destination.attached += 1;
                if self.destination.attached < self.destination.accepts {
                    return Ok(());
                }
                self.tell_destination(DestinationEvent::Attached)?;
                if !self.network_down {
                    let delay = self.scenario.latency;
                    self.after(delay, Happening::Source(Event::Attached));
                }
                Ok(())
            }
            Cargo::Pages(pages) => {
                for (at, page) in pages {
                    self.place(at as usize, page);
                }
                Ok(())
            }
            Cargo::RoundEnd(round) => self.tell_destination(DestinationEvent::ChannelEnded { round }),
            Cargo::Control(_) | Cargo::Closed => Ok(()),
        }
    }

    fn place(&mut self, at: usize, page: Page) {
        let lost = self.fails(|mishap| match mishap {
            Mishap::LosesPage { after } => Some(*after),
            _ => None,
        });
        // memory is zero at first: a zero page clears only what was received before
        let nothing_to_clear = !self.destination.received[at] || self.scenario.is(Mutant::ZeroPagesSkipped);
        if lost || page.is_zero() && nothing_to_clear {
            return;
        }
        self.destination.received[at] = true;
        self.destination.memory[at] = page;
    }
}
