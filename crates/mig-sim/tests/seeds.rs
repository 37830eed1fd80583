//! Many seeds. `MIG_SIM_SEED=n` runs one, and tells everything that happens in it; `MIG_SIM_SEEDS=n` runs as
//! many.

use std::collections::BTreeMap;

use mig_sim::{DestinationEnd, SourceEnd, Summary, simulate};

const SEEDS: u64 = 20_000;

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
    let mut broken = Vec::new();
    for seed in 0..seeds {
        match simulate(seed, None, false) {
            Ok(summary) => {
                let Summary { source, destination, alive, .. } = summary;
                *ends.entry(format!("{source:?}/{destination:?}")).or_default() += 1;
                *guests.entry(format!("{source:?}/{destination:?}: {alive}")).or_default() += 1;
            }
            Err(violation) => broken.push((seed, violation)),
        }
    }
    for (ends, count) in &guests {
        println!("{count:>6} {ends} alive");
    }
    let first: Vec<String> =
        broken.iter().take(10).map(|(seed, v)| format!("MIG_SIM_SEED={seed}: {v}")).collect();
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
