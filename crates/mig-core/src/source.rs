//! The source's machine: from Hello to Moved, StillHere or Discarded.
//!
//! Invariants:
//! - a run permit leaves it at most once: with the one `Resume` or the one `Commit` it ever issues, but for
//!   a resume after Commit;
//! - that one takes the destination's promise that it never ran and never will (`Abort`, `Never`), the
//!   arbiter's grant, or an operator's word: not an error, not a cancel, not silence;
//! - with an arbiter, once the destination may hold all of the guest, so does a resume before Commit; only
//!   that an arbiter which cannot be asked does not keep it from running where it is;
//! - every run ends in exactly one `End`;
//! - a guest that was slowed has all its time again as soon as no rounds are under way.

mod asking;
mod ending;
mod handover;
mod opening;
mod rounds;

pub use asking::wait_after;

use std::time::Duration;

use mig_wire::describe::Description;
use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{ChunkDigests, Fate, Message};
use mig_wire::hello::{Capabilities, Secret, SessionId};

use crate::estimate::Estimate;
use crate::ledger::Ledger;
use crate::policy::{Policy, Throttle};
use crate::progress::{PageCounts, Progress, Report};
use crate::switchover::{ArbiterId, Claim, RunPermit, Word};

/// What a migration is to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceConfig {
    /// When to stop sending rounds.
    pub policy: Policy,
    /// Page channels to ask for.
    pub channels: u16,
    /// Whether the destination is to grant fewer where those suit it better.
    pub suited_channels: bool,
    /// Whether digests of all memory are compared.
    pub verify: bool,
    /// Those of [`Capabilities::PAGE_ENCODINGS`] that this side would use.
    pub page_encodings: Capabilities,
    /// Names this migration.
    pub session: SessionId,
    /// Who decides in doubt, if anybody: the destination must use the same one.
    pub arbiter: Option<ArbiterId>,
    /// The guest.
    pub description: Description,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// What the link is known to give in the pause, in bytes a second, where that is not what rounds have.
    pub pause_bytes_per_second: Option<u64>,
    /// Whether the guest can be slowed.
    pub can_throttle: bool,
    /// What this side expects pausing to cost.
    pub pause: Duration,
    /// What this side expects saving to cost.
    pub save: Duration,
    /// What this side expects digests of all memory to cost.
    pub verify_cost: Duration,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The control channel is connected.
    Connected,
    /// The destination says something.
    Message(Message),
    /// A round trip on the control channel was measured.
    RoundTrip(Duration),
    /// All page channels are attached.
    Attached,
    /// The dirty log is on.
    Tracking,
    /// Every channel has written its part of the round, and its end.
    RoundSent {
        /// What was sent.
        pages: PageCounts,
        /// Bytes of it on the wire.
        bytes: u64,
    },
    /// How busy the guest was since this was told last, where that is known: what its busiest vCPU used of a processor.
    Busy {
        /// At most 100.
        percent: u8,
    },
    /// The dirty log was read.
    Synced {
        /// Pages that are to be sent now, those that were held back among them.
        dirty_pages: u64,
        /// Those of them that were to be sent when it was read before, too: [`crate::hot::Hot`].
        hot_pages: u64,
    },
    /// The guest cannot be slowed after all: it has all its time.
    NotThrottled,
    /// The guest is paused.
    Paused,
    /// State is saved.
    Saved,
    /// The pages that differ were found (the answer to `Locate`).
    Located {
        /// Their guest-physical addresses.
        guest_addresses: Vec<u64>,
    },
    /// The guest runs again here.
    Resumed,
    /// Something failed here, or on the way. A resume that failed is told with [`Step::Resume`] and
    /// [`Blame::Local`], a link that was lost or fell silent with [`Blame::Network`].
    Failed(Fault),
    /// Somebody wants it to end.
    Cancelled {
        /// Why, where that is not just a wish: the guest has ended, for example.
        reason: Option<String>,
    },
    /// The destination answers a `Query`.
    Answered(Fate),
    /// It does not.
    Unanswered(Fault),
    /// The arbiter answers a `Claim`.
    Claimed(Claim),
    /// An operator says what is to become of a guest in doubt; means nothing to one that is not.
    Resolve(Word),
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Say something to the destination.
    Send(Message),
    /// Open this many page channels and show the secret on each.
    Attach {
        /// How many.
        channels: u16,
        /// What to show.
        secret: Secret,
    },
    /// Switch the dirty log on; everything counts as dirty.
    StartTracking,
    /// Send every dirty page but so many hot ones, re-arming before reading.
    SendRound {
        /// The round.
        round: u32,
        /// How many pages are held back: at most those that were told to be hot.
        hold_back_pages: u64,
    },
    /// Read the dirty log.
    Sync,
    /// Pause the guest.
    Pause,
    /// Save its state.
    Save,
    /// Send the last dirty pages, the state, and (with `verify`) the digests of all memory.
    SendLast {
        /// The round.
        round: u32,
        /// Whether digests are wanted.
        verify: bool,
    },
    /// Hold the guest's vCPUs for this part of the time from now on.
    Throttle(Throttle),
    /// Find the pages that differ from the destination's.
    Locate(Vec<ChunkDigests>),
    /// Spend the permit and send Commit. Whether that succeeds makes no difference.
    Commit(RunPermit),
    /// Run the guest here again.
    Resume(RunPermit),
    /// Wait so long, then ask the destination on a new connection what became of the session. One at a time.
    Query {
        /// How long to wait.
        after: Duration,
    },
    /// Ask the arbiter to decide for the source. One at a time.
    Claim,
    /// Switch the dirty log off.
    StopTracking,
    /// Tell an observer.
    Tell(Progress),
    /// It is over.
    End(Box<Report>),
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    config: SourceConfig,
    stage: Stage,
    estimate: Estimate,
    ledger: Ledger,
}

