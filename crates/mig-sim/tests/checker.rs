//! Every state of the switchover, with and without mistakes.

use mig_sim::checker::{Arbiter, Config, Mutant, Operator, Property, check};

const PLAIN: Config = Config {
    verify: false,
    more_rounds: false,
    arbiter: Arbiter::None,
    operator: Operator::Silent,
    questions_in_vain: 1,
    mutant: None,
};

fn holds(config: Config) {
    let began = std::time::Instant::now();
    let verdict = check(&config);
    println!("{config:?}: {verdict} ({:.1?})", began.elapsed());
    assert_eq!(verdict.broken, None, "{config:?}: {verdict}");
}

/// A world in which nothing happens is safe, too.
#[test]
fn every_pair_of_ends_that_can_be_is_there_and_no_other() {
    let ends = check(&Config { operator: Operator::Truthful, ..PLAIN }).ends;
    let expected = [
        ("crashed", "crashed"),
        ("crashed", "lost"),
        ("crashed", "not-received"),
        ("crashed", "running"),
        ("discarded", "crashed"),
        // an operator saw it run there
        ("discarded", "running"),
        ("moved", "crashed"),
        ("moved", "running"),
        ("still-here", "crashed"),
        ("still-here", "lost"),
        ("still-here", "not-received"),
        // the source's resume failed, and an operator had the destination run its copy
        ("still-here", "running"),
    ];
    assert_eq!(ends.into_iter().collect::<Vec<_>>(), expected);
}

fn found(mutant: Mutant, config: Config, property: Property) {
    let verdict = check(&Config { mutant: Some(mutant), ..config });
    println!("{mutant:?}: {verdict}");
    let trace = verdict.broken.unwrap_or_else(|| panic!("{mutant:?} was not found"));
    assert_eq!(trace.property, property, "{mutant:?}");
    if property == Property::TwoRun {
        assert!(trace.steps.last().is_some_and(|step| step.starts_with("SD")), "both run in the end");
    }
}

#[test]
fn in_no_state_do_two_run_the_guest() {
    holds(PLAIN);
    holds(Config { operator: Operator::Truthful, ..PLAIN });
}

#[test]
fn in_no_state_of_one_with_an_arbiter_do_two_run_the_guest() {
    holds(Config { arbiter: Arbiter::Reliable, ..PLAIN });
    holds(Config { arbiter: Arbiter::Unreliable, ..PLAIN });
    holds(Config { arbiter: Arbiter::Unreliable, operator: Operator::Truthful, ..PLAIN });
}

#[test]
fn with_an_arbiter_no_word_of_an_operator_makes_two_run() {
    holds(Config { arbiter: Arbiter::Reliable, operator: Operator::Anything, ..PLAIN });
}

/// Minutes: with `MIG_CHECK_ALL` set the largest worlds, else one small one with digests and further rounds.
#[test]
fn digests_and_further_rounds_change_none_of_it() {
    let full = Config { verify: true, more_rounds: true, ..PLAIN };
    holds(full);
    if std::env::var_os("MIG_CHECK_ALL").is_none() {
        return;
    }
    let full = Config { questions_in_vain: 3, ..full };
    for arbiter in [Arbiter::None, Arbiter::Reliable, Arbiter::Unreliable] {
        holds(Config { arbiter, operator: Operator::Truthful, ..full });
    }
    holds(Config { arbiter: Arbiter::Reliable, operator: Operator::Anything, ..full });
}

#[test]
fn taking_a_failed_send_for_one_that_was_not_received_makes_two_run() {
    found(Mutant::FailedSendMeansNotReceived, PLAIN, Property::TwoRun);
}

#[test]
fn resuming_on_any_error_makes_two_run() {
    found(Mutant::ResumeOnAnyError, PLAIN, Property::TwoRun);
}

#[test]
fn answering_never_without_giving_the_copy_up_makes_two_run() {
    found(Mutant::NeverWithoutRevoking, PLAIN, Property::TwoRun);
}

#[test]
fn taking_unknown_for_never_makes_two_run() {
    found(Mutant::UnknownTakenForNever, PLAIN, Property::TwoRun);
}

#[test]
fn answering_never_for_a_session_that_was_forgotten_makes_two_run() {
    found(Mutant::ForgottenMeansNever, PLAIN, Property::TwoRun);
}

#[test]
fn running_a_complete_copy_because_the_source_is_gone_makes_two_run() {
    found(Mutant::CompleteCopyRunsWhenTheSourceIsGone, PLAIN, Property::TwoRun);
}

#[test]
fn a_destination_that_ignores_the_arbiters_no_makes_two_run() {
    let config = Config { arbiter: Arbiter::Reliable, ..PLAIN };
    found(Mutant::DestinationIgnoresDenied, config, Property::TwoRun);
}

#[test]
fn an_arbiter_that_only_the_source_asks_makes_two_run() {
    let config = Config { arbiter: Arbiter::Reliable, ..PLAIN };
    found(Mutant::ArbiterOnOneSide, config, Property::TwoRun);
}

#[test]
fn running_on_before_commit_whatever_the_arbiter_says_makes_two_run_when_an_operator_is_wrong() {
    let config = Config { arbiter: Arbiter::Reliable, operator: Operator::Anything, ..PLAIN };
    found(Mutant::RunsOnUnclaimed, config, Property::TwoRun);
}

#[test]
fn a_source_in_doubt_that_does_not_ask_may_never_know() {
    found(Mutant::NeverAsks, PLAIN, Property::NeverEnds);
}

/// What the machines do not promise: see docs/switchover.md.
#[test]
fn a_wrong_word_of_an_operator_makes_two_run_where_no_arbiter_can_be_asked() {
    for arbiter in [Arbiter::None, Arbiter::Unreliable] {
        let verdict = check(&Config { arbiter, operator: Operator::Anything, ..PLAIN });
        println!("a wrong word, {arbiter:?}: {verdict}");
        assert_eq!(verdict.broken.map(|trace| trace.property), Some(Property::TwoRun));
    }
}
