//! The destination's machine: from Hello to Running, NotReceived or Lost.
//!
//! Invariants:
//! - it mints its permit on Commit, in the stage that follows its own Ready, or for a copy that is held on an
//!   operator's word, and nowhere else; with an arbiter, only once that has granted it (an operator's word
//!   stands where the arbiter cannot be asked);
//! - an `Abort` or `Never` it sends is a promise: it is sent only where the permit was never minted, and ends
//!   the machine, so that a Commit still on its way meets nobody;
//! - once all is here and the source has gone without a word, the copy is held: it may be the last one;
//! - everything a peer makes it keep is bounded by the description that was accepted.

mod handover;

use std::time::Duration;

use mig_wire::describe::{Description, Refusal};
use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{ChunkDigests, DestinationCosts, Fate, Message};
use mig_wire::hello::{Capabilities, Hello, Secret, VERSIONS, Welcome};
use mig_wire::section::Section;

use crate::domain::Domain;
use crate::progress::Progress;
use crate::switchover::{ARBITER_SECTION, ArbiterId, Claim, RunPermit, Word};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The source says something.
    Message(Message),
    /// The guest to fill is made.
    Prepared(DestinationCosts),
    /// It cannot be made.
    Refused(Vec<Refusal>),
    /// All page channels are attached. To be fed before the last of them is answered, since pages may
    /// follow the answer at once.
    Attached,
    /// A channel has received its part of a round.
    ChannelEnded {
        /// The round.
        round: u32,
    },
    /// All digests agree.
    Verified,
    /// Some differ.
    Differs {
        /// How many chunks.
        chunks: u64,
        /// The page digests of the first few.
        samples: Vec<ChunkDigests>,
    },
    /// State is restored.
    Loaded,
    /// The guest runs.
    Resumed {
        /// Since when, where that is known: the news may be later, since the guest takes the core.
        at: Option<Duration>,
    },
    /// What the guest felt is known, or will not be.
    Gap(Option<Duration>),
    /// Something failed here, or on the way: told with [`Blame::Local`] where an action failed, with
    /// [`Blame::Network`] where the link was lost or fell silent. `FindGap` does not fail: its answer is
    /// then `Gap(None)`.
    Failed(Fault),
    /// Somebody wants it to end.
    Cancelled {
        /// Why, where that is not just a wish: the guest has ended, for example.
        reason: Option<String>,
    },
    /// The source asks, on a new connection and with the session's secret, what became of the session. The
    /// answer is among the actions, unless the machine has ended: then its end is the answer.
    Query,
    /// The arbiter answers a `Claim`.
    Claimed(Claim),
    /// An operator says what is to become of a copy in doubt; means nothing to one that is not.
    Resolve(Word),
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Say something to the source.
    Send(Message),
    /// Make the guest to fill, or say why not.
    Prepare(Box<Description>),
    /// Let this many page channels attach.
    Accept {
        /// How many.
        channels: u16,
    },
    /// Compare the digests of all chunks with these.
    Verify(Vec<u64>),
    /// Restore the state.
    Load(Vec<Section>),
    /// Ask the arbiter to decide for the destination.
    Claim,
    /// Run the guest.
    Resume(RunPermit),
    /// Answer the query that was just handed in. Not to be done before what stands in front of it.
    Answer(Fate),
    /// Find out what the guest felt.
    FindGap,
    /// Tell an observer.
    Tell(Progress),
    /// It is over.
    End(End),
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum End {
    /// The guest runs here.
    Running(Received),
    /// It does not, never did, and never will.
    NotReceived(Fault),
    /// The permit was minted, and then the guest could not be started.
    Lost(Fault),
}

