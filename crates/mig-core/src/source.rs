//! The source's machine: from Hello to Moved, StillHere or InDoubt.
//!
//! Invariants:
//! - a run permit leaves it at most once: with the one `Resume` or the one `Commit` it ever issues, but for
//!   a resume after Commit, which takes the destination's own promise that it never ran;
//! - after `Commit` was issued nothing but that promise brings the guest back: not an error, not a cancel;
//! - every run ends in exactly one `End`.

use std::time::Duration;

use mig_wire::describe::{Description, Refusal};
use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{ChunkDigests, DestinationCosts, Message};
use mig_wire::hello::{Capabilities, Hello, Secret, SessionId, VERSIONS, Welcome};

use crate::estimate::Estimate;
use crate::ledger::Ledger;
use crate::policy::{self, Decision, Policy, RoundContext, StopReason};
use crate::progress::{Downtime, OutcomeKind, PageCounts, Progress, Report, RoundReport, Verification};
use crate::switchover::RunPermit;

/// What a migration is to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceConfig {
    /// When to stop sending rounds.
    pub policy: Policy,
    /// Page channels to ask for.
    pub channels: u16,
    /// Whether digests of all memory are compared.
    pub verify: bool,
    /// Names this migration.
    pub session: SessionId,
    /// The guest.
    pub description: Description,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
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
    /// The dirty log was read.
    Synced {
        /// Pages that are to be sent now.
        dirty_pages: u64,
    },
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
    /// Send every dirty page, re-arming before reading.
    SendRound {
        /// The round.
        round: u32,
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
    /// Find the pages that differ from the destination's.
    Locate(Vec<ChunkDigests>),
    /// Spend the permit and send Commit. Whether that succeeds makes no difference.
    Commit(RunPermit),
    /// Run the guest here again.
    Resume(RunPermit),
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
    AwaitingGap,
    Resuming(Fault),
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Copying {
    round: u32,
    started: Duration,
    stalled_rounds: u32,
    sent: Option<(PageCounts, u64)>,
    acknowledged: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Measuring {
    round: u32,
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
    since: Duration,
}

impl Source {
    /// A machine that waits for its control channel.
    pub fn new(config: SourceConfig) -> Self {
        let mut estimate = Estimate::default();
        (estimate.pause, estimate.save) = (config.pause, config.save);
        if config.verify {
            estimate.verify = config.verify_cost;
        }
        Self { config, stage: Stage::Connecting, estimate, ledger: Ledger::default() }
    }

    /// The session's name.
    pub fn session(&self) -> SessionId {
        self.config.session
    }

    /// Whether it is over.
    pub fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }

    /// Whether the destination may be running the guest, so that nothing here may.
    pub fn is_committed(&self) -> bool {
        matches!(self.stage, Stage::Committed(_) | Stage::AwaitingGap)
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
            Stage::Committed(_) | Stage::AwaitingGap => Step::Commit,
            Stage::Resuming(_) | Stage::Ended => Step::Resume,
        }
    }

    /// Takes an event at time `now` (any clock that does not go back, the same for all events).
    #[must_use]
    pub fn handle(mut self, now: Duration, event: Event) -> (Self, Vec<Action>) {
        if self.has_ended() {
            return (self, Vec::new());
        }
        let actions = match event {
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
            Event::Synced { dirty_pages } => self.synced(now, dirty_pages),
            Event::Paused => self.paused(now),
            Event::Saved => self.saved(now),
            Event::Located { guest_addresses } => self.located(now, guest_addresses),
            Event::Resumed => self.resumed(now),
            Event::Failed(fault) => self.failed(now, fault),
            Event::Cancelled { reason } => self.cancelled(now, reason),
        };
        (self, actions)
    }

    fn connected(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Connecting = self.stage else { return self.out_of_turn(now, "connected") };
        self.ledger.began = Some(now);
        self.stage = Stage::Greeting;
        let required = if self.config.verify { Capabilities::VERIFY.bits() } else { 0 };
        vec![Action::Send(Message::Hello(Hello {
            version_min: *VERSIONS.start(),
            version_max: *VERSIONS.end(),
            required,
            optional: 0,
            channels: self.config.channels,
            session: self.config.session,
        }))]
    }

    fn message(&mut self, now: Duration, message: Message) -> Vec<Action> {
        if let Stage::Resuming(_) | Stage::Locating = self.stage {
            // it crossed our abort on the way, or follows the destination's own end
            return Vec::new();
        }
        match message {
            Message::Welcome(welcome) => self.welcomed(now, welcome),
            Message::Accept(costs) => self.accepted(now, costs),
            Message::Refuse(refusals) => self.refused(now, &refusals),
            Message::RoundAck { round } => self.acknowledged(now, round),
            Message::Ready { verify, load } => self.ready(now, verify, load),
            Message::Mismatch { samples, .. } => self.mismatch(now, samples),
            Message::Running { resume } => self.running(now, resume),
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
            | Message::Pong(_) => self.out_of_turn(now, "a message that only a source sends"),
        }
    }

    fn welcomed(&mut self, now: Duration, welcome: Welcome) -> Vec<Action> {
        let Stage::Greeting = self.stage else { return self.out_of_turn(now, "welcome") };
        let required = if self.config.verify { Capabilities::VERIFY.bits() } else { 0 };
        if !VERSIONS.contains(&welcome.version)
            || welcome.channels == 0
            || welcome.channels > self.config.channels
            || welcome.capabilities != required
        {
            return self.out_of_turn(now, "a welcome to something that was not offered");
        }
        self.stage = Stage::Describing;
        self.ledger.channels = welcome.channels;
        self.ledger.secret = welcome.secret;
        vec![
            Action::Tell(Progress::Connected { version: welcome.version, channels: welcome.channels }),
            Action::Send(Message::Describe(Box::new(self.config.description.clone()))),
        ]
    }

    fn accepted(&mut self, now: Duration, costs: DestinationCosts) -> Vec<Action> {
        let Stage::Describing = self.stage else { return self.out_of_turn(now, "accept") };
        self.estimate.load = costs.load;
        self.estimate.resume = costs.resume;
        if self.config.verify {
            // the destination compares once it has the source's digests
            self.estimate.verify += costs.verify;
        }
        self.stage = Stage::Attaching;
        let (channels, secret) = (self.ledger.channels, self.ledger.secret);
        vec![Action::Tell(Progress::Accepted), Action::Attach { channels, secret }]
    }

    fn refused(&mut self, now: Duration, refusals: &[Refusal]) -> Vec<Action> {
        let (step, words) = match self.stage {
            Stage::Greeting => (Step::Handshake, "refused to speak"),
            Stage::Describing => (Step::Prepare, "refused the guest"),
            _ => return self.out_of_turn(now, "refuse"),
        };
        let reasons: Vec<String> = refusals.iter().map(|r| format!("{}: {}", r.what, r.cause)).collect();
        let mut remedies: Vec<&str> =
            refusals.iter().map(|r| r.remedy.as_str()).filter(|r| !r.is_empty()).collect();
        remedies.dedup();
        let fault =
            Fault::new(Side::Destination, step, Blame::Peer, format!("{words}: {}", reasons.join("; ")));
        self.give_up(now, fault.remedy(remedies.join("; ")), false)
    }

    fn attached(&mut self) -> Vec<Action> {
        let Stage::Attaching = self.stage else { return Vec::new() };
        self.stage = Stage::StartingLog;
        self.ledger.tracking = true;
        vec![Action::StartTracking]
    }

    fn tracking(&mut self, now: Duration) -> Vec<Action> {
        let Stage::StartingLog = self.stage else { return Vec::new() };
        self.ledger.copying_since = now;
        self.send_round(now, 0, 0)
    }

    fn send_round(&mut self, now: Duration, round: u32, stalled_rounds: u32) -> Vec<Action> {
        self.stage =
            Stage::Copying(Copying { round, started: now, stalled_rounds, sent: None, acknowledged: None });
        vec![Action::SendRound { round }]
    }

    fn round_sent(&mut self, now: Duration, pages: PageCounts, bytes: u64) -> Vec<Action> {
        match &mut self.stage {
            Stage::Copying(copying) => {
                copying.sent = Some((pages, bytes));
                self.ledger.sent(pages, bytes);
                self.measure(now)
            }
            Stage::LastRound(last) => {
                last.sent = true;
                self.ledger.sent(pages, bytes);
                self.commit_when_ready()
            }
            _ => Vec::new(),
        }
    }

    fn acknowledged(&mut self, now: Duration, acknowledged: u32) -> Vec<Action> {
        match &mut self.stage {
            Stage::Copying(copying) if copying.round == acknowledged && copying.acknowledged.is_none() => {
                copying.acknowledged = Some(now);
                self.measure(now)
            }
            Stage::LastRound(last) if last.round == acknowledged && last.acknowledged.is_none() => {
                last.acknowledged = Some(now);
                Vec::new()
            }
            _ => self.out_of_turn(now, "an acknowledgement of another round"),
        }
    }

    /// Once a round has been sent and has arrived: how much was dirtied meanwhile?
    fn measure(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Copying(Copying { round, started, stalled_rounds, sent, acknowledged }) = &self.stage
        else {
            return Vec::new();
        };
        let (Some((pages, bytes)), Some(arrived)) = (*sent, *acknowledged) else { return Vec::new() };
        let elapsed = arrived.saturating_sub(*started);
        self.estimate.round(pages.total(), bytes, elapsed);
        self.stage = Stage::Measuring(Measuring {
            round: *round,
            started: *started,
            elapsed,
            sync_started: now,
            pages,
            bytes,
            stalled_rounds: *stalled_rounds,
        });
        vec![Action::Sync]
    }

    fn synced(&mut self, now: Duration, dirty_pages: u64) -> Vec<Action> {
        match &self.stage {
            Stage::Measuring(measuring) => {
                let measuring = measuring.clone();
                self.decide(now, &measuring, dirty_pages)
            }
            Stage::LastSync(switching) => {
                self.ledger.downtime.last_sync = now.saturating_sub(switching.since);
                let round = switching.last_round;
                self.stage = Stage::LastRound(LastRound {
                    round,
                    since: now,
                    acknowledged: None,
                    sent: false,
                    ready: None,
                });
                vec![Action::SendLast { round, verify: self.config.verify }]
            }
            _ => Vec::new(),
        }
    }

    fn decide(&mut self, now: Duration, measured: &Measuring, dirty_pages: u64) -> Vec<Action> {
        let sync = now.saturating_sub(measured.sync_started);
        self.estimate.dirtied(dirty_pages, now.saturating_sub(measured.started), sync);
        self.ledger.rounds = measured.round + 1;
        let sent_pages = measured.pages.total();
        let stalled = dirty_pages >= sent_pages && dirty_pages > 0;
        let context = RoundContext {
            round: measured.round,
            sent_pages,
            dirtied_pages: dirty_pages,
            total_sent_bytes: self.ledger.sent_bytes,
            ram_bytes: self.config.ram_bytes,
            elapsed: now.saturating_sub(self.ledger.copying_since),
            stalled_rounds: if stalled { measured.stalled_rounds + 1 } else { 0 },
            predicted: self.estimate.downtime(dirty_pages),
            predicted_after_next: self.estimate.downtime_after_round(dirty_pages),
        };
        let decision = policy::decide(&self.config.policy, &context);
        let report = self.round_report(measured, &context, decision);
        let mut actions = vec![Action::Tell(Progress::Round(report))];
        actions.extend(self.follow(now, decision, &context));
        actions
    }

    fn round_report(&self, measured: &Measuring, context: &RoundContext, decision: Decision) -> RoundReport {
        let nearest_rule = match decision {
            Decision::Continue => policy::nearest_rule(&self.config.policy, context),
            Decision::SwitchOver(reason) | Decision::Abort(reason) => reason,
        };
        RoundReport {
            round: measured.round,
            pages: measured.pages,
            sent_bytes: measured.bytes,
            elapsed: measured.elapsed,
            dirtied_pages: context.dirtied_pages,
            dirty_pages_per_second: self.estimate.dirty_pages_per_second(),
            bytes_per_second: self.estimate.bytes_per_second(),
            predicted_downtime: context.predicted,
            decision,
            nearest_rule,
        }
    }

    fn follow(&mut self, now: Duration, decision: Decision, context: &RoundContext) -> Vec<Action> {
        let next_round = context.round + 1;
        match decision {
            Decision::Continue => self.send_round(now, next_round, context.stalled_rounds),
            Decision::SwitchOver(reason) => {
                self.ledger.stop_reason = Some(reason);
                self.ledger.predicted_downtime = Some(context.predicted);
                self.stage = Stage::Pausing(Switching { last_round: next_round, since: now });
                vec![Action::Pause]
            }
            Decision::Abort(reason) => {
                self.ledger.stop_reason = Some(reason);
                self.ledger.predicted_downtime = Some(context.predicted);
                let fault = self.not_converged(reason, context);
                self.give_up(now, fault, true)
            }
        }
    }

    fn not_converged(&self, reason: StopReason, context: &RoundContext) -> Fault {
        let cause = format!(
            "did not converge ({reason}): predicted downtime {:?} is over the limit {:?}",
            context.predicted, self.config.policy.downtime_limit
        );
        Fault::new(Side::Source, Step::Round(context.round), Blame::Configuration, cause)
            .remedy("allow a longer downtime, a faster link, or stop-and-copy on stall")
    }

    fn paused(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Pausing(Switching { last_round, since }) = self.stage else { return Vec::new() };
        self.ledger.paused = true;
        self.ledger.downtime.pause = now.saturating_sub(since);
        self.stage = Stage::Saving(Switching { last_round, since: now });
        vec![Action::Tell(Progress::Paused), Action::Save]
    }

    fn saved(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Saving(Switching { last_round, since }) = self.stage else { return Vec::new() };
        self.ledger.downtime.save = now.saturating_sub(since);
        self.stage = Stage::LastSync(Switching { last_round, since: now });
        vec![Action::Sync]
    }

    fn ready(&mut self, now: Duration, verify: Duration, load: Duration) -> Vec<Action> {
        let Stage::LastRound(last) = &mut self.stage else { return self.out_of_turn(now, "ready") };
        let (Some(acknowledged), None) = (last.acknowledged, last.ready) else {
            return self.out_of_turn(now, "ready before the last pages");
        };
        last.ready = Some(now);
        // what the destination claims cannot be more than the time that passed; the acknowledgement may have
        // been on its way while it worked already, so it is the transfer that gives way
        let passed = now.saturating_sub(last.since);
        let downtime = &mut self.ledger.downtime;
        downtime.verify = verify.min(passed);
        downtime.load = load.min(passed - downtime.verify);
        let left = passed - downtime.verify - downtime.load;
        downtime.transfer = acknowledged.saturating_sub(last.since).min(left);
        if self.config.verify {
            let chunks = self.ledger.chunks(&self.config.description);
            self.ledger.verification = Some(Verification::Ok { chunks });
        }
        self.commit_when_ready()
    }

    /// The point of no return.
    fn commit_when_ready(&mut self) -> Vec<Action> {
        let Stage::LastRound(LastRound { sent: true, ready: Some(_), round, since, .. }) = self.stage else {
            return Vec::new();
        };
        self.ledger.rounds = round + 1;
        let Downtime { transfer, verify, load, .. } = self.ledger.downtime;
        let since = since + transfer + verify + load;
        self.stage = Stage::Committed(Committed { since });
        vec![Action::Commit(RunPermit::mint()), Action::Tell(Progress::Committed)]
    }

    fn running(&mut self, now: Duration, resume: Duration) -> Vec<Action> {
        let Stage::Committed(Committed { since }) = self.stage else {
            return self.out_of_turn(now, "running");
        };
        let passed = now.saturating_sub(since);
        self.ledger.downtime.resume = resume.min(passed);
        self.ledger.downtime.commit = passed.saturating_sub(resume);
        self.stage = Stage::AwaitingGap;
        vec![Action::Tell(Progress::Running), Action::StopTracking]
    }

    fn gap(&mut self, now: Duration, gap: Option<Duration>) -> Vec<Action> {
        let Stage::AwaitingGap = self.stage else { return self.out_of_turn(now, "gap") };
        self.ledger.guest_gap = gap;
        self.moved(now)
    }

    fn moved(&mut self, now: Duration) -> Vec<Action> {
        self.stage = Stage::Ended;
        let report = self.report(now, OutcomeKind::Moved, None);
        vec![Action::End(Box::new(report))]
    }

    fn mismatch(&mut self, now: Duration, samples: Vec<ChunkDigests>) -> Vec<Action> {
        let (Stage::LastRound(_), true) = (&self.stage, self.config.verify) else {
            return self.out_of_turn(now, "mismatch");
        };
        self.ledger.verification = Some(Verification::Mismatch { guest_addresses: Vec::new() });
        self.stage = Stage::Locating;
        vec![Action::Locate(samples)]
    }

    fn located(&mut self, now: Duration, guest_addresses: Vec<u64>) -> Vec<Action> {
        let Stage::Locating = self.stage else { return Vec::new() };
        let pages: Vec<String> = guest_addresses.iter().take(8).map(|a| format!("{a:#x}")).collect();
        let cause = match pages.as_slice() {
            [] => "memory differs, in pages that were not found".to_owned(),
            pages => format!("memory differs, in pages at {}", pages.join(", ")),
        };
        self.ledger.verification = Some(Verification::Mismatch { guest_addresses });
        let fault = Fault::new(Side::Destination, Step::Verify, Blame::Local, cause)
            .remedy("the guest stays; report this: a page was lost");
        // the destination has ended with its Mismatch
        self.give_up(now, fault, false)
    }

    fn peer_aborted(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        match self.stage {
            // after Commit too: its promise that it never ran and never will
            Stage::Ended | Stage::Resuming(_) | Stage::AwaitingGap => Vec::new(),
            _ => self.give_up(now, fault, false),
        }
    }

    fn peer_lost(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        match self.stage {
            Stage::Committed(_) => self.in_doubt(now, fault),
            _ => self.out_of_turn(now, "lost"),
        }
    }

    fn failed(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        match &self.stage {
            Stage::Committed(_) => self.in_doubt(now, fault),
            // the destination said that it runs; only the gap stays unknown
            Stage::AwaitingGap => self.moved(now),
            // only the resume itself can still fail: link and peer do not matter any more, nor does what
            // was under way before
            Stage::Resuming(_) if fault.blame == Blame::Local && fault.step == Step::Resume => {
                self.still_here(now, fault)
            }
            Stage::Resuming(_) | Stage::Ended => Vec::new(),
            // the destination hangs up after its Mismatch; which pages is worth knowing all the same
            Stage::Locating if matches!(fault.blame, Blame::Network | Blame::Peer) => Vec::new(),
            Stage::Locating => self.located(now, Vec::new()),
            _ => self.give_up(now, fault, true),
        }
    }

    fn cancelled(&mut self, now: Duration, reason: Option<String>) -> Vec<Action> {
        match self.stage {
            // too late; or it ends by itself in a moment, for a reason worth knowing
            Stage::Locating
            | Stage::Committed(_)
            | Stage::AwaitingGap
            | Stage::Resuming(_)
            | Stage::Ended => Vec::new(),
            _ => {
                let fault = Fault::cancelled(Side::Source, self.step(), reason);
                self.give_up(now, fault, true)
            }
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

    /// Ends it before Commit, or on the destination's promise: the guest runs on here.
    fn give_up(&mut self, now: Duration, fault: Fault, tell_peer: bool) -> Vec<Action> {
        let told = tell_peer && !matches!(self.stage, Stage::Connecting);
        let abort = told.then(|| Action::Send(Message::Abort(fault.clone())));
        let pausing = matches!(self.stage, Stage::Pausing(_));
        if self.ledger.paused || pausing {
            self.stage = Stage::Resuming(fault);
            // the guest first: a send may wait for a link that is stuck
            return std::iter::once(Action::Resume(RunPermit::mint())).chain(abort).collect();
        }
        let end = self.still_here(now, fault);
        abort.into_iter().chain(end).collect()
    }

    fn resumed(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Resuming(fault) = &self.stage else { return Vec::new() };
        let fault = fault.clone();
        let mut actions = vec![Action::Tell(Progress::Resumed)];
        actions.extend(self.still_here(now, fault));
        actions
    }

    fn still_here(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        self.stage = Stage::Ended;
        let report = self.report(now, OutcomeKind::StillHere, Some(fault));
        let stop = self.ledger.tracking.then_some(Action::StopTracking);
        stop.into_iter().chain([Action::End(Box::new(report))]).collect()
    }

    fn in_doubt(&mut self, now: Duration, fault: Fault) -> Vec<Action> {
        self.stage = Stage::Ended;
        let fault = Fault {
            remedy: "find out whether the destination runs the guest: resume it here only if it does not"
                .into(),
            ..fault
        };
        let report = self.report(now, OutcomeKind::InDoubt, Some(fault));
        vec![Action::StopTracking, Action::End(Box::new(report))]
    }

    fn report(&self, now: Duration, outcome: OutcomeKind, fault: Option<Fault>) -> Report {
        self.ledger.report(now, outcome, fault, self.config.ram_bytes)
    }
}
