//! The source's machine with a hostile destination.

use std::collections::VecDeque;
use std::time::Duration;

use mig_core::domain::Domain;
use mig_core::policy::Policy;
use mig_core::progress::{OutcomeKind, PageCounts};
use mig_core::source::{Action, Event, Source, SourceConfig};
use mig_core::switchover::{Claim, Word};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::frame::{ChunkDigests, Fate};
use mig_wire::hello::Capabilities;

use crate::input::{Frame, Input, Luck, Turn, Wish};
use crate::{bounds, heap, seeds, stream};

/// How far a conversation came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// Messages that the machine was given.
    pub messages: u64,
    /// Rounds it sent.
    pub rounds: u32,
    /// Whether it gave the guest away.
    pub committed: bool,
    /// Whether it was in doubt when the link was gone.
    pub doubted: bool,
    /// How it ended.
    pub outcome: Option<OutcomeKind>,
}

/// Gives the frames to the machine, between what the script has happen on this side; then the link is lost.
///
/// # Panics
/// When the machine panics, keeps or allocates more than its bound, does not end, or gives out a second right
/// to run the guest.
pub fn converse(input: &Input<'_>) -> Reach {
    let mut host = Host::new(input.is_arbitrated());
    host.feed(Event::Connected, 0);
    let mut frames = input.frames();
    for at in 0.. {
        let turn = input.turn(at);
        host.live(turn);
        let before = heap::live_bytes();
        match stream::next(&mut frames) {
            None => break,
            Some(Ok(read)) => {
                let message_bytes = (heap::live_bytes() - before).unsigned_abs();
                host.heard(read.frame, message_bytes);
            }
            Some(Err(error)) => {
                host.fail(Blame::Peer, error.to_string());
                break;
            }
        }
    }
    host.close()
}

/// What carries out the machine's actions.
struct Host {
    machine: Option<Source>,
    domain: Domain,
    now: Duration,
    /// Under way, in order.
    pending: VecDeque<Pending>,
    own_bytes: usize,
    /// What was allocated as the machine was made; what it kept since is beyond that.
    live_bytes: isize,
    reach: Reach,
    resumed: bool,
    /// It was committed, or the arbiter gave it to the destination.
    given_away: bool,
    /// And after that: the destination promised that it never ran the guest, the arbiter granted it, or an
    /// operator gave his word.
    given_back: bool,
}

/// An action under way. Plain, so that what is kept is the machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Attach,
    StartTracking,
    Send,
    Sync,
    Pause,
    Save,
    Locate,
    Resume,
    Claim,
    /// Answered by the peer alone, or not at all.
    Query,
}

impl Host {
    fn new(arbitrated: bool) -> Self {
        let description = seeds::description();
        let domain = Domain::new(&description.regions).expect("a seed is valid");
        let (machine, usage) = heap::measure(|| {
            Source::new(SourceConfig {
                policy: Policy { max_rounds: 5, ..Policy::default() },
                channels: 2,
                suited_channels: false,
                page_encodings: Capabilities::PAGE_ENCODINGS,
                verify: true,
                session: seeds::SESSION,
                arbiter: arbitrated.then_some(seeds::ARBITER),
                ram_bytes: domain.bytes(),
                description,
                pause_bytes_per_second: None,
                can_throttle: true,
                pause: Duration::from_millis(1),
                save: Duration::from_millis(1),
                verify_cost: Duration::from_millis(1),
            })
        });
        Self {
            machine: Some(machine),
            domain,
            now: Duration::ZERO,
            pending: VecDeque::with_capacity(bounds::COMPLETIONS_PER_MESSAGE),
            own_bytes: usage.kept_bytes + 4096,
            live_bytes: heap::live_bytes(),
            reach: Reach::default(),
            resumed: false,
            given_away: false,
            given_back: false,
        }
    }

