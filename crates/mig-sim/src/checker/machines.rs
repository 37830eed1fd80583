//! The machines of `mig-core` under the checker: each of their states is kept once and named by a number, and
//! what one of them answers to an input is computed once by the machine itself and then looked up.
//!
//! Invariant: nothing here decides anything. An [`Input`] is an event of the machine without its figures (time
//! stands still, costs are zero, state and digests are empty), an [`Effect`] an action without what only an
//! observer would see. A machine that has ended hears nothing more, so it needs no number.

use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::time::Duration;

use mig_core::destination::{self, Destination, End};
use mig_core::policy::Policy;
use mig_core::progress::{OutcomeKind, PageCounts};
use mig_core::source::{self, Source, SourceConfig};
use mig_core::switchover::{ArbiterId, Claim, Word};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::describe::{Description, Refusal, Region};
use mig_wire::frame::{DestinationCosts, Fate};
use mig_wire::hello::Capabilities;

/// One page channel: reordering against the control channel needs no second.
const CHANNELS: u16 = 1;
const RAM_BYTES: u64 = 2 << 20;
const SECRET: [u8; 16] = [9; 16];

/// The number of a message.
pub(super) type MessageId = u16;
/// The number of a state of a machine.
pub(super) type MachineId = u32;

/// What a machine is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Input {
    Connected,
    Message(MessageId),
    Done(Work),
    /// The dirty log was read, and holds too much for the pause.
    ManyDirty,
    Differs,
    Refused,
    ChannelEnded(u32),
    /// The page channels attached (the destination's side).
    Attached,
    Failed(Failure),
    Cancelled,
    /// A question has arrived (the destination's side).
    Asked,
    Answered(Fate),
    Unanswered,
    /// The arbiter could not be asked, or its answer was lost.
    ArbiterUnavailable,
    Resolve(Word),
}

/// Why something failed, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    /// The link was lost or fell silent.
    Link,
    /// The peer is there but takes too long.
    Late,
    /// Something else than a resume failed here.
    Work,
    /// The resume failed.
    Resume,
}

/// What a side was asked to do, and answers later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Work {
    Attach,
    StartTracking,
    SendPages,
    Sync,
    Pause,
    Save,
    Locate,
    /// The write of Commit to the control channel, which may fail although it arrived.
    WriteCommit,
    Resume,
    Prepare,
    Verify,
    Load,
    FindGap,
    /// Waiting until it is time to ask the destination.
    Query,
    /// The arbiter is asked, and has not decided yet.
    Claim,
    /// It has decided for this side; the answer is on its way.
    Granted,
    /// It has decided for the other side; the answer is on its way.
    Denied,
}

/// What a machine asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Effect {
    Send(MessageId),
    /// The last pages and the state.
    SendRound(u32),
    MintPermit,
    Work(Work),
    Answer(Fate),
    SourceEnds(OutcomeKind),
    DestinationEnds(DestinationEnd),
}

/// How a destination's machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum DestinationEnd {
    Running,
    NotReceived,
    Lost,
}

/// The machine after an input, and what it asks for.
type Answer = (MachineId, Rc<[Effect]>);

/// Values by number.
struct Pool<T> {
    values: Vec<Rc<T>>,
    numbers: HashMap<Rc<T>, u32>,
}

impl<T: Eq + Hash> Pool<T> {
    fn new() -> Self {
        Self { values: Vec::new(), numbers: HashMap::new() }
    }

    fn number(&mut self, value: T) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let (number, value) = (self.values.len() as u32, Rc::new(value));
        self.values.push(value.clone());
        self.numbers.insert(value, number);
        number
    }
}

/// All states of both machines that came up, all messages, and all transitions.
pub(super) struct Machines {
    verify: bool,
    arbiter: Option<ArbiterId>,
    sources: Pool<Source>,
    destinations: Pool<Destination>,
    messages: Pool<Message>,
    transitions: HashMap<(Side, MachineId, Input), Answer>,
}

impl Machines {
    pub(super) fn new(verify: bool, arbitrated: bool) -> Self {
        Self {
            verify,
            arbiter: arbitrated.then_some([3; 16]),
            sources: Pool::new(),
            destinations: Pool::new(),
            messages: Pool::new(),
            transitions: HashMap::new(),
        }
    }

    /// Both machines before anything happened.
    pub(super) fn first(&mut self) -> (MachineId, MachineId) {
        let source = self.sources.number(Source::new(config(self.verify, self.arbiter)));
        (source, self.destinations.number(Destination::new(SECRET, CHANNELS, self.arbiter)))
    }

    /// How many states and transitions of the machines themselves came up.
    pub(super) fn seen(&self) -> (usize, usize) {
        (self.sources.values.len() + self.destinations.values.len(), self.transitions.len())
    }

    pub(super) fn message(&self, id: MessageId) -> &Message {
        &self.messages.values[usize::from(id)]
    }

