//! Copies that wait for a word: a source that asks, an arbiter, an operator.

use std::time::Duration;

use mig_core::destination::{Action, Destination, End, Event};
use mig_core::progress::Progress;
use mig_core::{Blame, Claim, Word};
use mig_wire::Message;
use mig_wire::hello::{Capabilities, Hello};
use mig_wire::section::Section;

use super::way::*;

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
    assert_eq!(names(&run.tell(Event::Resumed { at: None })), ["send running", "find gap"]);
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
