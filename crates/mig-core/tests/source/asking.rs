//! In doubt: committed, and the destination's word is missing.

use std::time::Duration;

use mig_core::progress::{OutcomeKind, Progress};
use mig_core::source::{Action, Event, SourceConfig};
use mig_core::{Blame, Claim, Fault, Side, Step, Word};
use mig_wire::Message;
use mig_wire::frame::Fate;
use mig_wire::hello::Welcome;

use super::way::*;

/// A machine in doubt, and what it did as it came to that.
fn doubting(config: SourceConfig) -> (Run, Vec<Action>) {
    let mut run = Run::up_to(Committed, config);
    let actions = run.tell(Event::Failed(fault(Blame::Network, Step::Commit)));
    assert!(run.machine.is_in_doubt() && run.machine.is_committed());
    (run, actions)
}

fn plain() -> Run {
    doubting(config()).0
}

fn arbitrated_up_to(stage: At) -> Run {
    let mut run = Run::new(SourceConfig { arbiter: Some([5; 16]), verify: false, ..config() });
    for (at, events) in way().into_iter().take_while(|(at, _)| *at != stage) {
        if at == Greeting {
            let actions = run.hear(Message::Welcome(Welcome { capabilities: 2, ..welcome() }));
            let Some(Action::Send(Message::Describe(described))) = actions.last() else {
                panic!("{actions:?}")
            };
            assert_eq!(described.platform.last().map(|s| s.body.clone()), Some(vec![5; 16]));
            continue;
        }
        for event in events {
            run.tell(event);
        }
    }
    run
}

fn arbitrated() -> Run {
    let mut run = arbitrated_up_to(Committed);
    let actions = run.tell(Event::Failed(fault(Blame::Network, Step::Commit)));
    assert_eq!(names(&actions), ["stop tracking", "claim"], "the arbiter first: its grant needs nobody else");
    run
}

fn unanswered() -> Event {
    Event::Unanswered(fault(Blame::Network, Step::Connect))
}

fn ended(run: &mut Run, actions: &[Action]) -> OutcomeKind {
    if run.machine.has_ended() { report(actions).outcome } else { outcome(run, Vec::new()).0 }
}

#[test]
fn doubt_says_why_and_what_to_do_switches_the_log_off_and_asks_at_once() {
    let (_, actions) = doubting(config());
    assert_eq!(names(&actions), ["stop tracking", "query after 0ns"]);
    let told = actions.iter().find_map(|action| match action {
        Action::Tell(Progress::InDoubt { fault, asked: 0 }) => Some(fault),
        _ => None,
    });
    let fault = told.expect("an observer is told");
    assert_eq!(fault.cause, "it broke");
    assert!(fault.remedy.contains("resume here if it certainly does not"), "{}", fault.remedy);
}

#[test]
fn questions_in_vain_are_told_and_repeated_at_intervals_that_grow_to_five_seconds() {
    let mut run = plain();
    for (asked, after) in (1..).zip(["250ms", "500ms", "1s", "2s", "4s", "5s", "5s"]) {
        let event = if asked % 2 == 0 { unanswered() } else { Event::Answered(Fate::Unknown) };
        let actions = run.tell(event);
        assert_eq!(names(&actions), [format!("query after {after}")]);
        assert!(matches!(actions[0], Action::Tell(Progress::InDoubt { asked: told, .. }) if told == asked));
    }
}

