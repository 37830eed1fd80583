//! The simulator finds classic mistakes: each mutant of the drivers breaks what must hold, in its own way.

use mig_core::Side;
use mig_sim::{Mutant, Violation, simulate};

/// A mistake that needs more seeds than this is one that the simulator is blind to.
const SEEDS: u64 = 20_000;

fn found(mutant: Mutant, expected: impl Fn(&Violation) -> bool) {
    let mut others = Vec::new();
    for seed in 0..SEEDS {
        match simulate(seed, Some(mutant), false) {
            Err(violation) if expected(&violation) => {
                println!("{mutant:?}: seed {seed}: {violation}");
                return;
            }
            Err(violation) => others.push((seed, violation)),
            Ok(_) => {}
        }
    }
    panic!("{mutant:?} was not found in {SEEDS} seeds, but {:?}", others.first());
}

fn two_runners(violation: &Violation) -> bool {
    matches!(violation, Violation::TwoRunners { .. })
}

fn memory_differs(violation: &Violation) -> bool {
    matches!(violation, Violation::MemoryDiffers { .. })
}

#[test]
fn resuming_the_guest_when_commit_could_not_be_sent_makes_two_runners() {
    found(Mutant::CommitFailureResumes, two_runners);
}

#[test]
fn resuming_the_guest_when_the_link_falls_after_commit_makes_two_runners() {
    found(Mutant::InDoubtResumes, two_runners);
}

#[test]
fn running_the_guest_before_commit_makes_two_runners() {
    found(Mutant::RunsOnceLoaded, two_runners);
}

#[test]
fn taking_a_late_commit_after_giving_up_makes_two_runners() {
    found(Mutant::LateCommitTaken, two_runners);
}

#[test]
fn taking_a_late_commit_after_answering_never_makes_two_runners() {
    found(Mutant::CommitTakenAfterNever, two_runners);
}

#[test]
fn sending_pages_without_watching_them_again_loses_writes() {
    found(Mutant::RearmSkipped, memory_differs);
}

#[test]
fn watching_pages_again_only_after_reading_them_loses_writes() {
    found(Mutant::ReadBeforeRearm, memory_differs);
}

#[test]
fn reading_the_log_before_state_is_saved_loses_what_saving_writes() {
    found(Mutant::SyncBeforeSave, memory_differs);
}

#[test]
fn a_second_attempt_that_builds_on_the_first_loses_pages() {
    found(Mutant::StartKeepsOldPages, memory_differs);
}

#[test]
fn hot_pages_that_were_held_back_and_forgotten_are_lost() {
    found(Mutant::HeldPagesForgotten, memory_differs);
}

#[test]
fn a_zero_page_that_does_not_clear_what_was_received_leaves_stale_memory() {
    found(Mutant::ZeroPagesSkipped, memory_differs);
}

#[test]
fn digests_that_are_not_compared_let_a_lost_page_through() {
    found(Mutant::VerifySkipped, memory_differs);
}

#[test]
fn a_destination_without_deadlines_waits_for_ever() {
    found(Mutant::NoDeadline, |v| matches!(v, Violation::Stuck { side: Side::Destination, .. }));
}

#[test]
fn a_log_that_stays_on_after_a_failed_migration_is_noticed() {
    found(Mutant::TrackingLeftOn, |v| *v == Violation::StillTracked);
    found(Mutant::ThrottleLeftOn, |v| *v == Violation::StillSlowed);
}

fn ends(violation: &Violation) -> bool {
    matches!(violation, Violation::Ends(_))
}

#[test]
fn promising_never_without_giving_the_copy_up_makes_two_runners() {
    found(Mutant::NeverWithoutRevoking, two_runners);
}

#[test]
fn taking_unknown_for_never_makes_two_runners() {
    found(Mutant::UnknownTakenForNever, two_runners);
}

#[test]
fn taking_silence_for_never_makes_two_runners() {
    found(Mutant::SilenceTakenForNever, two_runners);
}

#[test]
fn promising_never_for_a_session_that_was_forgotten_makes_two_runners() {
    found(Mutant::UnknownSessionAnsweredNever, two_runners);
}

#[test]
fn ignoring_the_arbiter_makes_two_runners() {
    found(Mutant::DenialIgnored, two_runners);
}

#[test]
fn a_session_that_was_not_begun_with_the_arbiter_cannot_move() {
    found(Mutant::BeginSkipped, ends);
}

#[test]
fn a_copy_that_nobody_asks_for_is_noticed() {
    found(Mutant::CopyNotRecalled, |v| matches!(v, Violation::DoubtStays { side: Side::Destination, .. }));
}

#[test]
fn dropping_a_complete_copy_because_the_source_is_silent_is_noticed() {
    found(Mutant::HeldCopyDropped, |v| matches!(v, Violation::CopyDropped(_)));
}

#[test]
fn a_channel_that_sends_into_a_full_link_is_noticed() {
    found(Mutant::SendsIntoFullLink, |v| matches!(v, Violation::Unbounded { .. }));
}