    pub(super) fn number(&mut self, message: Message) -> MessageId {
        self.messages.number(message).try_into().expect("messages are few: their figures are all zero")
    }

    pub(super) fn source(&self, id: MachineId) -> &Source {
        &self.sources.values[id as usize]
    }

    pub(super) fn destination(&self, id: MachineId) -> &Destination {
        &self.destinations.values[id as usize]
    }

    /// Gives a machine an input: the machine after it, and what it asks for.
    pub(super) fn tell(&mut self, side: Side, id: MachineId, input: Input) -> Answer {
        if let Some((next, effects)) = self.transitions.get(&(side, id, input)) {
            return (*next, effects.clone());
        }
        let (next, effects): (_, Vec<_>) = match side {
            Side::Source => self.tell_source(id, input),
            Side::Destination => self.tell_destination(id, input),
        };
        let effects: Rc<[Effect]> = effects.into();
        self.transitions.insert((side, id, input), (next, effects.clone()));
        (next, effects)
    }

    fn tell_source(&mut self, id: MachineId, input: Input) -> (MachineId, Vec<Effect>) {
        let machine = Source::clone(self.source(id));
        let event = self.source_event(machine.step(), input);
        let (machine, actions) = machine.handle(Duration::ZERO, event);
        let effects = actions.into_iter().flat_map(|action| self.source_effects(action)).collect();
        (self.sources.number(machine), effects)
    }

    fn source_event(&self, step: Step, input: Input) -> source::Event {
        use source::Event;
        match input {
            Input::Connected => Event::Connected,
            Input::Message(id) => Event::Message(self.message(id).clone()),
            Input::Done(Work::Attach) => Event::Attached,
            Input::Done(Work::StartTracking) => Event::Tracking,
            Input::Done(Work::SendPages) => Event::RoundSent { pages: PageCounts::default(), bytes: 0 },
            Input::Done(Work::Sync) => Event::Synced { dirty_pages: 0, hot_pages: 0 },
            Input::ManyDirty => Event::Synced { dirty_pages: 1000, hot_pages: 0 },
            Input::Done(Work::Pause) => Event::Paused,
            Input::Done(Work::Save) => Event::Saved,
            Input::Done(Work::Locate) => Event::Located { guest_addresses: Vec::new() },
            Input::Done(Work::Resume) => Event::Resumed,
            Input::Failed(failure) => Event::Failed(fault(Side::Source, step, failure)),
            Input::Cancelled => Event::Cancelled { reason: None },
            Input::Done(Work::Granted) => Event::Claimed(Claim::Granted),
            Input::Done(Work::Denied) => Event::Claimed(Claim::Denied),
            Input::ArbiterUnavailable => Event::Claimed(Claim::Unavailable(String::new())),
            Input::Answered(fate) => Event::Answered(fate),
            Input::Unanswered => Event::Unanswered(fault(Side::Source, step, Failure::Link)),
            Input::Resolve(word) => Event::Resolve(word),
            Input::Done(
                Work::WriteCommit
                | Work::Prepare
                | Work::Verify
                | Work::Load
                | Work::FindGap
                | Work::Query
                | Work::Claim,
            )
            | Input::Differs
            | Input::Refused
            | Input::ChannelEnded(_)
            | Input::Attached
            | Input::Asked => unreachable!("{input:?} at the source"),
        }
    }

    fn source_effects(&mut self, action: source::Action) -> Vec<Effect> {
        use source::Action;
        match action {
            Action::Send(message) => vec![Effect::Send(self.number(message))],
            Action::Attach { .. } => vec![Effect::Work(Work::Attach)],
            Action::StartTracking => vec![Effect::Work(Work::StartTracking)],
            Action::SendRound { round, .. } => vec![Effect::SendRound(round), Effect::Work(Work::SendPages)],
            Action::Sync => vec![Effect::Work(Work::Sync)],
            Action::Pause => vec![Effect::Work(Work::Pause)],
            Action::Save => vec![Effect::Work(Work::Save)],
            Action::SendLast { round, verify } => {
                let mut effects = vec![Effect::SendRound(round)];
                effects.push(Effect::Send(self.number(Message::State { round, sections: Vec::new() })));
                if verify {
                    let digests = Message::Digests { first_chunk: 0, digests: vec![0] };
                    effects.push(Effect::Send(self.number(digests)));
                }
                effects.push(Effect::Work(Work::SendPages));
                effects
            }
            Action::Locate(_) => vec![Effect::Work(Work::Locate)],
            Action::Commit(permit) => {
                drop(permit);
                let commit = Effect::Send(self.number(Message::Commit));
                vec![commit, Effect::Work(Work::WriteCommit)]
            }
            Action::Resume(permit) => {
                drop(permit);
                vec![Effect::MintPermit, Effect::Work(Work::Resume)]
            }
            Action::Query { .. } => vec![Effect::Work(Work::Query)],
            Action::Claim => vec![Effect::Work(Work::Claim)],
            Action::Throttle(_) | Action::StopTracking | Action::Tell(_) => Vec::new(),
            Action::End(report) => vec![Effect::SourceEnds(report.outcome)],
        }
    }