#[test]
fn only_the_destinations_promise_its_word_that_it_runs_or_an_operators_word_ends_it() {
    let abort = Fault::new(Side::Destination, Step::Load, Blame::Local, "no room");
    let running = Fate::Running { resume: MS, running_for: MS };
    let ends: [(Event, &[&str], OutcomeKind); 6] = [
        (Event::Answered(Fate::Never), &["resume"], OutcomeKind::StillHere),
        (Event::Message(Message::Abort(abort)), &["resume"], OutcomeKind::StillHere),
        (Event::Resolve(Word::Resume), &["resume"], OutcomeKind::StillHere),
        (Event::Answered(running), &["moved"], OutcomeKind::Moved),
        (Event::Message(RUNNING), &["moved"], OutcomeKind::Moved),
        (Event::Resolve(Word::Discard), &["discarded"], OutcomeKind::Discarded),
    ];
    for (event, does, expected) in ends {
        let mut run = plain();
        let actions = run.tell(event.clone());
        assert_eq!(names(&actions), does, "{event:?}");
        assert_eq!(ended(&mut run, &actions), expected);
    }
    let in_vain = [
        Event::Answered(Fate::Unknown),
        Event::Answered(Fate::Lost),
        unanswered(),
        Event::Cancelled { reason: None },
        Event::Failed(fault(Blame::Local, Step::Resume)),
        Event::Claimed(Claim::Unavailable("gone".into())),
        Event::Resumed,
        Event::Synced { dirty_pages: 0, hot_pages: 0 },
    ];
    let heard = every_message().into_iter().filter(|m| !matches!(m, Message::Running { .. }));
    for event in in_vain.into_iter().chain(heard.map(Event::Message)) {
        let mut run = plain();
        let did = names(&run.tell(event.clone()));
        assert!(run.machine.is_in_doubt(), "{event:?}");
        assert!(did.iter().all(|what| what.starts_with("query")), "{event:?}: {did:?}");
    }
}

#[test]
fn a_guest_that_runs_there_is_reported_with_the_pause_up_to_its_first_instruction_there() {
    let mut run = plain();
    let asked_for = Duration::from_secs(100);
    let running = Fate::Running { resume: 2 * MS, running_for: asked_for };
    let actions = run.tell_after(asked_for + 7 * MS, Event::Answered(running));
    let downtime = report(&actions).downtime.unwrap();
    // a millisecond from the last pages to Ready, one to the lost link, seven to the guest running
    assert_eq!((downtime.commit, downtime.resume), (7 * MS, 2 * MS));
}

#[test]
fn a_destination_that_lost_the_guest_is_not_asked_again_and_an_operator_decides() {
    let lost = || Message::Lost(fault(Blame::Local, Step::Resume));
    let mut at_once = Run::at(Committed);
    assert_eq!(names(&at_once.hear(lost())), ["stop tracking"]);
    let mut later = plain();
    assert!(names(&later.tell(Event::Answered(Fate::Lost))).is_empty());
    let mut on_the_old_link = plain();
    assert!(names(&on_the_old_link.hear(lost())).is_empty());
    assert!(names(&on_the_old_link.tell(unanswered())).is_empty());
    for mut run in [at_once, later, on_the_old_link] {
        assert!(run.machine.is_in_doubt());
        assert_eq!(names(&run.tell(Event::Resolve(Word::Resume))), ["resume"]);
    }
}

#[test]
fn the_arbiter_s_grant_brings_the_guest_back_and_its_denial_leaves_the_question_to_the_peer() {
    let mut run = arbitrated();
    assert_eq!(names(&run.tell(Event::Claimed(Claim::Granted))), ["resume"]);
    assert_eq!(names(&run.tell(Event::Resumed)), ["still-here"]);

    let mut run = arbitrated();
    assert_eq!(names(&run.tell(Event::Claimed(Claim::Denied))), ["query after 0ns"]);
    assert_eq!(
        names(&run.tell(unanswered())),
        ["query after 250ms"],
        "what is denied once is denied for ever"
    );

    let mut run = arbitrated();
    let unavailable = || Event::Claimed(Claim::Unavailable("stale handle".into()));
    assert_eq!(names(&run.tell(unavailable())), ["query after 0ns"]);
    assert_eq!(names(&run.tell(unanswered())), ["claim"]);
    assert_eq!(names(&run.tell(unavailable())), ["query after 250ms"]);
}

#[test]
fn an_operator_who_is_wrong_is_refused_by_the_arbiter_and_one_whose_arbiter_is_gone_is_obeyed() {
    let mut run = arbitrated();
    assert!(names(&run.tell(Event::Resolve(Word::Resume))).is_empty(), "the claim is on its way");
    let actions = run.tell(Event::Claimed(Claim::Denied));
    assert!(actions.iter().any(|a| matches!(a, Action::Tell(Progress::WordRefused { .. }))));
    assert_eq!(names(&actions), ["query after 0ns"]);
    assert_eq!(names(&run.tell(Event::Resolve(Word::Resume))), ["claim"]);
    let gone = Event::Claimed(Claim::Unavailable("gone".into()));
    assert_eq!(names(&run.tell(gone)), ["resume"]);
}

