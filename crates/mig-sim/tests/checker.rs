//! Every state of the switchover, with and without mistakes.

use mig_sim::checker::{Config, Mutant, Property, check};

fn holds(config: Config) {
    let began = std::time::Instant::now();
    let verdict = check(&config);
    println!("{config:?}: {verdict} ({:.1?})", began.elapsed());
    assert_eq!(verdict.broken, None, "{config:?}: {verdict}");
}

fn found(mutant: Mutant, config: Config, property: Property) {
    let verdict = check(&Config { mutant: Some(mutant), ..config });
    println!("{mutant:?}: {verdict}");
    let trace = verdict.broken.unwrap_or_else(|| panic!("{mutant:?} was not found"));
    assert_eq!(trace.property, property, "{mutant:?}");
}

#[test]
fn in_no_state_do_two_run_the_guest() {
    for verify in [false, true] {
        for more_rounds in [false, true] {
            holds(Config { verify, more_rounds, mutant: None });
        }
    }
}

#[test]
fn taking_a_failed_send_for_one_that_was_not_received_makes_two_run() {
    found(Mutant::FailedSendMeansNotReceived, Config::default(), Property::TwoRun);
}

#[test]
fn resuming_on_any_error_makes_two_run() {
    found(Mutant::ResumeOnAnyError, Config::default(), Property::TwoRun);
}
