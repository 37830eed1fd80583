//! The destination's machine, event by event.

use std::time::Duration;

use mig_core::destination::{Action, Destination, End, Event, Received};
use mig_core::progress::Progress;
use mig_core::{Blame, Claim, Fault, Side, Step, Word};
use mig_wire::Message;
use mig_wire::describe::{Description, Refusal, Region};
use mig_wire::frame::{DestinationCosts, Fate};
use mig_wire::hello::{Attach, Capabilities, Hello, Query, Welcome};
use mig_wire::section::Section;

const MS: Duration = Duration::from_millis(1);
/// Two channels, and a guest of four chunks.
const CHANNELS: u16 = 2;
const CHUNKS: u64 = 4;

fn hello() -> Hello {
    Hello { version_min: 1, version_max: 1, required: 1, optional: 0, channels: 2, session: [7; 16] }
}

fn description() -> Box<Description> {
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

fn state(round: u32) -> Event {
    let section =
        Section { name: "cpu".into(), instance: 0, version: 1, critical: true, body: vec![1, 2, 3] };
    Event::Message(Message::State { round, sections: vec![section] })
}

fn digests(first_chunk: u64, count: u64) -> Event {
    let digests = (first_chunk..first_chunk + count).collect();
    Event::Message(Message::Digests { first_chunk, digests })
}

fn ended(round: u32) -> Event {
    Event::ChannelEnded { round }
}

fn fault(blame: Blame) -> Fault {
    Fault::new(Side::Destination, Step::Track, blame, "it broke")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum At {
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

use At::*;

/// The stages of a receive that goes well, each with the events that lead on to the next.
fn way() -> Vec<(At, Vec<Event>)> {
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
        (Resuming, vec![Event::Resumed]),
        (FindingGap, vec![Event::Gap(Some(MS))]),
    ]
}

struct Run {
    machine: Destination,
    now: Duration,
}

impl Run {
    fn new() -> Self {
        Self { machine: Destination::new([9; 16], CHANNELS, None), now: Duration::ZERO }
    }

    fn at(stage: At) -> Self {
        Self::new().on_to(stage, &hello())
    }

    fn without_verify(stage: At) -> Self {
        Self::new().on_to(stage, &Hello { required: 0, ..hello() })
    }

    fn on_to(mut self, stage: At, hello: &Hello) -> Self {
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

    fn tell(&mut self, event: Event) -> Vec<Action> {
        self.now += MS;
        let (machine, actions) = self.machine.clone().handle(self.now, event);
        self.machine = machine;
        actions
    }

    fn hear(&mut self, message: Message) -> Vec<Action> {
        self.tell(Event::Message(message))
    }
}

/// What a list of actions does, without what it tells observers.
fn names(actions: &[Action]) -> Vec<String> {
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

fn every_message() -> Vec<Message> {
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
    ]
}

fn in_turn(at: At, message: &Message) -> bool {
    matches!(
        (at, message),
        (AwaitingHello, Message::Hello(_))
            | (AwaitingDescription, Message::Describe(_))
            | (Receiving | LastRound, Message::State { .. } | Message::Digests { .. })
            | (Ready, Message::Commit)
    )
}

#[test]
fn a_receive_that_goes_well_acts_in_this_order() {
    let mut run = Run::new();
    let mut all = Vec::new();
    for (_, events) in way() {
        for event in events {
            all.extend(names(&run.tell(event)));
        }
    }
    assert_eq!(
        all,
        [
            "send welcome",
            "prepare",
            "accept 2",
            "send accept",
            "acknowledge 0",
            "acknowledge 1",
            "verify 4",
            "load 1",
            "send ready",
            "resume",
            "send running",
            "find gap",
            "send gap",
            "running"
        ]
    );
    assert!(run.machine.has_ended());
}

#[test]
fn it_reports_rounds_and_what_verify_load_and_resume_took() {
    let mut run = Run::at(FindingGap);
    let actions = run.tell(Event::Gap(Some(7 * MS)));
    let Some(Action::End(End::Running(received))) = actions.last() else { panic!("{actions:?}") };
    let expected = Received { rounds: 2, verify: MS, load: MS, resume: MS, guest_gap: Some(7 * MS) };
    assert_eq!(*received, expected);
}

/// All orders of the things that complete the last round; digests among themselves stay in order.
fn orders(left: Vec<Event>) -> Vec<Vec<Event>> {
    if left.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for at in 0..left.len() {
        let mut rest = left.clone();
        let first = rest.remove(at);
        if first == digests(1, 3) && rest.contains(&digests(0, 1)) {
            continue;
        }
        all.extend(orders(rest).into_iter().map(|mut order| {
            order.insert(0, first.clone());
            order
        }));
    }
    all
}

#[test]
fn state_digests_and_the_ends_of_the_last_round_may_come_in_any_order() {
    let all = orders(vec![ended(1), ended(1), state(1), digests(0, 1), digests(1, 3)]);
    assert_eq!(all.len(), 60);
    for order in all {
        let mut run = Run::at(LastRound);
        let mut ends = 0;
        let last = order.len() - 1;
        for (at, event) in order.iter().enumerate() {
            let mut expected = Vec::new();
            if *event == ended(1) {
                ends += 1;
                if ends == CHANNELS {
                    expected.push("acknowledge 1");
                }
            }
            if at == last {
                expected.push("verify 4");
            }
            assert_eq!(names(&run.tell(event.clone())), expected, "{order:?} at {at}");
        }
    }
}

#[test]
fn without_digests_state_and_the_ends_suffice_in_any_order() {
    for order in orders(vec![ended(1), ended(1), state(1)]) {
        let mut run = Run::without_verify(Receiving);
        run.tell(ended(0));
        run.tell(ended(0));
        let all: Vec<String> = order.into_iter().flat_map(|event| names(&run.tell(event))).collect();
        assert_eq!(all, ["acknowledge 1", "load 1"]);
    }
}

#[test]
fn the_very_first_round_may_be_the_last() {
    let mut run = Run::without_verify(Receiving);
    let all: Vec<String> =
        [ended(0), ended(0), state(0)].into_iter().flat_map(|event| names(&run.tell(event))).collect();
    assert_eq!(all, ["acknowledge 0", "load 1"]);
}

#[test]
fn state_of_another_round_or_a_second_one_ends_it() {
    let wrong = [
        vec![state(2)],
        vec![state(u32::MAX)],
        vec![ended(1), state(0)],
        vec![state(1), state(1)],
        vec![state(0), state(1)],
        vec![ended(1), ended(1), state(3)],
    ];
    for events in wrong {
        let mut run = Run::at(LastRound);
        let all: Vec<String> = events.iter().flat_map(|event| names(&run.tell(event.clone()))).collect();
        assert_eq!(all.last().map(String::as_str), Some("not received"), "{events:?}");
        assert!(!all.iter().any(|name| name.starts_with("load")), "{events:?}");
    }
}

#[test]
fn the_end_of_another_round_or_one_after_the_last_ends_it() {
    for events in [vec![ended(0)], vec![ended(2)], vec![state(1), ended(1), ended(1), ended(1)]] {
        let mut run = Run::at(LastRound);
        let all: Vec<String> = events.iter().flat_map(|event| names(&run.tell(event.clone()))).collect();
        assert!(all.ends_with(&["send abort".into(), "not received".into()]), "{events:?}: {all:?}");
    }
}

#[test]
fn digests_out_of_order_too_many_or_not_asked_for_end_it() {
    let wrong = [
        vec![digests(1, 1)],
        vec![digests(0, 2), digests(1, 1)],
        vec![digests(0, 2), digests(3, 1)],
        vec![digests(0, 5)],
        vec![digests(0, 4), digests(4, 1)],
    ];
    for events in wrong {
        let mut run = Run::at(LastRound);
        let all: Vec<String> = events.iter().flat_map(|event| names(&run.tell(event.clone()))).collect();
        assert_eq!(all, ["send abort", "not received"], "{events:?}");
    }
    let mut run = Run::without_verify(Receiving);
    assert_eq!(names(&run.tell(digests(0, 1))), ["send abort", "not received"]);
}

#[test]
fn a_cancel_before_commit_ends_it_with_a_promise_and_after_it_does_nothing() {
    for (at, _) in way() {
        let mut run = Run::at(at);
        let actions = names(&run.tell(Event::Cancelled { reason: None }));
        let expected: &[&str] = if at < Resuming { &["send abort", "not received"] } else { &[] };
        assert_eq!(actions, expected, "{at:?}");
    }
}

#[test]
fn a_failure_here_before_commit_is_a_promise_and_after_it_the_guest_is_lost_unless_it_runs() {
    for (at, _) in way() {
        let mut run = Run::at(at);
        let actions = names(&run.tell(Event::Failed(fault(Blame::Local))));
        let expected: &[&str] = match at {
            Resuming => &["send lost", "lost"],
            FindingGap => &[],
            _ => &["send abort", "not received"],
        };
        assert_eq!(actions, expected, "{at:?}");
    }
}

#[test]
fn a_lost_link_discards_what_is_not_complete_and_holds_what_may_be_the_last_copy() {
    for (at, _) in way() {
        let mut run = Run::at(at);
        let actions = names(&run.tell(Event::Failed(fault(Blame::Network))));
        let expected: &[&str] = match at {
            Ready | Resuming | FindingGap => &[],
            _ => &["send abort", "not received"],
        };
        assert_eq!(actions, expected, "{at:?}");
        assert_eq!(run.machine.is_in_doubt(), at == Ready);
    }
}

fn held(mut run: Run) -> Run {
    let actions = run.tell(Event::Failed(fault(Blame::Network)));
    assert!(matches!(&actions[..], [Action::Tell(Progress::InDoubt { asked: 0, .. })]), "{actions:?}");
    run
}

fn arbitrated(stage: At) -> Run {
    let mut run = Run { machine: Destination::new([9; 16], CHANNELS, Some([5; 16])), now: Duration::ZERO };
    let required = (Capabilities::VERIFY | Capabilities::ARBITER).bits();
    for (at, events) in way().into_iter().take_while(|(at, _)| *at != stage) {
        match at {
            AwaitingHello => drop(run.hear(Message::Hello(Hello { required, ..hello() }))),
            AwaitingDescription => {
                let actions = run.hear(described_with(Some([5; 16])));
                assert!(
                    matches!(&actions[..], [Action::Prepare(d)] if **d == *description()),
                    "the arbiter is no business of an embedder's: {actions:?}"
                );
            }
            _ => events.into_iter().for_each(|event| drop(run.tell(event))),
        }
    }
    run
}

fn described_with(arbiter: Option<[u8; 16]>) -> Message {
    let mut described = description();
    described.platform.extend(arbiter.map(|id| Section {
        name: "mig.arbiter".into(),
        instance: 0,
        version: 1,
        critical: true,
        body: id.to_vec(),
    }));
    Message::Describe(described)
}

#[test]
fn a_query_before_commit_is_answered_with_a_promise_that_is_kept_and_after_it_with_the_truth() {
    for (at, _) in way() {
        let mut run = Run::at(at);
        let actions = names(&run.tell(Event::Query));
        let expected: &[&str] = match at {
            Resuming => &["answer unknown"],
            FindingGap => &["answer running { resume: 1ms, running_for: 1ms }"],
            _ => &["answer never", "not received"],
        };
        assert_eq!(actions, expected, "{at:?}");
        if at < Resuming {
            for (_, events) in way() {
                for event in events {
                    assert!(run.tell(event).is_empty(), "{at:?}: what comes after the promise meets nobody");
                }
            }
        }
    }
}

#[test]
fn a_held_copy_is_given_up_to_a_source_that_asks_and_otherwise_obeys_the_operator_alone() {
    let mut run = held(Run::at(Ready));
    assert_eq!(names(&run.tell(Event::Query)), ["answer never", "not received"]);
    let mut run = held(Run::at(Ready));
    assert_eq!(names(&run.tell(Event::Resolve(Word::Resume))), ["resume"]);
    assert_eq!(names(&run.tell(Event::Resumed)), ["send running", "find gap"]);
    let mut run = held(Run::at(Ready));
    assert_eq!(names(&run.tell(Event::Resolve(Word::Discard))), ["not received"]);
    let mut run = held(Run::at(Ready));
    assert_eq!(names(&run.hear(Message::Abort(fault(Blame::Local)))), ["not received"], "it ended there");
    let others = way().into_iter().flat_map(|(_, events)| events);
    let others = others.chain([
        Event::Cancelled { reason: None },
        Event::Failed(fault(Blame::Local)),
        Event::Failed(fault(Blame::Peer)),
        Event::Claimed(Claim::Granted),
    ]);
    for event in others {
        let mut run = held(Run::at(Ready));
        assert!(run.tell(event.clone()).is_empty() && run.machine.is_in_doubt(), "{event:?}");
    }
}

#[test]
fn an_operators_word_means_nothing_to_a_receive_that_is_not_in_doubt() {
    for (at, _) in way() {
        for word in [Word::Resume, Word::Discard] {
            let mut run = Run::at(at);
            assert!(run.tell(Event::Resolve(word)).is_empty(), "{at:?}");
        }
    }
}

#[test]
fn with_an_arbiter_commit_runs_the_guest_once_it_is_granted_and_else_is_a_promise() {
    let unavailable = || Claim::Unavailable("stale handle".into());
    for (claim, does) in [
        (Claim::Granted, &["resume"][..]),
        (Claim::Denied, &["send abort", "not received"]),
        (unavailable(), &["send abort", "not received"]),
    ] {
        let mut run = arbitrated(Ready);
        assert_eq!(names(&run.hear(Message::Commit)), ["claim"]);
        assert!(run.tell(Event::Failed(fault(Blame::Network))).is_empty(), "it is too late for the link");
        assert_eq!(names(&run.tell(Event::Claimed(claim.clone()))), does, "{claim:?}");
    }
    let mut run = arbitrated(Ready);
    run.hear(Message::Commit);
    assert_eq!(names(&run.tell(Event::Query)), ["answer never", "not received"]);
    assert!(run.tell(Event::Claimed(Claim::Granted)).is_empty(), "a promise is kept, granted or not");
}

#[test]
fn an_operators_word_on_a_held_copy_is_checked_by_the_arbiter_and_stands_where_that_is_gone() {
    let mut run = held(arbitrated(Ready));
    assert_eq!(names(&run.tell(Event::Resolve(Word::Resume))), ["claim"]);
    let actions = run.tell(Event::Claimed(Claim::Denied));
    assert!(matches!(&actions[..], [Action::Tell(Progress::WordRefused { .. })]), "{actions:?}");
    assert!(run.machine.is_in_doubt());
    assert_eq!(names(&run.tell(Event::Resolve(Word::Resume))), ["claim"]);
    assert_eq!(names(&run.tell(Event::Claimed(Claim::Unavailable("gone".into())))), ["resume"]);
}

#[test]
fn an_arbiter_on_one_side_only_or_another_one_is_refused_by_name() {
    let refused = |actions: &[Action]| match actions {
        [Action::Send(Message::Refuse(refusals)), Action::End(End::NotReceived(_))] => {
            refusals.iter().map(|r| r.what.clone()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let mut without = Run::new();
    let required = Capabilities::ARBITER.bits();
    assert_eq!(refused(&without.hear(Message::Hello(Hello { required, ..hello() }))), ["arbiter"]);
    let mut with = arbitrated(AwaitingHello);
    assert_eq!(refused(&with.hear(Message::Hello(hello()))), ["arbiter"]);
    for id in [None, Some([6; 16])] {
        let mut other = arbitrated(AwaitingDescription);
        assert_eq!(refused(&other.hear(described_with(id))), ["arbiter"]);
    }
    let mut unasked = Run::at(AwaitingDescription);
    assert_eq!(refused(&unasked.hear(described_with(Some([5; 16])))), ["arbiter"]);
}

#[test]
fn a_copy_that_is_held_in_doubt_refuses_a_late_commit() {
    let mut run = Run::at(Ready);
    run.tell(Event::Failed(fault(Blame::Network)));
    assert!(run.hear(Message::Commit).is_empty());
    let mut run = Run::at(Ready);
    run.tell(Event::Cancelled { reason: None });
    assert!(run.hear(Message::Commit).is_empty());
}

#[test]
fn every_message_out_of_turn_before_commit_ends_it_and_cannot_undo_a_resume() {
    for (at, _) in way() {
        for message in every_message().into_iter().filter(|message| !in_turn(at, message)) {
            let mut run = Run::at(at);
            let actions = run.hear(message.clone());
            if at >= Resuming {
                assert!(actions.is_empty() && !run.machine.has_ended(), "{at:?} {message:?}");
                continue;
            }
            assert_eq!(names(&actions), ["send abort", "not received"], "{at:?} {message:?}");
            let Some(Action::End(End::NotReceived(fault))) = actions.last() else { unreachable!() };
            assert_eq!((fault.side, fault.blame), (Side::Destination, Blame::Peer));
        }
    }
}

#[test]
fn an_abort_of_the_source_s_ends_it_without_an_answer_unless_it_has_committed() {
    for (at, _) in way() {
        let mut run = Run::at(at);
        let theirs = Fault::new(Side::Source, Step::Pause, Blame::Configuration, "cancelled");
        let actions = run.hear(Message::Abort(theirs.clone()));
        if at >= Resuming {
            assert!(actions.is_empty());
        } else {
            assert_eq!(names(&actions), ["not received"], "{at:?}");
            let [Action::End(End::NotReceived(fault))] = actions.as_slice() else { unreachable!() };
            assert_eq!(*fault, theirs, "the source's own words");
        }
    }
}

#[test]
fn a_hello_that_will_not_do_is_refused_with_every_reason_at_once() {
    let mut run = Run::new();
    let hello = Hello { version_min: 5, version_max: 9, required: 1 << 40, channels: 0, ..hello() };
    let actions = run.hear(Message::Hello(hello));
    assert_eq!(names(&actions), ["send refuse", "not received"]);
    let Some(Action::Send(Message::Refuse(refusals))) = actions.first() else { unreachable!() };
    let what: Vec<&str> = refusals.iter().map(|refusal| refusal.what.as_str()).collect();
    assert_eq!(what, ["version", "capability", "channels"]);
    assert!(refusals[0].cause.contains("5 to 9") && refusals[0].cause.contains("1 to 1"));
    assert!(refusals[1].cause.contains("bit 40"));
}

#[test]
fn memory_that_makes_no_sense_is_refused_before_anything_is_prepared() {
    for regions in [vec![], vec![Region { guest_address: 5, bytes: 4096 }]] {
        let mut run = Run::at(AwaitingDescription);
        let described = Message::Describe(Box::new(Description { regions, ..*description() }));
        assert_eq!(names(&run.hear(described)), ["send refuse", "not received"]);
    }
}

#[test]
fn a_guest_that_cannot_be_made_is_refused_with_every_reason() {
    let mut run = Run::at(Preparing);
    let reasons = vec![Refusal::new("memory", "too much", ""), Refusal::new("vcpus", "too many", "fewer")];
    let actions = run.tell(Event::Refused(reasons.clone()));
    let [Action::Send(Message::Refuse(sent)), Action::End(End::NotReceived(fault))] = actions.as_slice()
    else {
        panic!("{actions:?}")
    };
    assert_eq!(*sent, reasons);
    assert!(fault.cause.contains("memory: too much") && fault.cause.contains("vcpus: too many"));
    let mut run = Run::at(Ready);
    assert!(run.tell(Event::Refused(reasons)).is_empty(), "only what is being prepared can be refused");
}

#[test]
fn it_grants_no_more_channels_than_it_has_or_was_asked_for() {
    for (asked, granted) in [(1, 1), (2, 2), (64, 2)] {
        let mut run = Run::new();
        let actions = run.hear(Message::Hello(Hello { channels: asked, ..hello() }));
        let Some(Action::Send(Message::Welcome(welcome))) = actions.first() else { panic!("{actions:?}") };
        assert_eq!((welcome.channels, welcome.secret, welcome.capabilities), (granted, [9; 16], 1));
    }
}

#[test]
fn unknown_optional_capabilities_are_left_out_of_the_welcome() {
    let mut run = Run::new();
    let actions = run.hear(Message::Hello(Hello { required: 0, optional: !0, ..hello() }));
    let Some(Action::Send(Message::Welcome(welcome))) = actions.first() else { panic!("{actions:?}") };
    assert_eq!(welcome.capabilities, 1);
}

#[test]
fn memory_that_differs_ends_it_with_samples_and_is_never_run() {
    let mut run = Run::at(Verifying);
    let actions = run.tell(Event::Differs { chunks: 1, samples: Vec::new() });
    assert_eq!(names(&actions), ["send mismatch", "not received"]);
    assert!(run.hear(Message::Commit).is_empty());
}

#[test]
fn events_that_come_too_late_for_an_action_given_up_do_nothing() {
    for at in [Preparing, Verifying, Loading] {
        let mut run = Run::at(at);
        run.tell(Event::Cancelled { reason: None });
        for event in [
            Event::Prepared(DestinationCosts::default()),
            Event::Verified,
            Event::Loaded,
            Event::Resumed,
            Event::Gap(None),
        ] {
            assert!(run.tell(event).is_empty(), "{at:?}");
        }
    }
}
