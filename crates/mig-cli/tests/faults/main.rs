//! Every named fault point of a migration between real programs, and every fault there. After each, guests are
//! counted by their heartbeats: never two, and one wherever the design says so.

#![allow(missing_docs, unreachable_pub)]

mod census;
mod crowd;
mod cuts;
mod ending;
mod frozen;
mod hosts;
mod killed;
mod pair;
#[path = "../support/mod.rs"]
mod support;
mod table;

use mig::fault_points::Point;
use pair::{Pair, Side, always_reached};
use serde_json::Value;
use support::{kvm_is_there, mig_recv, mig_send};

#[test]
fn a_migration_reaches_every_point() {
    if !kvm_is_there() {
        return;
    }
    let mut pair = Pair::start(&[], None);
    pair.settle(Side::Source, &[pair::Whereabouts::Moved]);
    pair.settle(Side::Destination, &[pair::Whereabouts::Runs]);
    let (source, destination): (Vec<Point>, Vec<Point>) =
        always_reached().into_iter().partition(|p| Side::of(*p) == Side::Source);
    assert_eq!(Side::BOTH.map(|s| pair.reached(s)), [source, destination]);
    pair.assert_never_two();
}

#[test]
fn whichever_side_is_killed_at_whichever_point_at_most_one_guest_runs_and_none_is_lost_with_the_other() {
    if kvm_is_there() {
        killed::at_every_point();
    }
}

#[test]
fn a_side_that_dies_in_a_rush_leaves_at_most_one_guest() {
    if kvm_is_there() {
        killed::by_its_own_hand_at_every_point();
    }
}

#[test]
fn however_the_link_is_cut_and_healed_exactly_one_guest_runs_in_the_end() {
    if kvm_is_there() && hosts::are_there() {
        cuts::at_every_point();
    }
}

#[test]
fn whoever_is_killed_in_doubt_the_other_side_asks_on_or_keeps_its_copy() {
    if kvm_is_there() && hosts::are_there() {
        cuts::and_one_side_killed_in_doubt();
    }
}

#[test]
fn an_answer_that_is_lost_is_asked_for_again() {
    if kvm_is_there() && hosts::are_there() {
        cuts::again_in_doubt();
    }
}

#[test]
fn a_side_that_hangs_and_comes_back_makes_no_second_guest() {
    if kvm_is_there() {
        frozen::at_every_point();
    }
}

#[test]
fn an_unknown_point_is_refused_before_anything_is_started() {
    for mut command in [mig_send(), mig_recv()] {
        let said = command.arg("--json").env("MIG_FAULT", "source.nowhere:kill").output().unwrap();
        let event: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!((said.status.code(), &event["event"]), (Some(2), &"error".into()), "{event}");
        assert!(event["cause"].as_str().unwrap().contains("source.committing"), "{event}");
    }
}
