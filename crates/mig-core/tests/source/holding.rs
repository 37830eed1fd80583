//! Hot pages that are held back, and what that makes of the rounds.

use mig_core::policy::{Decision, Policy, StopReason};
use mig_core::progress::{Progress, RoundReport};
use mig_core::source::{Action, Event, SourceConfig};
use mig_wire::Message;

use crate::way::*;

/// What a round is told to hold back, and its report of the one before.
fn held_back(actions: &[Action]) -> u64 {
    let held = |action: &Action| match action {
        Action::SendRound { hold_back_pages, .. } => Some(*hold_back_pages),
        _ => None,
    };
    actions.iter().find_map(held).expect("a round")
}

fn told(actions: &[Action]) -> &RoundReport {
    match actions.first() {
        Some(Action::Tell(Progress::Round(round))) => round,
        other => panic!("{other:?}"),
    }
}

/// A round of 100 ms that sent so many pages and left so many, so many of them hot.
fn round(run: &mut Run, round: u32, sent_pages: u64, dirty_pages: u64, hot_pages: u64) -> Vec<Action> {
    run.tell_after(98 * MS, sent(sent_pages));
    run.hear(Message::RoundAck { round });
    run.tell(Event::Synced { dirty_pages, hot_pages })
}

#[test]
fn pages_that_are_dirty_in_every_round_are_held_back_up_to_half_of_what_fits_the_pause() {
    let policy = Policy { downtime_limit: 60 * MS, traffic_factor: 100, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, ..config() });
    let first = run.tell(Event::Synced { dirty_pages: 100_000, hot_pages: 0 });
    assert_eq!(held_back(&first), 0);
    let second = round(&mut run, 1, 4096, 4096, 4096);
    let held = held_back(&second);
    assert_eq!(told(&second).decision, Decision::HoldBack { pages: held });
    // 4096 pages in 99 ms; 4 ms and some messages are no pages
    assert!((1130..1180).contains(&held), "half of the limit, {held}");
    let third = round(&mut run, 2, 4096 - held, 3000, 3000);
    assert_eq!((told(&third).held_pages, told(&third).dirtied_pages), (held, 3000));
    assert!(held_back(&third) > 0, "it goes on");
    let few_hot = round(&mut run, 3, 2000, 2500, 7);
    assert_eq!(held_back(&few_hot), 7, "no more than are hot");
    let fits = round(&mut run, 4, 2493, 1000, 900);
    assert_eq!(told(&fits).decision, Decision::SwitchOver(StopReason::WithinBudget));
    assert_eq!(names(&fits), ["pause"]);
}

#[test]
fn what_the_pause_takes_besides_pages_leaves_room_for_fewer_that_are_held_back() {
    let policy = Policy { downtime_limit: 60 * MS, traffic_factor: 100, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, verify_cost: 40 * MS, ..config() });
    run.tell(Event::Synced { dirty_pages: 100_000, hot_pages: 0 });
    assert_eq!(held_back(&round(&mut run, 1, 4096, 4096, 4096)), 0, "too few to be worth it");
}

#[test]
fn what_is_held_back_is_not_what_the_guest_dirtied_meanwhile() {
    let policy = Policy { downtime_limit: 60 * MS, traffic_factor: 100, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, ..config() });
    run.tell(Event::Synced { dirty_pages: 100_000, hot_pages: 0 });
    let held = held_back(&round(&mut run, 1, 4096, 4096, 4096));
    let next = round(&mut run, 2, 4096 - held, held + 1000, held);
    // 1000 in the 100 ms from the start of the round to the sync
    assert_eq!(told(&next).dirty_pages_per_second, 10_000);
    assert_eq!(told(&next).dirtied_pages, held + 1000, "both remain");
}
