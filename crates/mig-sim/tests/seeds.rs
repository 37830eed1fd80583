//! Many seeds: twenty thousand, or `MIG_SIM_SEEDS` of them. One that breaks something is printed with the command
//! that runs it again and tells everything that happens in it: `MIG_SIM_SEED=n cargo test -p mig-sim ...`.

use std::collections::BTreeMap;
use std::time::Instant;

use mig_sim::{DestinationEnd, SourceEnd, Summary, simulate};

const SEEDS: u64 = 20_000;
const REPLAY: &str = "cargo test -p mig-sim --test seeds -- --nocapture";

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is no number: {value}")))
}

#[test]
fn what_must_hold_holds_for_twenty_thousand_seeds() {
    if let Some(seed) = number("MIG_SIM_SEED") {
        let summary = simulate(seed, None, true);
        assert!(summary.is_ok(), "MIG_SIM_SEED={seed}: {summary:?}");
        return;
    }
    let seeds = number("MIG_SIM_SEEDS").unwrap_or(SEEDS);
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut guests: BTreeMap<String, u64> = BTreeMap::new();
    let (mut doubts, mut again) = ([0; 2], 0);
    let mut broken = Vec::new();
    let began = Instant::now();
    for seed in 0..seeds {
        match simulate(seed, None, false) {
            Ok(summary) => {
                let Summary { source, destination, alive, .. } = summary;
                doubts[0] += u64::from(summary.source_doubted);
                doubts[1] += u64::from(summary.destination_doubted);
                again += u64::from(summary.attempts > 1);
                *ends.entry(format!("{source:?}/{destination:?}")).or_default() += 1;
                *guests.entry(format!("{source:?}/{destination:?}: {alive}")).or_default() += 1;
            }
            Err(violation) => broken.push((seed, violation)),
        }
    }
    for (ends, count) in &guests {
        println!("{count:>6} {ends} alive");
    }
    println!("in doubt: {} sources, {} destinations; tried again: {again}", doubts[0], doubts[1]);
    println!("{:.0} seeds a minute", seeds as f64 / began.elapsed().as_secs_f64() * 60.0);
    let first: Vec<String> =
        broken.iter().take(10).map(|(seed, v)| format!("MIG_SIM_SEED={seed} {REPLAY}: {v}")).collect();
    assert!(broken.is_empty(), "{} of {seeds} seeds broke:\n{}", broken.len(), first.join("\n"));
    let reached = |source: SourceEnd, destination: DestinationEnd| {
        assert!(
            ends.contains_key(&format!("{source:?}/{destination:?}")),
            "no seed ends as {source:?}/{destination:?}"
        );
    };
    use {DestinationEnd as D, SourceEnd as S};
    reached(S::Moved, D::Running);
    for destination in [D::NotReceived, D::Held, D::Crashed] {
        reached(S::StillHere, destination);
    }
    reached(S::Discarded, D::Running);
    for destination in [D::Running, D::Lost, D::NotReceived, D::Held, D::Crashed] {
        reached(S::InDoubt, destination);
    }
    for destination in [D::Running, D::NotReceived, D::Held] {
        reached(S::Crashed, destination);
    }
}