    /// Lets this side go on.
    fn live(&mut self, turn: Turn) {
        self.now += Duration::from_millis(turn.elapsed_ms);
        match turn.wish {
            Some(Wish::Cancel) => self.feed(Event::Cancelled { reason: None }, 0),
            Some(Wish::Resolve(word)) => {
                self.given_back |= self.given_away && word == Word::Resume;
                self.feed(Event::Resolve(word), 0);
            }
            None => {}
        }
        if turn.luck == Luck::Bad && self.take_query() {
            self.unanswered();
        }
        let most = turn.completions.min(bounds::COMPLETIONS_PER_MESSAGE);
        for at in 0..most {
            let Some(next) = self.pending.iter().position(|p| *p != Pending::Query) else { return };
            let pending = self.pending.remove(next).expect("it is there");
            let event = complete(pending, if at == 0 { turn.luck } else { Luck::Good });
            self.given_away |= event == Event::Claimed(Claim::Denied);
            self.given_back |= event == Event::Claimed(Claim::Granted);
            self.feed(event, 0);
        }
        let waits = self.pending.iter().all(|p| *p == Pending::Query);
        assert!(turn.completions <= most || waits, "it never waits for its peer");
    }

    /// Whether a question was under way; it is not any more.
    fn take_query(&mut self) -> bool {
        let found = self.pending.iter().position(|p| *p == Pending::Query);
        found.and_then(|at| self.pending.remove(at)).is_some()
    }

    fn unanswered(&mut self) {
        let fault = Fault::new(Side::Source, Step::Commit, Blame::Network, "nobody answers");
        self.feed(Event::Unanswered(fault), 0);
    }

    fn heard(&mut self, frame: Frame, message_bytes: usize) {
        // pings and pongs are the link's own; page channels carry nothing to a source
        match frame {
            Frame::Message(Message::Ping(_)) => {}
            Frame::Message(Message::Pong(token)) => {
                self.feed(Event::RoundTrip(Duration::from_nanos(token)), 0);
            }
            // on a connection of its own
            Frame::Message(Message::Outcome(fate)) if self.take_query() => {
                self.reach.messages += 1;
                self.given_back |= fate == Fate::Never;
                self.feed(Event::Answered(fate), message_bytes);
            }
            Frame::Message(message) => {
                self.reach.messages += 1;
                self.given_back |= self.given_away && matches!(message, Message::Abort(_));
                self.feed(Event::Message(message), message_bytes);
            }
            Frame::Pages { .. } | Frame::RoundEnd { .. } => {}
        }
    }

    fn fail(&mut self, blame: Blame, cause: String) {
        let step = self.machine().step();
        let cause_bytes = cause.len();
        self.feed(Event::Failed(Fault::new(Side::Source, step, blame, cause)), cause_bytes);
    }

    /// The link is lost, and what is under way comes to its end.
    fn close(mut self) -> Reach {
        self.fail(Blame::Network, "lost".into());
        self.live(Turn::SETTLE);
        if self.machine().is_in_doubt() {
            self.reach.doubted = true;
            for _ in 0..3 {
                // it goes on asking, unless it was told that no question will help
                if self.take_query() {
                    self.unanswered();
                    self.live(Turn::SETTLE);
                }
            }
        }
        if self.machine().is_in_doubt() {
            self.feed(Event::Resolve(Word::Discard), 0);
        }
        assert!(self.machine().has_ended(), "it ends when its link is lost");
        let outcome = self.reach.outcome.expect("it says how it ended");
        assert_eq!(outcome == OutcomeKind::StillHere, !self.given_away || self.resumed);
        self.reach
    }

    fn machine(&self) -> &Source {
        self.machine.as_ref().expect("put back")
    }

