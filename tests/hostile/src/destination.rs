//! The destination's machine with a hostile source, down to the saved state that it is given.

use std::collections::VecDeque;
use std::time::Duration;

use mig_core::destination::{Action, Destination, End, Event};
use mig_core::domain::Domain;
use mig_core::switchover::{Claim, Word};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::describe::Refusal;
use mig_wire::frame::{ChunkDigests, DestinationCosts, Fate};
use mig_wire::hello::MAX_CHANNELS;
use mig_wire::pages::Run;
use mig_wire::{Description, Message, Section};

use crate::input::{Frame, Input, Luck, Turn, Wish};
use crate::{bounds, heap, seeds, stream};

/// The guest's memory that a host here has room for, in bytes.
const ROOM_BYTES: u64 = 1 << 40;

/// How far a conversation came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// Messages that the machine was given.
    pub messages: u64,
    /// Whether a guest was accepted.
    pub accepted: bool,
    /// Sections of state that could be read.
    pub sections: u64,
    /// Sections of state that could not.
    pub bad_sections: u64,
    /// Whether a complete copy was left without a source.
    pub held: bool,
    /// Whether the guest was run.
    pub resumed: bool,
    /// Whether it ended with the guest running here.
    pub running: bool,
}

/// Gives the frames to the machine, between what the script has happen on this side; then the link is lost.
///
/// # Panics
/// When the machine or the reader of saved state panics, keeps or allocates more than its bound, does not end,
/// or runs the guest twice, without a Commit, or after it promised that it never will.
pub fn converse(input: &Input<'_>) -> Reach {
    let mut host = Host::new(input.is_arbitrated());
    let mut frames = input.frames();
    for at in 0.. {
        host.live(input.turn(at));
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
    host.close(input)
}

/// What carries out the machine's actions.
struct Host {
    machine: Option<Destination>,
    domain: Option<Domain>,
    now: Duration,
    /// Under way, in order.
    pending: VecDeque<Pending>,
    /// What was allocated as the machine was made, and what this host keeps since.
    live_bytes: isize,
    /// The largest State that came.
    state_bytes: usize,
    reach: Reach,
    /// The source gave the guest away, or an operator his word.
    committed: bool,
    promised: bool,
    answers: u32,
    ended: bool,
}

/// An action under way. Plain, so that what is kept is the machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Prepare { fits: bool },
    Attach,
    Verify,
    Load { readable: bool },
    Claim,
    Resume,
    FindGap,
}

impl Host {
    fn new(arbitrated: bool) -> Self {
        let arbiter = arbitrated.then_some(seeds::ARBITER);
        Self {
            machine: Some(Destination::new(seeds::SECRET, MAX_CHANNELS, arbiter)),
            domain: None,
            now: Duration::ZERO,
            pending: VecDeque::with_capacity(bounds::COMPLETIONS_PER_MESSAGE),
            live_bytes: heap::live_bytes(),
            state_bytes: 0,
            reach: Reach::default(),
            committed: false,
            promised: false,
            answers: 0,
            ended: false,
        }
        .settled()
    }

    fn settled(mut self) -> Self {
        self.live_bytes = heap::live_bytes();
        self
    }

    /// Lets this side go on.
    fn live(&mut self, turn: Turn) {
        self.now += Duration::from_millis(turn.elapsed_ms);
        match turn.wish {
            Some(Wish::Cancel) => self.feed(Event::Cancelled { reason: None }, 0),
            Some(Wish::Resolve(word)) => self.resolve(word),
            None => {}
        }
        let most = turn.completions.min(bounds::COMPLETIONS_PER_MESSAGE);
        for at in 0..most {
            let Some(pending) = self.pending.pop_front() else { return };
            let event = complete(pending, if at == 0 { turn.luck } else { Luck::Good });
            self.feed(event, 0);
        }
        assert!(turn.completions <= most || self.pending.is_empty(), "it never waits for its peer");
    }

    fn resolve(&mut self, word: Word) {
        self.committed |= self.machine().is_in_doubt() && word == Word::Resume;
        self.feed(Event::Resolve(word), 0);
    }