    fn tell_destination(&mut self, id: MachineId, input: Input) -> (MachineId, Vec<Effect>) {
        let machine = Destination::clone(self.destination(id));
        let event = self.destination_event(machine.step(), input);
        let (machine, actions) = machine.handle(Duration::ZERO, event);
        let effects = actions.into_iter().flat_map(|action| self.destination_effects(action)).collect();
        (self.destinations.number(machine), effects)
    }

    fn destination_event(&self, step: Step, input: Input) -> destination::Event {
        use destination::Event;
        match input {
            Input::Message(id) => Event::Message(self.message(id).clone()),
            Input::Done(Work::Prepare) => Event::Prepared(DestinationCosts::default()),
            Input::Refused => Event::Refused(vec![Refusal::new("memory", "too little", "")]),
            Input::Attached => Event::Attached,
            Input::ChannelEnded(round) => Event::ChannelEnded { round },
            Input::Done(Work::Verify) => Event::Verified,
            Input::Differs => Event::Differs { chunks: 1, samples: Vec::new() },
            Input::Done(Work::Load) => Event::Loaded,
            Input::Done(Work::Resume) => Event::Resumed { at: None },
            Input::Done(Work::FindGap) => Event::Gap(None),
            Input::Failed(failure) => Event::Failed(fault(Side::Destination, step, failure)),
            Input::Cancelled => Event::Cancelled { reason: None },
            Input::Done(Work::Granted) => Event::Claimed(Claim::Granted),
            Input::Done(Work::Denied) => Event::Claimed(Claim::Denied),
            Input::ArbiterUnavailable => Event::Claimed(Claim::Unavailable(String::new())),
            Input::Asked => Event::Query,
            Input::Resolve(word) => Event::Resolve(word),
            Input::Done(
                Work::Attach
                | Work::StartTracking
                | Work::SendPages
                | Work::Sync
                | Work::Pause
                | Work::Save
                | Work::Locate
                | Work::WriteCommit
                | Work::Query
                | Work::Claim,
            )
            | Input::Connected
            | Input::ManyDirty
            | Input::Answered(_)
            | Input::Unanswered => unreachable!("{input:?} at the destination"),
        }
    }

    fn destination_effects(&mut self, action: destination::Action) -> Vec<Effect> {
        use destination::Action;
        match action {
            Action::Send(message) => vec![Effect::Send(self.number(message))],
            Action::Prepare(_) => vec![Effect::Work(Work::Prepare)],
            Action::Verify(_) => vec![Effect::Work(Work::Verify)],
            Action::Load(_) => vec![Effect::Work(Work::Load)],
            Action::Resume(permit) => {
                drop(permit);
                vec![Effect::MintPermit, Effect::Work(Work::Resume)]
            }
            Action::FindGap => vec![Effect::Work(Work::FindGap)],
            Action::Claim => vec![Effect::Work(Work::Claim)],
            Action::Answer(fate) => vec![Effect::Answer(fate)],
            Action::Accept { .. } | Action::Tell(_) => Vec::new(),
            Action::End(end) => vec![Effect::DestinationEnds(match end {
                End::Running(_) => DestinationEnd::Running,
                End::NotReceived(_) => DestinationEnd::NotReceived,
                End::Lost(_) => DestinationEnd::Lost,
            })],
        }
    }
}

fn config(verify: bool, arbiter: Option<ArbiterId>) -> SourceConfig {
    let description = Description {
        architecture: "x86_64".into(),
        page_bytes: 4096,
        vcpus: 1,
        regions: vec![Region { guest_address: 0, bytes: RAM_BYTES }],
        boot_id: None,
        schemas: Vec::new(),
        platform: Vec::new(),
    };
    SourceConfig {
        // few pages lead to the pause after the first round, many to a second
        policy: Policy { max_rounds: 2, downtime_limit: Duration::ZERO, ..Policy::default() },
        channels: CHANNELS,
        suited_channels: false,
        page_encodings: Capabilities::empty(),
        verify,
        session: [7; 16],
        arbiter,
        description,
        ram_bytes: RAM_BYTES,
        pause_bytes_per_second: None,
        can_throttle: false,
        pause: Duration::ZERO,
        save: Duration::ZERO,
        verify_cost: Duration::ZERO,
    }
}

/// As the drivers make them: only a resume that failed has that step together with [`Blame::Local`].
fn fault(side: Side, step: Step, failure: Failure) -> Fault {
    let (step, blame) = match failure {
        Failure::Link => (step, Blame::Network),
        Failure::Late => (step, Blame::Peer),
        Failure::Work => (Step::Save, Blame::Local),
        Failure::Resume => (Step::Resume, Blame::Local),
    };
    Fault::new(side, step, blame, "")
}