    fn feed(&mut self, event: Event, message_bytes: usize) {
        let machine = self.machine.take().expect("put back below");
        let now = self.now;
        let ((machine, actions), usage) = heap::measure(|| machine.handle(now, event));
        let bound = bounds::handling(message_bytes, self.own_bytes);
        assert!(usage.peak_bytes <= bound, "{} bytes allocated, at most {bound} may be", usage.peak_bytes);
        self.machine = Some(machine);
        assert!(actions.len() <= bounds::ACTIONS_PER_TRANSITION, "{actions:?}");
        actions.into_iter().for_each(|action| self.perform(action));
        let kept = heap::live_bytes() - self.live_bytes;
        assert!(kept <= bounds::SOURCE_KEEPS as isize, "the source keeps {kept} bytes");
    }

    fn perform(&mut self, action: Action) {
        assert_eq!(self.reach.outcome, None, "nothing follows its end: {action:?}");
        let pending = match action {
            Action::Send(message) => {
                message.encode(0, 0).expect("what a machine says can be said");
                return;
            }
            Action::Tell(_) | Action::StopTracking | Action::Throttle(_) => return,
            Action::Attach { channels, .. } => {
                assert!((1..=2).contains(&channels));
                Pending::Attach
            }
            Action::StartTracking => Pending::StartTracking,
            Action::SendRound { round, .. } => {
                self.reach.rounds += 1;
                assert!(round < 5, "the policy's limit");
                Pending::Send
            }
            Action::Sync => Pending::Sync,
            Action::Pause => Pending::Pause,
            Action::Save => Pending::Save,
            Action::SendLast { .. } => Pending::Send,
            Action::Locate(samples) => {
                self.locate(&samples);
                Pending::Locate
            }
            Action::Commit(permit) => {
                assert!(!self.reach.committed && !self.resumed, "one permit");
                self.reach.committed = true;
                self.given_away = true;
                drop(permit);
                return;
            }
            Action::Resume(permit) => {
                assert!(!self.resumed, "one permit");
                assert!(!self.given_away || self.given_back, "it was given away");
                self.resumed = true;
                drop(permit);
                self.pending.clear();
                Pending::Resume
            }
            Action::Claim => Pending::Claim,
            Action::Query { .. } => {
                assert!(!self.pending.contains(&Pending::Query), "one question at a time");
                Pending::Query
            }
            Action::End(report) => {
                self.reach.outcome = Some(report.outcome);
                return;
            }
        };
        assert!(self.pending.len() < bounds::COMPLETIONS_PER_MESSAGE, "{pending:?} on top of all the others");
        self.pending.push_back(pending);
    }

    /// As a driver looks for the pages that differ.
    fn locate(&self, samples: &[ChunkDigests]) {
        for sample in samples {
            for (page, _) in self.domain.chunk_pages(sample.chunk).zip(&sample.pages) {
                assert!(self.domain.guest_address(page).is_some());
            }
        }
    }
}

fn complete(pending: Pending, luck: Luck) -> Event {
    let failed = |step| {
        let step = if let Pending::Resume = pending { Step::Resume } else { step };
        Event::Failed(Fault::new(Side::Source, step, Blame::Local, "on purpose"))
    };
    let many = luck == Luck::Other;
    match pending {
        Pending::Claim => Event::Claimed(match luck {
            Luck::Good => Claim::Granted,
            Luck::Other => Claim::Denied,
            Luck::Bad => Claim::Unavailable("on purpose".into()),
        }),
        Pending::Query => Event::Answered(Fate::Unknown),
        _ if luck == Luck::Bad => failed(Step::Save),
        Pending::Attach => Event::Attached,
        Pending::StartTracking => Event::Tracking,
        Pending::Send => Event::RoundSent {
            pages: PageCounts { zero: 100, raw: 1000, ..PageCounts::default() },
            bytes: 4_100_000,
        },
        Pending::Sync => Event::Synced { dirty_pages: if many { 4000 } else { 10 }, hot_pages: 9 },
        Pending::Pause => Event::Paused,
        Pending::Save => Event::Saved,
        Pending::Locate => Event::Located { guest_addresses: if many { vec![4096] } else { Vec::new() } },
        Pending::Resume => Event::Resumed,
    }
}
