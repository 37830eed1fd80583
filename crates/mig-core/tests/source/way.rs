//! A machine brought to any stage of a migration, and what it did in words.

use std::time::Duration;

use mig_core::policy::Policy;
use mig_core::progress::{OutcomeKind, PageCounts, Report};
use mig_core::source::{Action, Event, Source, SourceConfig};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::describe::{Description, Refusal, Region};
use mig_wire::frame::{DestinationCosts, Fate};
use mig_wire::hello::{Attach, Capabilities, Hello, Query, Welcome};

pub(crate) const MS: Duration = Duration::from_millis(1);

pub(crate) fn config() -> SourceConfig {
    SourceConfig {
        policy: Policy::default(),
        channels: 2,
        suited_channels: false,
        page_encodings: Capabilities::empty(),
        verify: true,
        session: [7; 16],
        arbiter: None,
        description: description(),
        ram_bytes: 16 << 20,
        pause_bytes_per_second: None,
        can_throttle: false,
        pause: MS,
        save: MS,
        verify_cost: MS,
    }
}

pub(crate) fn description() -> Description {
    Description {
        architecture: "x86_64".into(),
        page_bytes: 4096,
        vcpus: 1,
        regions: vec![Region { guest_address: 0, bytes: 16 << 20 }],
        boot_id: None,
        schemas: Vec::new(),
        platform: Vec::new(),
    }
}

pub(crate) fn welcome() -> Welcome {
    Welcome { version: 1, capabilities: 1 + 8, channels: 2, secret: [9; 16] }
}

pub(crate) fn fault(blame: Blame, step: Step) -> Fault {
    Fault::new(Side::Source, step, blame, "it broke")
}

pub(crate) fn sent(raw: u64) -> Event {
    Event::RoundSent { pages: PageCounts { raw, ..PageCounts::default() }, bytes: raw * 4096 }
}

pub(crate) const READY: Message = Message::Ready { verify: Duration::ZERO, load: Duration::ZERO };
pub(crate) const RUNNING: Message = Message::Running { resume: Duration::ZERO };

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum At {
    Connecting,
    Greeting,
    Describing,
    Attaching,
    StartingLog,
    Copying,
    Measuring,
    Pausing,
    Saving,
    LastSync,
    LastRound,
    Arrived,
    Committed,
    AwaitingGap,
}

pub(crate) use At::*;

/// The stages of a migration that goes well, each with the events that lead on to the next.
pub(crate) fn way() -> Vec<(At, Vec<Event>)> {
    let hear = |message| vec![Event::Message(message)];
    let acknowledged = |round| Event::Message(Message::RoundAck { round });
    vec![
        (Connecting, vec![Event::Connected]),
        (Greeting, hear(Message::Welcome(welcome()))),
        (Describing, hear(Message::Accept(DestinationCosts::default()))),
        (Attaching, vec![Event::Attached]),
        (StartingLog, vec![Event::Tracking]),
        (Copying, vec![sent(4096), acknowledged(0)]),
        (Measuring, vec![Event::Synced { dirty_pages: 5, hot_pages: 0 }]),
        (Pausing, vec![Event::Paused]),
        (Saving, vec![Event::Saved]),
        (LastSync, vec![Event::Synced { dirty_pages: 5, hot_pages: 0 }]),
        (LastRound, vec![sent(5), acknowledged(1)]),
        (Arrived, hear(READY)),
        (Committed, hear(RUNNING)),
        (AwaitingGap, hear(Message::Gap(Some(MS)))),
    ]
}

/// A machine and its clock, which goes on by a millisecond an event.
pub(crate) struct Run {
    pub(crate) machine: Source,
    pub(crate) now: Duration,
}

impl Run {
    pub(crate) fn new(config: SourceConfig) -> Self {
        Self { machine: Source::new(config), now: Duration::from_secs(5) }
    }

    pub(crate) fn at(stage: At) -> Self {
        Self::up_to(stage, config())
    }