/// Given up when the destination may hold all of the guest.
fn reclaiming() -> Run {
    let mut run = arbitrated_up_to(Arrived);
    let lost = Event::Failed(fault(Blame::Network, Step::LastRound));
    assert_eq!(names(&run.tell(lost)), ["claim"]);
    assert!(names(&run.tell(Event::Cancelled { reason: None })).is_empty(), "it is on its way back already");
    run
}

#[test]
fn with_an_arbiter_a_guest_that_was_all_sent_is_claimed_before_it_runs_on_so_that_a_held_copy_is_denied() {
    for claim in [Claim::Granted, Claim::Unavailable("gone".into())] {
        let mut run = reclaiming();
        assert_eq!(names(&run.tell(Event::Claimed(claim))), ["resume", "send abort"]);
        assert_eq!(names(&run.tell(Event::Resumed)), ["stop tracking", "still-here"]);
    }
    let mut run = reclaiming();
    let promise = Message::Abort(fault(Blame::Local, Step::Load));
    assert_eq!(names(&run.hear(promise)), ["resume"], "that is worth more than any arbiter");
}

/// Found by the model checker: an operator who was wrong had the destination run its copy, with the arbiter's
/// leave, and the source, which had not committed, then let its own run on.
#[test]
fn with_an_arbiter_a_guest_that_the_destination_was_told_to_run_before_commit_does_not_run_on_here() {
    let mut run = reclaiming();
    let denied = Event::Claimed(Claim::Denied);
    assert_eq!(names(&run.tell(denied)), ["stop tracking", "query after 0ns"]);
    assert!(run.machine.is_in_doubt());
    let running = Fate::Running { resume: MS, running_for: MS };
    assert_eq!(names(&run.tell(Event::Answered(running))), ["moved"]);
}

/// Found by the simulator: what the destination's Ready had told was counted twice.
#[test]
fn a_guest_that_ran_there_before_commit_is_reported_with_the_pause_that_it_had() {
    let mut run = arbitrated_up_to(Pausing);
    let ordered = run.now;
    for event in [Event::Paused, Event::Saved, Event::Synced { dirty_pages: 5, hot_pages: 0 }] {
        run.tell(event);
    }
    run.hear(Message::RoundAck { round: 1 });
    // its own channels have not yet told that all was sent
    run.hear(Message::Ready { verify: Duration::ZERO, load: MS });
    run.tell(Event::Failed(fault(Blame::Network, Step::LastRound)));
    run.tell(Event::Claimed(Claim::Denied));
    let actions = run.tell(Event::Answered(Fate::Running { resume: MS, running_for: MS }));
    let report = report(&actions);
    assert_eq!((report.outcome, report.rounds), (OutcomeKind::Moved, 2));
    assert_eq!(report.downtime.unwrap().total(), run.now - ordered - MS);
}

#[test]
fn a_copy_is_left_where_the_guest_goes_on_here_without_the_destinations_promise() {
    let lost = || Event::Failed(fault(Blame::Network, Step::LastRound));
    let ends = |mut run: Run, events: &[Event]| {
        for event in events {
            run.tell(event.clone());
        }
        assert_eq!(outcome(&mut run, Vec::new()).0, OutcomeKind::StillHere, "{events:?}");
        run.machine.left_a_copy()
    };
    let cancelled = || Event::Cancelled { reason: None };
    let abort = Event::Message(Message::Abort(fault(Blame::Local, Step::Load)));
    assert!(ends(Run::at(Arrived), &[lost()]));
    assert!(ends(Run::at(LastRound), &[cancelled()]));
    assert!(ends(plain(), &[Event::Resolve(Word::Resume)]));
    assert!(ends(arbitrated(), &[Event::Claimed(Claim::Granted)]));
    assert!(ends(reclaiming(), &[Event::Claimed(Claim::Granted)]));
    assert!(!ends(Run::at(Saving), &[cancelled()]), "it is not all there yet");
    assert!(!ends(Run::at(Arrived), &[abort]));
    assert!(!ends(plain(), &[Event::Answered(Fate::Never)]));

    let mut failed = Run::at(Arrived);
    failed.tell(lost());
    failed.tell(Event::Failed(fault(Blame::Local, Step::Resume)));
    assert!(failed.machine.has_ended());
    assert!(!failed.machine.left_a_copy(), "the copy may be the only one that can be run");
}
