//! A machine brought to any stage of a receive, and what it did in words.

use std::time::Duration;

use mig_core::destination::{Action, Destination, End, Event};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::describe::{Description, Region};
use mig_wire::frame::{DestinationCosts, Fate};
use mig_wire::hello::{Attach, Hello, Query, Welcome};
use mig_wire::section::Section;

pub(crate) const MS: Duration = Duration::from_millis(1);
/// Two channels, and a guest of four chunks.
pub(crate) const CHANNELS: u16 = 2;
pub(crate) const CHUNKS: u64 = 4;

pub(crate) fn hello() -> Hello {
    Hello { version_min: 1, version_max: 1, required: 1, optional: 0, channels: 2, session: [7; 16] }
}

pub(crate) fn description() -> Box<Description> {
    Box::new(Description {
        architecture: "x86_64".into(),
        page_bytes: 4096,
        vcpus: 1,
        regions: vec![Region { guest_address: 0, bytes: CHUNKS << 21 }],
        boot_id: None,
        schemas: Vec::new(),
        platform: Vec::new(),
    })
}

pub(crate) fn state(round: u32) -> Event {
    let section =
        Section { name: "cpu".into(), instance: 0, version: 1, critical: true, body: vec![1, 2, 3] };
    Event::Message(Message::State { round, sections: vec![section] })
}

pub(crate) fn digests(first_chunk: u64, count: u64) -> Event {
    let digests = (first_chunk..first_chunk + count).collect();
    Event::Message(Message::Digests { first_chunk, digests })
}

pub(crate) fn ended(round: u32) -> Event {
    Event::ChannelEnded { round }
}

pub(crate) fn fault(blame: Blame) -> Fault {
    Fault::new(Side::Destination, Step::Track, blame, "it broke")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum At {
    AwaitingHello,
    AwaitingDescription,
    Preparing,
    Attaching,
    Receiving,
    LastRound,
    Verifying,
    Loading,
    Ready,
    Resuming,
    FindingGap,
}

pub(crate) use At::*;

/// The stages of a receive that goes well, each with the events that lead on to the next.
pub(crate) fn way() -> Vec<(At, Vec<Event>)> {
    vec![
        (AwaitingHello, vec![Event::Message(Message::Hello(hello()))]),
        (AwaitingDescription, vec![Event::Message(Message::Describe(description()))]),
        (Preparing, vec![Event::Prepared(DestinationCosts::default())]),
        (Attaching, vec![Event::Attached]),
        (Receiving, vec![ended(0), ended(0)]),
        (LastRound, vec![state(1), digests(0, 4), ended(1), ended(1)]),
        (Verifying, vec![Event::Verified]),
        (Loading, vec![Event::Loaded]),
        (Ready, vec![Event::Message(Message::Commit)]),
        (Resuming, vec![Event::Resumed { at: None }]),
        (FindingGap, vec![Event::Gap(Some(MS))]),
    ]
}

pub(crate) struct Run {
    pub(crate) machine: Destination,
    pub(crate) now: Duration,
}

impl Run {
    pub(crate) fn new() -> Self {
        Self { machine: Destination::new([9; 16], CHANNELS, None), now: Duration::ZERO }
    }

    pub(crate) fn at(stage: At) -> Self {
        Self::new().on_to(stage, &hello())
    }

    pub(crate) fn without_verify(stage: At) -> Self {
        Self::new().on_to(stage, &Hello { required: 0, ..hello() })
    }

    pub(crate) fn on_to(mut self, stage: At, hello: &Hello) -> Self {
        for (at, events) in way().into_iter().take_while(|(at, _)| *at != stage) {
            if at == AwaitingHello {
                self.hear(Message::Hello(hello.clone()));
                continue;
            }
            for event in events {
                self.tell(event);
            }
        }
        assert!(!self.machine.has_ended());
        self
    }

    pub(crate) fn tell(&mut self, event: Event) -> Vec<Action> {
        self.now += MS;
        let (machine, actions) = self.machine.clone().handle(self.now, event);
        self.machine = machine;
        actions
    }

    pub(crate) fn hear(&mut self, message: Message) -> Vec<Action> {
        self.tell(Event::Message(message))
    }
}

/// What a list of actions does, without what it tells observers.
pub(crate) fn names(actions: &[Action]) -> Vec<String> {
    let name = |action: &Action| {
        Some(match action {
            Action::Tell(_) => return None,
            Action::Send(Message::RoundAck { round }) => format!("acknowledge {round}"),
            Action::Send(message) => format!("send {:?}", message.kind()).to_lowercase(),
            Action::Prepare(_) => "prepare".into(),
            Action::Accept { channels } => format!("accept {channels}"),
            Action::Verify(digests) => format!("verify {}", digests.len()),
            Action::Load(sections) => format!("load {}", sections.len()),
            Action::Resume(_) => "resume".into(),
            Action::Claim => "claim".into(),
            Action::Answer(fate) => format!("answer {fate:?}").to_lowercase(),
            Action::FindGap => "find gap".into(),
            Action::End(End::Running(_)) => "running".into(),
            Action::End(End::NotReceived(_)) => "not received".into(),
            Action::End(End::Lost(_)) => "lost".into(),
        })
    };
    actions.iter().filter_map(name).collect()
}

pub(crate) fn every_message() -> Vec<Message> {
    let welcome = Welcome { version: 1, capabilities: 0, channels: 1, secret: [0; 16] };
    let message = |event| match event {
        Event::Message(message) => message,
        other => panic!("{other:?} is no message"),
    };
    vec![
        Message::Hello(hello()),
        Message::Welcome(welcome),
        Message::Describe(description()),
        Message::Accept(DestinationCosts::default()),
        Message::Refuse(Vec::new()),
        Message::Attach(Attach { session: [0; 16], secret: [0; 16], channel: 0 }),
        Message::Attached,
        Message::RoundAck { round: 0 },
        message(state(0)),
        message(state(1)),
        message(digests(0, 1)),
        Message::Ready { verify: MS, load: MS },
        Message::Mismatch { chunks: 1, samples: Vec::new() },
        Message::Commit,
        Message::Running { resume: MS },
        Message::Gap(None),
        Message::Lost(fault(Blame::Local)),
        Message::Ping(1),
        Message::Pong(1),
        Message::Query(Query { session: [0; 16], secret: [9; 16] }),
        Message::Outcome(Fate::Never),
        Message::Started { since_ready: Duration::ZERO },
    ]
}

pub(crate) fn in_turn(at: At, message: &Message) -> bool {
    matches!(
        (at, message),
        (AwaitingHello, Message::Hello(_))
            | (AwaitingDescription, Message::Describe(_))
            | (Receiving | LastRound, Message::State { .. } | Message::Digests { .. })
            | (Ready, Message::Commit)
    )
}