    pub(crate) fn up_to(stage: At, config: SourceConfig) -> Self {
        let mut run = Self::new(config);
        for (_, events) in way().into_iter().take_while(|(at, _)| *at != stage) {
            for event in events {
                run.tell(event);
            }
        }
        assert!(!run.machine.has_ended());
        run
    }

    pub(crate) fn resuming() -> Self {
        let mut run = Self::at(LastRound);
        assert_eq!(names(&run.tell(Event::Cancelled { reason: None })), ["resume", "send abort"]);
        run
    }

    pub(crate) fn tell(&mut self, event: Event) -> Vec<Action> {
        self.tell_after(MS, event)
    }

    pub(crate) fn tell_after(&mut self, time: Duration, event: Event) -> Vec<Action> {
        self.now += time;
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
            Action::Send(message) => format!("send {:?}", message.kind()).to_lowercase(),
            Action::Attach { channels, .. } => format!("attach {channels}"),
            Action::StartTracking => "start tracking".into(),
            Action::SendRound { round, .. } => format!("round {round}"),
            Action::Sync => "sync".into(),
            Action::Pause => "pause".into(),
            Action::Save => "save".into(),
            Action::SendLast { round, verify } => format!("last round {round} {verify}"),
            Action::Locate(_) => "locate".into(),
            Action::Commit(_) => "commit".into(),
            Action::Query { after } => format!("query after {after:?}"),
            Action::Claim => "claim".into(),
            Action::Resume(_) => "resume".into(),
            Action::Throttle(throttle) => format!("throttle {throttle}"),
            Action::StopTracking => "stop tracking".into(),
            Action::End(report) => report.outcome.name().into(),
        })
    };
    actions.iter().filter_map(name).collect()
}

pub(crate) fn report(actions: &[Action]) -> &Report {
    match actions.last() {
        Some(Action::End(report)) => report,
        other => panic!("no end, but {other:?}"),
    }
}

/// Carries on to the end where the guest is being resumed; the outcome.
pub(crate) fn outcome(run: &mut Run, actions: Vec<Action>) -> (OutcomeKind, Vec<String>) {
    let mut all = names(&actions);
    let mut last = actions;
    if !run.machine.has_ended() {
        last = run.tell(Event::Resumed);
        all.extend(names(&last));
    }
    (report(&last).outcome, all)
}

/// Every message there is, none of which is right at every stage.
pub(crate) fn every_message() -> Vec<Message> {
    let hello =
        Hello { version_min: 1, version_max: 1, required: 0, optional: 0, channels: 1, session: [0; 16] };
    vec![
        Message::Hello(hello),
        Message::Welcome(welcome()),
        Message::Describe(Box::new(description())),
        Message::Accept(DestinationCosts::default()),
        Message::Refuse(vec![Refusal::new("a", "b", "c")]),
        Message::Attach(Attach { session: [0; 16], secret: [0; 16], channel: 0 }),
        Message::Attached,
        Message::RoundAck { round: 0 },
        Message::RoundAck { round: 1 },
        Message::State { round: 0, sections: Vec::new() },
        Message::Digests { first_chunk: 0, digests: Vec::new() },
        READY,
        Message::Mismatch { chunks: 1, samples: Vec::new() },
        Message::Commit,
        RUNNING,
        Message::Gap(None),
        Message::Lost(fault(Blame::Local, Step::Resume)),
        Message::Ping(1),
        Message::Pong(1),
        Message::Query(Query { session: [7; 16], secret: [9; 16] }),
        Message::Outcome(Fate::Never),
        Message::Started { since_ready: Duration::ZERO },
    ]
}

pub(crate) fn in_turn(at: At, message: &Message) -> bool {
    matches!(
        (at, message),
        (Greeting, Message::Welcome(_) | Message::Refuse(_))
            | (Describing, Message::Accept(_) | Message::Refuse(_))
            | (Copying, Message::RoundAck { round: 0 })
            | (LastRound, Message::RoundAck { round: 1 })
            | (LastRound | Arrived, Message::Mismatch { .. })
            | (Arrived, Message::Ready { .. })
            | (Committed, Message::Running { .. } | Message::Lost(_))
            | (AwaitingGap, Message::Started { .. } | Message::Gap(_))
    )
}