/// How a receive went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Received {
    /// Rounds received, the last one included.
    pub rounds: u32,
    /// Time spent on digests.
    pub verify: Duration,
    /// Time spent restoring.
    pub load: Duration,
    /// Time spent resuming.
    pub resume: Duration,
    /// What the guest felt.
    pub guest_gap: Option<Duration>,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    secret: Secret,
    channels: u16,
    suited_channels: u16,
    arbiter: Option<ArbiterId>,
    verify: bool,
    /// Chunks of the accepted guest.
    chunks: u64,
    /// When it said Ready.
    ready_at: Duration,
    /// The source wants to hear how the start was timed.
    tells_start: bool,
    /// Encodings of pages that the source may use.
    page_encodings: Capabilities,
    received: Received,
    stage: Stage,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Stage {
    AwaitingHello,
    AwaitingDescription,
    Preparing,
    Attaching,
    Receiving(Receiving),
    Verifying {
        since: Duration,
        sections: Vec<Section>,
    },
    Loading {
        since: Duration,
    },
    Ready,
    /// In doubt since this happened.
    Held(Fault),
    Claiming {
        since: Duration,
        word: Option<Fault>,
    },
    Resuming {
        since: Duration,
    },
    FindingGap {
        since: Duration,
    },
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Receiving {
    round: u32,
    channels_ended: u16,
    /// The last round and the state, once they came.
    state: Option<(u32, Vec<Section>)>,
    digests: Vec<u64>,
    /// When the last round was complete and the state was here: what follows is for the digests.
    complete: Option<Duration>,
}

impl Destination {
    /// A machine that waits for a source. `secret` must be new for each; `channels` is the most it grants;
    /// `arbiter` decides in doubt, and the source must use the same one.
    pub fn new(secret: Secret, channels: u16, arbiter: Option<ArbiterId>) -> Self {
        Self {
            secret,
            channels,
            suited_channels: channels,
            arbiter,
            verify: false,
            chunks: 0,
            ready_at: Duration::ZERO,
            tells_start: false,
            page_encodings: Capabilities::empty(),
            received: Received::default(),
            stage: Stage::AwaitingHello,
        }
    }

    /// What it grants a source that leaves the number of channels to both sides: 1 or more.
    #[must_use]
    pub fn suited_channels(self, suited_channels: u16) -> Self {
        Self { suited_channels: suited_channels.max(1), ..self }
    }

    /// Whether it is over.
    pub fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }

    /// Whether it holds a complete copy that it may not run: the source is gone.
    pub fn is_in_doubt(&self) -> bool {
        matches!(self.stage, Stage::Held(_))
    }

    /// Whether digests will be compared.
    pub fn verifies(&self) -> bool {
        self.verify
    }

    /// The encodings of pages that the source may use: none before its Hello.
    pub fn page_encodings(&self) -> Capabilities {
        self.page_encodings
    }

    /// What the machine is doing, for faults that a driver makes.
    pub fn step(&self) -> Step {
        match &self.stage {
            Stage::AwaitingHello => Step::Handshake,
            Stage::AwaitingDescription => Step::Describe,
            Stage::Preparing => Step::Prepare,
            Stage::Attaching => Step::Attach,
            Stage::Receiving(receiving) => Step::Round(receiving.round),
            Stage::Verifying { .. } => Step::Verify,
            Stage::Loading { .. } => Step::Load,
            Stage::Ready | Stage::Held(_) | Stage::Claiming { .. } => Step::Commit,
            Stage::Resuming { .. } | Stage::FindingGap { .. } | Stage::Ended => Step::Resume,
        }
    }

    /// Takes an event at time `now` (any clock that does not go back, the same for all events).
    #[must_use]
    pub fn handle(mut self, now: Duration, event: Event) -> (Self, Vec<Action>) {
        if self.has_ended() {
            return (self, Vec::new());
        }
        let actions = match event {
            Event::Message(message) => self.message(now, message),
            Event::Prepared(costs) => self.prepared(costs),
            Event::Refused(refusals) => match self.stage {
                Stage::Preparing => self.refused(refusals),
                _ => Vec::new(),
            },
            Event::Attached => self.attached(),
            Event::ChannelEnded { round } => self.channel_ended(now, round),
            Event::Verified => self.verified(now),
            Event::Differs { chunks, samples } => self.differs(chunks, samples),
            Event::Loaded => self.loaded(now),
            Event::Resumed { at } => self.resumed(at.unwrap_or(now).min(now)),
            Event::Gap(gap) => self.gap(gap),
            Event::Failed(fault) => self.failed(fault),
            Event::Cancelled { reason } => self.cancelled(reason),
            Event::Query => self.asked(now),
            Event::Claimed(claim) => self.claimed(claim),
            Event::Resolve(word) => self.resolved(now, word),
        };
        (self, actions)
    }

    fn message(&mut self, now: Duration, message: Message) -> Vec<Action> {
        match message {
            Message::Hello(hello) => self.hello(&hello),
            Message::Describe(description) => self.described(description),
            Message::State { round, sections } => self.state(now, round, sections),
            Message::Digests { first_chunk, digests } => self.digests(now, first_chunk, digests),
            Message::Commit => self.commit(now),
            Message::Abort(fault) => self.peer_aborted(fault),
            Message::Welcome(_)
            | Message::Accept(_)
            | Message::Refuse(_)
            | Message::Attach(_)
            | Message::Attached
            | Message::RoundAck { .. }
            | Message::Ready { .. }
            | Message::Mismatch { .. }
            | Message::Running { .. }
            | Message::Gap(_)
            | Message::Lost(_)
            | Message::Ping(_)
            | Message::Pong(_)
            | Message::Query(_)
            | Message::Outcome(_)
            | Message::Started { .. } => self.out_of_turn("a message that only a destination sends"),
        }
    }

    fn hello(&mut self, hello: &Hello) -> Vec<Action> {
        let Stage::AwaitingHello = self.stage else { return self.out_of_turn("hello") };
        let mut refusals = Vec::new();
        let version = hello.common_version();
        if version.is_none() {
            refusals.push(Refusal::new(
                "version",
                format!(
                    "the source speaks {} to {}, the destination {} to {}",
                    hello.version_min,
                    hello.version_max,
                    VERSIONS.start(),
                    VERSIONS.end()
                ),
                "use the same version on both sides",
            ));
        }
        let arbitrated = hello.required & Capabilities::ARBITER.bits() != 0;
        if arbitrated != self.arbiter.is_some() {
            let (with, without) =
                if arbitrated { ("source", "destination") } else { ("destination", "source") };
            refusals.push(Refusal::new(
                "arbiter",
                format!("the {with} uses one to decide in doubt, the {without} none"),
                "give both sides the same lease, or neither",
            ));
        }
        for bit in hello.missing_capabilities() {
            refusals.push(Refusal::new(
                "capability",
                format!("the source requires one that the destination does not know, {bit}"),
                "use the same version on both sides",
            ));
        }
        if hello.channels == 0 {
            refusals.push(Refusal::new("channels", "the source asks for none", "ask for at least 1"));
        }
        let Some(version) = version.filter(|_| refusals.is_empty()) else { return self.refused(refusals) };
        let optional = hello.optional & !Capabilities::ARBITER.bits();
        let agreed = Capabilities::from_bits_truncate(hello.required | optional);
        self.verify = agreed.contains(Capabilities::VERIFY);
        self.tells_start = agreed.contains(Capabilities::STARTED);
        self.page_encodings = agreed & Capabilities::PAGE_ENCODINGS;
        let suited = agreed.contains(Capabilities::SUITED_CHANNELS);
        let most = if suited { self.channels.min(self.suited_channels) } else { self.channels };
        self.channels = most.min(hello.channels);
        self.stage = Stage::AwaitingDescription;
        let (capabilities, channels) = (agreed.bits(), self.channels);
        let welcome = Welcome { version, capabilities, channels, secret: self.secret };
        vec![
            Action::Send(Message::Welcome(welcome)),
            Action::Tell(Progress::Connected { version, channels: self.channels }),
        ]
    }

    fn described(&mut self, mut description: Box<Description>) -> Vec<Action> {
        let Stage::AwaitingDescription = self.stage else { return self.out_of_turn("describe") };
        let theirs: Vec<Section> =
            description.platform.extract_if(.., |section| section.name == ARBITER_SECTION).collect();
        if theirs.iter().map(|s| s.body.as_slice()).ne(self.arbiter.iter().map(|id| id.as_slice())) {
            return self.refused(vec![Refusal::new(
                "arbiter",
                "source and destination use different ones",
                "give both sides the same lease file",
            )]);
        }
        match Domain::new(&description.regions) {
            Ok(domain) => {
                self.chunks = domain.chunks();
                self.stage = Stage::Preparing;
                vec![Action::Prepare(description)]
            }
            Err(error) => self.refused(vec![Refusal::new("memory", error.to_string(), "")]),
        }
    }

    fn prepared(&mut self, costs: DestinationCosts) -> Vec<Action> {
        let Stage::Preparing = self.stage else { return Vec::new() };
        self.stage = Stage::Attaching;
        vec![
            Action::Tell(Progress::Accepted),
            Action::Accept { channels: self.channels },
            Action::Send(Message::Accept(costs)),
        ]
    }

    fn refused(&mut self, refusals: Vec<Refusal>) -> Vec<Action> {
        let step = self.step();
        self.stage = Stage::Ended;
        let reasons: Vec<String> = refusals.iter().map(|r| format!("{}: {}", r.what, r.cause)).collect();
        let cause = format!("refused the guest: {}", reasons.join("; "));
        let mut remedies: Vec<&str> =
            refusals.iter().map(|r| r.remedy.as_str()).filter(|r| !r.is_empty()).collect();
        remedies.dedup();
        let fault =
            Fault::new(Side::Destination, step, Blame::Configuration, cause).remedy(remedies.join("; "));
        vec![Action::Send(Message::Refuse(refusals)), Action::End(End::NotReceived(fault))]
    }

    fn attached(&mut self) -> Vec<Action> {
        let Stage::Attaching = self.stage else { return Vec::new() };
        self.stage = Stage::Receiving(Receiving::default());
        Vec::new()
    }

    fn channel_ended(&mut self, now: Duration, ended: u32) -> Vec<Action> {
        let channels = self.channels;
        let Stage::Receiving(receiving) = &mut self.stage else {
            return self.out_of_turn("the end of a round");
        };
        if ended != receiving.round || receiving.complete.is_some() {
            return self.out_of_turn("the end of another round");
        }
        receiving.channels_ended += 1;
        if receiving.channels_ended < channels {
            return Vec::new();
        }
        let round = receiving.round;
        receiving.channels_ended = 0;
        receiving.complete = receiving.state.as_ref().filter(|(last, _)| *last == round).map(|_| now);
        if receiving.complete.is_none() {
            receiving.round = round.saturating_add(1);
        }
        self.received.rounds = round.saturating_add(1);
        let mut actions = vec![Action::Send(Message::RoundAck { round })];
        actions.extend(self.load_when_complete(now));
        actions
    }

    fn state(&mut self, now: Duration, round: u32, sections: Vec<Section>) -> Vec<Action> {
        let Stage::Receiving(receiving) = &mut self.stage else { return self.out_of_turn("state") };
        // State names its round; it may overtake the pages of that round, or come after them.
        let arrived = receiving.round.checked_sub(1) == Some(round) && receiving.channels_ended == 0;
        if receiving.state.is_some() || !(round == receiving.round || arrived) {
            return self.out_of_turn("state of another round");
        }
        receiving.complete = arrived.then_some(now);
        receiving.state = Some((round, sections));
        self.load_when_complete(now)
    }

    fn digests(&mut self, now: Duration, first_chunk: u64, digests: Vec<u64>) -> Vec<Action> {
        let (verify, chunks) = (self.verify, self.chunks);
        let Stage::Receiving(receiving) = &mut self.stage else { return self.out_of_turn("digests") };
        let known = receiving.digests.len() as u64;
        if !verify || first_chunk != known || known + digests.len() as u64 > chunks {
            return self.out_of_turn("digests of other chunks");
        }
        receiving.digests.extend(digests);
        self.load_when_complete(now)
    }

    fn load_when_complete(&mut self, now: Duration) -> Vec<Action> {
        let (verify, chunks) = (self.verify, self.chunks);
        let Stage::Receiving(receiving) = &mut self.stage else { return Vec::new() };
        let Some(since) = receiving.complete else { return Vec::new() };
        if verify && (receiving.digests.len() as u64) < chunks {
            return Vec::new();
        }
        let Some((_, sections)) = receiving.state.take() else { return Vec::new() };
        if verify {
            let digests = std::mem::take(&mut receiving.digests);
            self.stage = Stage::Verifying { since, sections };
            return vec![Action::Verify(digests)];
        }
        self.stage = Stage::Loading { since: now };
        vec![Action::Load(sections)]
    }

    fn verified(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Verifying { since, sections } = &mut self.stage else { return Vec::new() };
        self.received.verify = now.saturating_sub(*since);
        let sections = std::mem::take(sections);
        self.stage = Stage::Loading { since: now };
        vec![Action::Load(sections)]
    }

    fn differs(&mut self, chunks: u64, samples: Vec<ChunkDigests>) -> Vec<Action> {
        let Stage::Verifying { .. } = self.stage else { return Vec::new() };
        self.stage = Stage::Ended;
        let cause = format!("memory differs from the source's in {chunks} chunks of 2 MiB");
        let fault = Fault::new(Side::Destination, Step::Verify, Blame::Local, cause);
        vec![Action::Send(Message::Mismatch { chunks, samples }), Action::End(End::NotReceived(fault))]
    }

    fn loaded(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Loading { since } = self.stage else { return Vec::new() };
        self.received.load = now.saturating_sub(since);
        self.stage = Stage::Ready;
        self.ready_at = now;
        vec![Action::Send(Message::Ready { verify: self.received.verify, load: self.received.load })]
    }

    fn peer_aborted(&mut self, fault: Fault) -> Vec<Action> {
        match self.stage {
            // an abort after Commit cannot be: the source gave the guest away
            Stage::Claiming { .. } | Stage::Resuming { .. } | Stage::FindingGap { .. } | Stage::Ended => {
                Vec::new()
            }
            _ => {
                self.stage = Stage::Ended;
                vec![Action::End(End::NotReceived(fault))]
            }
        }
    }

    fn failed(&mut self, fault: Fault) -> Vec<Action> {
        match self.stage {
            Stage::Ended => Vec::new(),
            // it is known already; what was under way before does not matter any more
            Stage::Held(_) | Stage::Claiming { .. } => Vec::new(),
            // neither the link nor what the source sends now can undo a resume that is under way
            Stage::Resuming { .. } if matches!(fault.blame, Blame::Network | Blame::Peer) => Vec::new(),
            Stage::Resuming { .. } => {
                self.stage = Stage::Ended;
                vec![Action::Send(Message::Lost(fault.clone())), Action::End(End::Lost(fault))]
            }
            // it runs; who else could not be told does not matter to it
            Stage::FindingGap { .. } => Vec::new(),
            Stage::Ready if fault.blame == Blame::Network => {
                let fault = fault.remedy(
                    "the source asks for it when it can; or find out whether it runs the guest, and resolve: \
                     resume here if it certainly does not and never will, discard if it does",
                );
                self.stage = Stage::Held(fault.clone());
                vec![Action::Tell(Progress::InDoubt { fault, asked: 0 })]
            }
            _ => self.give_up(fault),
        }
    }

    fn cancelled(&mut self, reason: Option<String>) -> Vec<Action> {
        match self.stage {
            Stage::Held(_)
            | Stage::Claiming { .. }
            | Stage::Resuming { .. }
            | Stage::FindingGap { .. }
            | Stage::Ended => Vec::new(),
            _ => self.give_up(Fault::cancelled(Side::Destination, self.step(), reason)),
        }
    }

    fn out_of_turn(&mut self, what: &str) -> Vec<Action> {
        let cause = format!("the source sent {what} out of turn");
        let fault = Fault::new(Side::Destination, self.step(), Blame::Peer, cause);
        self.failed(fault.remedy("use the same version on both sides"))
    }

    /// Ends it where the permit was never minted.
    fn give_up(&mut self, fault: Fault) -> Vec<Action> {
        self.stage = Stage::Ended;
        vec![Action::Send(Message::Abort(fault.clone())), Action::End(End::NotReceived(fault))]
    }
}