    /// A source in doubt asks, on a connection of its own.
    fn ask(&mut self) {
        let (answers, asked) = (self.answers, !self.ended);
        self.feed(Event::Query, 0);
        assert_eq!(self.answers - answers, u32::from(asked), "one answer, at once");
    }

    fn machine(&self) -> &Destination {
        self.machine.as_ref().expect("put back")
    }

    fn heard(&mut self, frame: Frame, message_bytes: usize) {
        match frame {
            // the link's own
            Frame::Message(Message::Ping(_) | Message::Pong(_)) => {}
            Frame::Message(Message::Query(query)) if query == seeds::query() => self.ask(),
            Frame::Message(message) => {
                self.reach.messages += 1;
                self.committed |= matches!(message, Message::Commit);
                if let Message::State { .. } = message {
                    self.state_bytes = self.state_bytes.max(message_bytes);
                }
                self.feed(Event::Message(message), message_bytes);
            }
            Frame::Pages { runs, .. } => runs.iter().for_each(|run| self.admit(run)),
            Frame::RoundEnd { round, .. } => self.feed(Event::ChannelEnded { round }, 0),
        }
    }

    /// As a page channel checks a run before a byte of it lands.
    fn admit(&self, run: &Run) {
        let Some(domain) = &self.domain else { return };
        let count = u64::from(run.count);
        if domain.holds(run.first_page, count) {
            let last = run.first_page + count - 1;
            assert!(domain.guest_address(run.first_page).is_some() && domain.guest_address(last).is_some());
            assert!(last < domain.end_page());
        }
    }

    fn fail(&mut self, blame: Blame, cause: String) {
        let step = self.machine().step();
        let cause_bytes = cause.len();
        self.feed(Event::Failed(Fault::new(Side::Destination, step, blame, cause)), cause_bytes);
    }

    /// The link is lost, and what is under way comes to its end.
    fn close(mut self, input: &Input<'_>) -> Reach {
        self.fail(Blame::Network, "lost".into());
        self.live(Turn::SETTLE);
        if self.machine().is_in_doubt() {
            self.reach.held = true;
            match input.turn(0).elapsed_ms {
                0 => self.ask(),
                1 => self.resolve(Word::Resume),
                _ => self.resolve(Word::Discard),
            }
            self.live(Turn::SETTLE);
        }
        assert!(self.machine().has_ended() && self.ended, "it ends with its link");
        self.reach
    }

    fn feed(&mut self, event: Event, message_bytes: usize) {
        let machine = self.machine.take().expect("put back below");
        let now = self.now;
        let ((machine, actions), usage) = heap::measure(|| machine.handle(now, event));
        let chunks = self.domain.as_ref().map_or(0, Domain::chunks);
        let digests = bounds::destination_keeps(0, chunks);
        let bound = bounds::handling(message_bytes, digests);
        assert!(usage.peak_bytes <= bound, "{} bytes allocated, at most {bound} may be", usage.peak_bytes);
        self.machine = Some(machine);
        assert!(actions.len() <= bounds::ACTIONS_PER_TRANSITION, "{actions:?}");
        actions.into_iter().for_each(|action| self.perform(action));
        let chunks = self.domain.as_ref().map_or(0, Domain::chunks);
        let (kept, bound) =
            (heap::live_bytes() - self.live_bytes, bounds::destination_keeps(self.state_bytes, chunks));
        assert!(kept <= isize::try_from(bound).unwrap_or(isize::MAX), "{kept} bytes kept, at most {bound}");
    }