/// Where it is. What a stage needs stands in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Stage {
    Connecting,
    Greeting,
    Describing,
    Attaching,
    StartingLog,
    Copying(Copying),
    Measuring(Measuring),
    Pausing(Switching),
    Saving(Switching),
    LastSync(Switching),
    LastRound(LastRound),
    Locating,
    Committed(Committed),
    AwaitingGap(AwaitingGap),
    Asking(Asking),
    Reclaiming(Reclaiming),
    Resuming(Fault),
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Copying {
    round: u32,
    held_pages: u64,
    started: Duration,
    stalled_rounds: u32,
    sent: Option<(PageCounts, u64)>,
    acknowledged: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Measuring {
    round: u32,
    held_pages: u64,
    /// When the round began, and how long it took to arrive.
    started: Duration,
    elapsed: Duration,
    sync_started: Duration,
    pages: PageCounts,
    bytes: u64,
    stalled_rounds: u32,
}

/// Between the decision and the last round; `since` is when the current part began.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Switching {
    last_round: u32,
    since: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct LastRound {
    round: u32,
    since: Duration,
    /// When the destination had all pages.
    acknowledged: Option<Duration>,
    /// The destination's Ready may come before this side has noted that all was sent.
    sent: bool,
    ready: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Committed {
    /// Up to when the downtime's parts are known.
    since: Duration,
    /// When the destination's Ready came, and when it was answered.
    ready: Duration,
    sent: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct AwaitingGap {
    committed: Committed,
    /// The destination has told how it timed its start, or was not asked to.
    start_known: bool,
}

/// In doubt: committed, and the destination's word is missing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Asking {
    /// How it came to this.
    fault: Fault,
    /// Since when the guest has been committed.
    since: Duration,
    /// Questions in vain.
    asked: u32,
    /// A question is on its way to the destination.
    query_pending: bool,
    /// A question is on its way to the arbiter.
    claim_pending: bool,
    /// The arbiter gave the guest to the destination.
    denied: bool,
    /// The destination has said the last it can say, and it is no help.
    lost: bool,
    /// An operator's `Resume` waits for the arbiter.
    word: bool,
}

/// Given up before Commit, when the destination may have held all of the guest: an operator may have told it to
/// run that, so the arbiter is asked before the guest goes on here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Reclaiming {
    /// How it came to this.
    fault: Fault,
    /// Up to when the downtime's parts are known.
    since: Duration,
}

impl Source {
    /// A machine that waits for its control channel.
    pub fn new(config: SourceConfig) -> Self {
        let mut estimate = Estimate::default();
        (estimate.pause, estimate.save) = (config.pause, config.save);
        estimate.pause_bytes_per_second = config.pause_bytes_per_second;
        if config.verify {
            estimate.verify = config.verify_cost;
        }
        Self { config, stage: Stage::Connecting, estimate, ledger: Ledger::default() }
    }

    /// The session's name.
    pub fn session(&self) -> SessionId {
        self.config.session
    }

    /// Those of the encodings it would use that the destination understands: none before its welcome.
    pub fn page_encodings(&self) -> Capabilities {
        self.ledger.page_encodings
    }

    /// Whether it is over.
    pub fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }

    /// Whether the destination may be running the guest, so that nothing here may.
    pub fn is_committed(&self) -> bool {
        matches!(self.stage, Stage::Committed(_) | Stage::AwaitingGap(_) | Stage::Asking(_))
    }

    /// Whether nobody here knows if the destination runs the guest: it asks, and takes an operator's word.
    pub fn is_in_doubt(&self) -> bool {
        matches!(self.stage, Stage::Asking(_))
    }

    /// Whether it ended with the guest running here and, it may be, a complete copy at the destination that waits
    /// to be asked for. Asking has the destination give it up.
    pub fn left_a_copy(&self) -> bool {
        self.has_ended() && self.ledger.copy_left
    }

    /// The destination's secret, once it has told it.
    pub fn secret(&self) -> Secret {
        self.ledger.secret
    }

    /// What the machine is doing, for faults that a driver makes.
    pub fn step(&self) -> Step {
        match &self.stage {
            Stage::Connecting => Step::Connect,
            Stage::Greeting => Step::Handshake,
            Stage::Describing => Step::Describe,
            Stage::Attaching => Step::Attach,
            Stage::StartingLog => Step::Track,
            Stage::Copying(Copying { round, .. }) | Stage::Measuring(Measuring { round, .. }) => {
                Step::Round(*round)
            }
            Stage::Pausing(_) => Step::Pause,
            Stage::Saving(_) => Step::Save,
            Stage::LastSync(_) => Step::LastSync,
            Stage::LastRound(LastRound { acknowledged: None, .. }) => Step::LastRound,
            Stage::LastRound(_) => Step::Load,
            Stage::Locating => Step::Verify,
            Stage::Committed(_) | Stage::AwaitingGap(_) | Stage::Asking(_) => Step::Commit,
            Stage::Resuming(_) | Stage::Reclaiming(_) | Stage::Ended => Step::Resume,
        }
    }

    /// Takes an event at time `now` (any clock that does not go back, the same for all events).
    #[must_use]
    pub fn handle(mut self, now: Duration, event: Event) -> (Self, Vec<Action>) {
        if self.has_ended() {
            return (self, Vec::new());
        }
        let mut actions = match event {
            Event::Connected => self.connected(now),
            Event::Message(message) => self.message(now, message),
            Event::RoundTrip(time) => {
                let known = self.estimate.round_trip;
                self.estimate.round_trip = if known.is_zero() { time } else { known.min(time) };
                Vec::new()
            }
            Event::Attached => self.attached(),
            Event::Tracking => self.tracking(now),
            Event::RoundSent { pages, bytes } => self.round_sent(now, pages, bytes),
            Event::Busy { percent } => {
                // a paused guest is not busy, and that says nothing
                if let Stage::Measuring(_) = self.stage {
                    self.ledger.throttling.busy(percent);
                }
                Vec::new()
            }
            Event::Synced { dirty_pages, hot_pages } => self.synced(now, dirty_pages, hot_pages),
            Event::NotThrottled => self.not_throttled(now),
            Event::Paused => self.paused(now),
            Event::Saved => self.saved(now),
            Event::Located { guest_addresses } => self.located(now, guest_addresses),
            Event::Resumed => self.resumed(now),
            Event::Failed(fault) => self.failed(now, fault),
            Event::Cancelled { reason } => self.cancelled(now, reason),
            Event::Answered(fate) => self.answered(now, fate),
            Event::Unanswered(fault) => self.unanswered(fault),
            Event::Claimed(claim) => self.claimed(now, claim),
            Event::Resolve(word) => self.resolved(now, word),
        };
        if !self.ledger.throttling.now().is_none() && !self.is_copying() {
            self.ledger.throttling.change(now, Throttle::NONE);
            // first, since what follows may take its time
            actions.insert(0, Action::Throttle(Throttle::NONE));
        }
        (self, actions)
    }

    /// Whether rounds are under way, or the pause that ends them: what a guest may be slowed for.
    fn is_copying(&self) -> bool {
        matches!(self.stage, Stage::Copying(_) | Stage::Measuring(_) | Stage::Pausing(_))
    }

    fn message(&mut self, now: Duration, message: Message) -> Vec<Action> {
        match self.stage {
            // it crossed our abort on the way, or follows the destination's own end
            Stage::Resuming(_) | Stage::Locating => return Vec::new(),
            Stage::Asking(_) | Stage::Reclaiming(_) => return self.heard_late(now, message),
            _ => {}
        }
        match message {
            Message::Welcome(welcome) => self.welcomed(now, welcome),
            Message::Accept(costs) => self.accepted(now, costs),
            Message::Refuse(refusals) => self.refused(now, &refusals),
            Message::RoundAck { round } => self.acknowledged(now, round),
            Message::Ready { verify, load } => self.ready(now, verify, load),
            Message::Mismatch { samples, .. } => self.mismatch(now, samples),
            Message::Running { resume } => self.running(now, resume),
            Message::Started { since_ready } => self.started(now, since_ready),
            Message::Gap(gap) => self.gap(now, gap),
            Message::Abort(fault) => self.peer_aborted(now, fault),
            Message::Lost(fault) => self.peer_lost(now, fault),
            Message::Hello(_)
            | Message::Describe(_)
            | Message::Attach(_)
            | Message::Attached
            | Message::State { .. }
            | Message::Digests { .. }
            | Message::Commit
            | Message::Ping(_)
            | Message::Pong(_)
            | Message::Query(_)
            | Message::Outcome(_) => self.out_of_turn(now, "a message that only a source sends"),
        }
    }

    fn out_of_turn(&mut self, now: Duration, what: &str) -> Vec<Action> {
        let fault = Fault::new(
            Side::Source,
            self.step(),
            Blame::Peer,
            format!("the destination sent {what} out of turn"),
        )
        .remedy("use the same version on both sides");
        self.failed(now, fault)
    }
}
