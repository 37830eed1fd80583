//! A guest that is slowed so that rounds shrink, and has its speed back whatever becomes of it.

use mig_core::policy::{Decision, OnStall, Policy, StopReason, Throttle};
use mig_core::progress::Progress;
use mig_core::source::{Action, Event, SourceConfig};
use mig_core::{Blame, Step};
use mig_wire::Message;

use crate::way::*;

/// At the end of a round in which all of what was sent was dirtied again; so is what follows.
fn slowed(on_stall: OnStall) -> Run {
    let policy = Policy { downtime_limit: MS / 10, on_stall, traffic_factor: 10, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, can_throttle: true, ..config() });
    let actions = run.tell(Event::Synced { dirty_pages: 4096, hot_pages: 0 });
    assert_eq!(names(&actions), ["throttle 50 %", "round 1"]);
    run
}

fn round(run: &mut Run, round: u32, pages: u64) -> Vec<Action> {
    run.tell(sent(pages));
    run.hear(Message::RoundAck { round });
    run.tell(Event::Synced { dirty_pages: pages, hot_pages: 0 })
}

#[test]
fn a_guest_is_slowed_step_by_step_and_released_when_it_is_paused() {
    let mut run = slowed(OnStall::StopAndCopy);
    assert_eq!(names(&round(&mut run, 1, 4096)), ["throttle 75 %", "round 2"]);
    assert_eq!(names(&round(&mut run, 2, 4096)), ["throttle 80 %", "round 3"]);
    assert_eq!(names(&round(&mut run, 3, 4096)), ["round 4"], "a fifth it keeps");
    let actions = round(&mut run, 4, 4096);
    assert_eq!(names(&actions), ["pause"], "not faster before it stands");
    let Some(Action::Tell(Progress::Round(told))) = actions.first() else { panic!("{actions:?}") };
    assert_eq!(told.throttle, Throttle::of_percent(80));
    assert_eq!(told.decision, Decision::SwitchOver(StopReason::NoProgress));
    assert_eq!(names(&run.tell(Event::Paused)), ["throttle 0 %", "save"]);
    let mut actions = Vec::new();
    for (at, events) in way().into_iter().skip_while(|(at, _)| *at != Saving) {
        for event in events {
            let acknowledged = matches!(event, Event::Message(Message::RoundAck { .. }));
            let event = if acknowledged { Event::Message(Message::RoundAck { round: 5 }) } else { event };
            actions = run.tell(event);
            assert!(names(&actions).iter().all(|name| !name.starts_with("throttle")), "once: {at:?}");
        }
    }
    let report = report(&actions);
    let slowed = report.slowed.expect("it was");
    assert_eq!(slowed.most, Throttle::of_percent(80));
    // two rounds of 3 ms, then two and the pause
    assert_eq!((slowed.lasted, slowed.held), (13 * MS, (3 * MS * 50 + 3 * MS * 75 + 7 * MS * 80) / 100));
    let shortfall = report.shortfall.expect("the limit was not met");
    assert!(shortfall.could_slow_more && shortfall.met_limit > MS, "{shortfall:?}");
}

#[test]
fn a_guest_that_stays_is_released_before_anything_else_is_done() {
    let ends: [fn(&mut Run) -> Vec<Action>; 3] = [
        |run| run.tell(Event::Cancelled { reason: None }),
        |run| run.tell(Event::Failed(fault(Blame::Network, Step::Round(1)))),
        |run| run.hear(Message::Abort(fault(Blame::Local, Step::Round(1)))),
    ];
    for end in ends {
        let actions = end(&mut slowed(OnStall::StopAndCopy));
        assert_eq!(names(&actions)[0], "throttle 0 %", "{actions:?}");
        assert_eq!(report(&actions).slowed.unwrap().most, Throttle::of_percent(50));
    }
    let mut run = slowed(OnStall::Abort);
    (1..4).for_each(|n| drop(round(&mut run, n, 4096)));
    let actions = round(&mut run, 4, 4096);
    assert_eq!(names(&actions), ["throttle 0 %", "send abort", "stop tracking", "still-here"]);
}

#[test]
fn a_guest_that_was_not_busy_is_slowed_further_and_its_speed_is_told() {
    let policy = Policy { downtime_limit: MS / 10, traffic_factor: 10, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, can_throttle: true, ..config() });
    run.tell(Event::Busy { percent: 50 });
    run.tell(Event::Synced { dirty_pages: 4096, hot_pages: 0 });
    let mut last = 0;
    for n in 1..4 {
        run.tell(sent(4096));
        run.hear(Message::RoundAck { round: n });
        run.tell(Event::Busy { percent: 50 / (n as u8 + 1) });
        let actions = run.tell(Event::Synced { dirty_pages: 4096, hot_pages: 0 });
        if let Some(Action::Throttle(throttle)) = actions.iter().find(|a| matches!(a, Action::Throttle(_))) {
            last = throttle.percent();
        }
    }
    assert_eq!(last, 90, "a fifth of the half that it needs is kept");
    run.tell(Event::Busy { percent: 0 });
    let actions = run.tell(Event::Cancelled { reason: None });
    assert_eq!(
        report(&actions).slowed.unwrap().least_speed_percent,
        Some(24),
        "a round's, not what comes between"
    );
}

#[test]
fn a_guest_that_cannot_be_slowed_after_all_is_not_asked_again() {
    let mut run = slowed(OnStall::StopAndCopy);
    assert!(run.tell(Event::NotThrottled).is_empty());
    assert_eq!(names(&round(&mut run, 1, 4096)), ["round 2"]);
    assert_eq!(names(&round(&mut run, 2, 4096)), ["pause"]);
    assert_eq!(names(&run.tell(Event::Paused)), ["save"]);
}
