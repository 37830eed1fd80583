//! The destination's machine, event by event.

mod doubt;
mod way;

use std::time::Duration;

use mig_core::destination::{Action, Destination, End, Event, Received};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::describe::{Description, Refusal, Region};
use mig_wire::frame::DestinationCosts;
use mig_wire::hello::Hello;

use way::*;

#[test]
fn a_start_is_timed_from_ready_to_the_guest_running_and_not_to_the_news_of_it() {
    let mut run = Run::new().on_to(Resuming, &Hello { optional: 8, ..hello() });
    // Commit came a millisecond after Ready, and the guest was found running 10 ms later, for 7 already
    run.now += 9 * MS;
    let actions = run.tell(Event::Resumed { at: Some(run.now - 6 * MS) });
    assert_eq!(names(&actions), ["send running", "send started", "find gap"]);
    let [Action::Send(running), Action::Send(started), ..] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(running, &Message::Running { resume: 3 * MS });
    assert_eq!(started, &Message::Started { since_ready: 4 * MS });
}

#[test]
fn channels_that_are_left_to_both_sides_are_as_many_as_suit_the_one_with_fewer() {
    for (optional, asked, granted) in [(0, 4, 4), (4, 4, 3), (4, 2, 2), (0, 200, 64)] {
        let machine = Destination::new([9; 16], 64, None).suited_channels(3);
        let hello = Message::Hello(Hello { optional, channels: asked, ..hello() });
        let (_, actions) = machine.handle(Duration::ZERO, Event::Message(hello));
        let Some(Action::Send(Message::Welcome(welcome))) = actions.first() else { panic!("{actions:?}") };
        assert_eq!(welcome.channels, granted, "asked for {asked}, optional {optional}");
        assert_eq!(welcome.capabilities, 1 | optional);
    }
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
    assert_eq!(welcome.capabilities, 0b11_1101, "all that it knows but an arbiter");
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
            Event::Resumed { at: None },
            Event::Gap(None),
        ] {
            assert!(run.tell(event).is_empty(), "{at:?}");
        }
    }
}