    fn perform(&mut self, action: Action) {
        assert!(!self.ended, "nothing follows its end: {action:?}");
        let pending = match action {
            Action::Send(message) => {
                message.encode(0, 0).expect("what a machine says can be said");
                if let Message::Abort(_) | Message::Mismatch { .. } | Message::Refuse(_) = message {
                    assert!(!self.reach.resumed, "a promise that was broken before it was made: {message:?}");
                    self.promised = true;
                }
                return;
            }
            Action::Tell(_) => return,
            Action::Accept { channels } => {
                assert!((1..=MAX_CHANNELS).contains(&channels));
                Pending::Attach
            }
            Action::Prepare(description) => Pending::Prepare { fits: self.prepare(&description) },
            Action::Verify(digests) => {
                let domain = self.domain.as_ref().expect("digests are of an accepted guest");
                assert_eq!(digests.len() as u64, domain.chunks());
                Pending::Verify
            }
            Action::Load(sections) => Pending::Load { readable: self.restore(&sections) },
            Action::Claim => Pending::Claim,
            Action::Answer(fate) => {
                self.answers += 1;
                assert!(!self.promised, "one promise");
                assert_eq!(
                    matches!(fate, Fate::Running { .. } | Fate::Unknown),
                    self.reach.resumed,
                    "{fate:?}"
                );
                self.promised |= fate == Fate::Never;
                return;
            }
            Action::Resume(permit) => {
                assert!(!self.reach.resumed && self.committed && !self.promised, "its one permit");
                self.reach.resumed = true;
                drop(permit);
                Pending::Resume
            }
            Action::FindGap => Pending::FindGap,
            Action::End(end) => {
                self.ended = true;
                self.reach.running = matches!(end, End::Running(_));
                assert!(!matches!(end, End::NotReceived(_)) || !self.reach.resumed, "{end:?}");
                return;
            }
        };
        if let Pending::Prepare { fits: true } = pending {
            self.reach.accepted = true;
        }
        assert!(self.pending.len() < bounds::COMPLETIONS_PER_MESSAGE, "{pending:?} on top of all the others");
        self.pending.push_back(pending);
    }

    /// Whether there is room for the guest; keeps its domain.
    fn prepare(&mut self, description: &Description) -> bool {
        let before = heap::live_bytes();
        let domain = Domain::new(&description.regions).expect("the machine has refused what is no domain");
        for section in &description.platform {
            read_body(section);
        }
        let fits = domain.bytes() <= ROOM_BYTES;
        self.domain = fits.then_some(domain);
        self.live_bytes += heap::live_bytes() - before;
        fits
    }

    /// Reads every section as a machine here would; what cannot be read fails the restore.
    fn restore(&mut self, sections: &[Section]) -> bool {
        let readable = sections.iter().filter(|section| read_body(section)).count();
        self.reach.sections += readable as u64;
        self.reach.bad_sections += (sections.len() - readable) as u64;
        readable == sections.len()
    }
}

/// Reads the body of a section, within its bound.
fn read_body(section: &Section) -> bool {
    let (text, usage) = heap::measure(|| mig_vmm::section_text(section));
    let (peak, bound) = (usage.peak_bytes, bounds::section(section.body.len()));
    assert!(peak <= bound, "{peak} bytes allocated to read {}, at most {bound} may be", section.name);
    text.is_ok()
}

fn complete(pending: Pending, luck: Luck) -> Event {
    let failed = |step, cause: &str| Event::Failed(Fault::new(Side::Destination, step, Blame::Local, cause));
    match (pending, luck) {
        // it has no way to fail
        (Pending::FindGap, Luck::Good) => Event::Gap(Some(Duration::from_millis(1))),
        (Pending::FindGap, _) => Event::Gap(None),
        (Pending::Claim, Luck::Good) => Event::Claimed(Claim::Granted),
        (Pending::Claim, Luck::Other) => Event::Claimed(Claim::Denied),
        (Pending::Claim, Luck::Bad) => Event::Claimed(Claim::Unavailable("on purpose".into())),
        (Pending::Prepare { fits: true }, Luck::Good) => Event::Prepared(DestinationCosts::default()),
        (Pending::Prepare { .. }, Luck::Good | Luck::Other) => {
            Event::Refused(vec![Refusal::new("memory", "there is no room", "make some")])
        }
        (Pending::Verify, Luck::Other) => {
            Event::Differs { chunks: 1, samples: vec![ChunkDigests { chunk: 0, pages: vec![7; 512] }] }
        }
        (Pending::Load { readable: false }, _) => failed(Step::Load, "a section cannot be read"),
        (Pending::Resume, Luck::Bad) => failed(Step::Resume, "on purpose"),
        (_, Luck::Bad) => failed(Step::Prepare, "on purpose"),
        (Pending::Attach, _) => Event::Attached,
        (Pending::Verify, _) => Event::Verified,
        (Pending::Load { readable: true }, _) => Event::Loaded,
        (Pending::Resume, _) => Event::Resumed { at: None },
    }
}
