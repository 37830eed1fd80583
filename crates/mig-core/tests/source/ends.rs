//! Cancels, failures and words out of turn at every stage.

use mig_core::progress::OutcomeKind;
use mig_core::source::Event;
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;

use super::way::*;

#[test]
fn a_cancel_before_commit_leaves_the_guest_here_running_and_untracked_and_the_peer_told() {
    for (at, _) in way().into_iter().filter(|(at, _)| *at < Committed) {
        let mut run = Run::at(at);
        let actions = run.tell(Event::Cancelled { reason: None });
        let (outcome, all) = outcome(&mut run, actions);
        assert_eq!(outcome, OutcomeKind::StillHere, "{at:?}");
        let did = |what: &str| all.iter().filter(|name| *name == what).count();
        assert_eq!(did("resume"), usize::from(at >= Pausing), "{at:?}");
        assert_eq!(did("stop tracking"), usize::from(at >= StartingLog), "{at:?}");
        assert_eq!(did("send abort"), usize::from(at >= Greeting), "{at:?}");
        assert_eq!(did("commit"), 0);
    }
}

#[test]
fn a_cancel_after_commit_is_too_late() {
    for at in [Committed, AwaitingGap] {
        let mut run = Run::at(at);
        assert!(run.machine.is_committed());
        assert!(run.tell(Event::Cancelled { reason: None }).is_empty());
        assert!(!run.machine.has_ended());
    }
}

#[test]
fn a_failure_before_commit_leaves_the_guest_here_and_after_it_nobody_knows_until_the_peer_said_running() {
    for blame in [Blame::Local, Blame::Network, Blame::Peer, Blame::Configuration] {
        for (at, _) in way() {
            let mut run = Run::at(at);
            let actions = run.tell(Event::Failed(fault(blame, Step::Track)));
            if at == Committed {
                assert_eq!(names(&actions), ["stop tracking", "query after 0ns"], "{blame:?}");
                assert!(run.machine.is_in_doubt());
                continue;
            }
            let (outcome, all) = outcome(&mut run, actions);
            let expected = match at {
                AwaitingGap => OutcomeKind::Moved,
                _ => OutcomeKind::StillHere,
            };
            assert_eq!(outcome, expected, "{at:?} {blame:?}");
            let resumed = all.contains(&"resume".to_owned());
            assert_eq!(resumed, (Pausing..Committed).contains(&at), "{at:?} {blame:?}");
        }
    }
}

#[test]
fn every_message_out_of_turn_ends_it_on_the_safe_side_and_is_blamed_on_the_peer() {
    for (at, _) in way() {
        for message in every_message().into_iter().filter(|message| !in_turn(at, message)) {
            let mut run = Run::at(at);
            let actions = run.hear(message.clone());
            if at == Committed {
                assert!(run.machine.is_in_doubt() && !names(&actions).contains(&"resume".into()));
                continue;
            }
            let (outcome, _) = outcome(&mut run, actions);
            let expected = match at {
                AwaitingGap => OutcomeKind::Moved,
                _ => OutcomeKind::StillHere,
            };
            assert_eq!(outcome, expected, "{at:?} {message:?}");
        }
    }
    let mut run = Run::at(Copying);
    let actions = run.hear(Message::Commit);
    assert_eq!(names(&actions), ["send abort", "stop tracking", "still-here"]);
    let fault = report(&actions).fault.as_ref().unwrap();
    assert_eq!((fault.blame, fault.step), (Blame::Peer, Step::Round(0)));
    assert!(fault.cause.ends_with("out of turn"), "{}", fault.cause);
}

#[test]
fn an_abort_of_the_peer_s_brings_the_guest_back_even_after_commit_and_is_not_answered() {
    for (at, _) in way().into_iter().filter(|(at, _)| *at < AwaitingGap) {
        let mut run = Run::at(at);
        let theirs = Fault::new(Side::Destination, Step::Load, Blame::Local, "no room");
        let actions = run.hear(Message::Abort(theirs));
        let (outcome, all) = outcome(&mut run, actions);
        assert_eq!(outcome, OutcomeKind::StillHere, "{at:?}");
        assert_eq!(all.contains(&"resume".into()), at >= Pausing, "{at:?}");
        assert!(!all.contains(&"send abort".into()), "{at:?}");
    }
}

#[test]
fn an_abort_after_running_does_not_undo_the_move() {
    let mut run = Run::at(AwaitingGap);
    assert!(run.hear(Message::Abort(fault(Blame::Local, Step::Resume))).is_empty());
    let actions = run.tell(Event::Failed(fault(Blame::Network, Step::Commit)));
    assert_eq!(names(&actions), ["moved"]);
    assert_eq!(report(&actions).guest_gap, None);
}
