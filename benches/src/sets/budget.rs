//! Whether a promised pause is kept: guests that dirty memory at a rate, under budgets.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::{Bench, Set};
use crate::events::{Report, Round};
use crate::migration::{Moved, Plan};
use crate::plot::{self, Series};
use crate::record::{Cell, Results, cell};
use crate::spread::{Spread, median, one, three};
use crate::text::{Table, size, verdict};

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "guests that dirty 10, 50 and 100 thousand pages a second of 256 MiB and 2 GiB, under budgets of 10, 50 \
            and 300 ms: is what is promised kept, and how good is the prediction",
    runs: 20,
    measure,
    render,
};

const NAME: &str = "budget";
const PAGE_BYTES: u64 = 4096;
const PROMISE: &str = "within-budget";

fn measure(bench: &mut Bench) -> Result<()> {
    let memory_bytes: u64 = if bench.quick { 1 << 30 } else { 4 << 30 };
    let rates: &[u64] = if bench.quick { &[10, 50] } else { &[10, 50, 100] };
    let working_sets: &[u64] = if bench.quick { &[64 << 20] } else { &[256 << 20, 2 << 30] };
    let budgets: &[u64] = if bench.quick { &[10, 300] } else { &[10, 50, 300] };
    // No warm-up: the whole matrix is gone through again and again, so each cell's runs lie far apart.
    for run in 1..=bench.runs {
        for (rate, working_set) in rates.iter().flat_map(|r| working_sets.iter().map(move |w| (*r, *w))) {
            for budget in budgets {
                let plan = Plan {
                    guest: format!(
                        "dirtier:rate={},working-set={}MiB,pattern=random",
                        rate * 1000 * PAGE_BYTES,
                        working_set >> 20
                    ),
                    downtime_ms: Some(*budget),
                    after: Duration::from_millis(500),
                    ..Plan::idle(memory_bytes, 2)
                };
                let cell = cell([
                    ("budget_ms", budget.to_string()),
                    ("thousand_pages_per_s", rate.to_string()),
                    ("working_set", size(working_set)),
                ]);
                bench.migrate(&cell, run, &plan)?;
            }
        }
    }
    Ok(())
}

/// A migration with what was promised of it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kept {
    promised: bool,
    budget_ms: f64,
    predicted_ms: f64,
    actual_ms: f64,
    gap_ms: Option<f64>,
}

impl Kept {
    fn of(cell: &Cell, moved: &Moved) -> Option<Self> {
        let report = &moved.report;
        Some(Self {
            promised: report.stop_reason.as_deref() == Some(PROMISE),
            budget_ms: cell.get("budget_ms")?.parse().ok()?,
            predicted_ms: report.predicted_downtime_ms?,
            actual_ms: report.downtime_ms?,
            gap_ms: report.guest_gap_ms,
        })
    }

    fn is_met(&self) -> bool {
        self.actual_ms <= self.budget_ms
    }

    fn is_met_by_the_gap(&self) -> bool {
        self.gap_ms.is_some_and(|gap| gap <= self.budget_ms)
    }

    /// In percent of what it was.
    fn error(&self) -> f64 {
        (self.predicted_ms - self.actual_ms).abs() / self.actual_ms * 100.0
    }
}

/// `k of n`, of the runs in which the budget was promised.
fn met(kept: &[Kept], is_met: fn(&Kept) -> bool) -> (usize, usize) {
    let promised = kept.iter().filter(|k| k.promised);
    (promised.clone().filter(|k| is_met(k)).count(), promised.count())
}

/// At least 19 of 20.
fn is_enough((met, of): (usize, usize)) -> Option<bool> {
    (of > 0).then_some(met * 20 >= of * 19)
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let cells = results.cells(NAME);
    let mut table = Table::new(&[
        "dirtied, thousand pages/s: asked",
        "reached",
        "working set",
        "budget, ms",
        "runs",
        "stop reasons",
        "rounds",
        "total, s",
        "predicted, ms",
        "pause, ms",
        "gap, ms",
        "met, of those promised",
        "by the gap",
        "target: 19 of 20",
        "error of the prediction, %: median",
        "p95",
        "target: 20",
    ]);
    let mut all = Vec::new();
    for cell in &cells {
        let moved = || results.moved(NAME, cell).map(|(_, m)| m);
        let kept: Vec<Kept> = moved().filter_map(|m| Kept::of(cell, m)).collect();
        let value = |name: &str| cell.get(name).cloned().unwrap_or_default();
        let reached = moved().filter_map(dirtied_per_ms);
        let error = Spread::of(kept.iter().map(Kept::error));
        let (met_here, by_gap) = (met(&kept, Kept::is_met), met(&kept, Kept::is_met_by_the_gap));
        table.row(&[
            value("thousand_pages_per_s"),
            one(median(reached), 0),
            value("working_set"),
            value("budget_ms"),
            moved().count().to_string(),
            reasons(moved()),
            three(moved().map(|m| f64::from(m.report.rounds)), 0),
            three(moved().map(|m| m.report.total_ms / 1e3), 2),
            three(kept.iter().map(|k| k.predicted_ms), 2),
            three(kept.iter().map(|k| k.actual_ms), 2),
            three(kept.iter().filter_map(|k| k.gap_ms), 2),
            format!("{} of {}", met_here.0, met_here.1),
            format!("{} of {}", by_gap.0, by_gap.1),
            verdict(is_enough(met_here)),
            error.map_or("-".into(), |e| format!("{:.0}", e.median)),
            error.map_or("-".into(), |e| format!("{:.0}", e.p95)),
            verdict(error.map(|e| e.p95 <= 20.0)),
        ]);
        all.push(((*cell).clone(), kept));
    }
    let reports = cells.iter().flat_map(|cell| results.moved(NAME, cell)).map(|(_, m)| &m.report);
    let text = results.failures(NAME) + &table.finish() + &overall(&all) + &by_parts(reports);
    let mut by_budget: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    for kept in all.iter().flat_map(|(_, kept)| kept) {
        by_budget.entry(kept.budget_ms as u64).or_default().push((kept.actual_ms, kept.predicted_ms));
    }
    let series = by_budget.into_iter().map(|(ms, values)| Series { name: format!("budget {ms} ms"), values });
    plot::against(
        &directory.join("budget.svg"),
        "The pause as it was predicted, over what it was (each run)",
        ["pause, ms", "predicted, ms"],
        &series.collect::<Vec<_>>(),
    )?;
    Ok(text + "![predicted over actual](budget.svg)\n\n")
}

/// Thousand pages dirtied a second, over all rounds but the last. What is dirtied twice in a round counts once.
fn dirtied_per_ms(moved: &Moved) -> Option<f64> {
    let sum = |of: fn(&Round) -> f64| moved.rounds.iter().map(of).sum::<f64>();
    Some(sum(|r| r.dirtied_pages as f64) / sum(|r| r.elapsed_ms)).filter(|rate| rate.is_finite())
}

/// What each part of the pause was predicted to be, and was, over all cells.
fn by_parts<'a>(reports: impl Iterator<Item = &'a Report>) -> String {
    let mut parts: Vec<(&str, Vec<f64>, Vec<f64>)> = Vec::new();
    for (predicted, actual) in reports.filter_map(|r| Some((r.predicted_downtime?, r.downtime?))) {
        for (at, ((name, predicted), (_, actual))) in
            predicted.parts().into_iter().zip(actual.parts()).enumerate()
        {
            if parts.len() == at {
                parts.push((name, Vec::new(), Vec::new()));
            }
            parts[at].1.push(predicted);
            parts[at].2.push(actual);
        }
    }
    let mut table = Table::new(&["part", "predicted, ms", "was, ms"]);
    for (name, predicted, actual) in parts {
        table.row(&[name.into(), three(predicted, 3), three(actual, 3)]);
    }
    table.finish()
}

/// Over all cells.
fn overall(all: &[(Cell, Vec<Kept>)]) -> String {
    let kept: Vec<Kept> = all.iter().flat_map(|(_, kept)| kept.iter().copied()).collect();
    let (met_all, of) = met(&kept, Kept::is_met);
    let by_gap = met(&kept, Kept::is_met_by_the_gap);
    let Some(error) = Spread::of(kept.iter().map(Kept::error)) else { return String::new() };
    let below = Spread::of(kept.iter().map(|k| (k.predicted_ms / k.actual_ms - 1.0) * 100.0));
    format!(
        "All cells: the budget was met in {met_all} of {of} runs that promised it (target: 19 of 20, {}), by the guest's \
         own gap in {} of {}; the prediction was off by {:.0} % in the median and {:.0} % at p95 (target: 20 %, {}), \
         from {:+.0} % to {:+.0} %.\n\n",
        verdict(is_enough((met_all, of))),
        by_gap.0,
        by_gap.1,
        error.median,
        error.p95,
        verdict(Some(error.p95 <= 20.0)),
        below.map_or(f64::NAN, |s| s.min),
        below.map_or(f64::NAN, |s| s.max),
    )
}

/// `within-budget 18, no-progress 2`.
fn reasons<'a>(moved: impl Iterator<Item = &'a Moved>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for m in moved {
        *counts.entry(m.report.stop_reason.as_deref().unwrap_or("none")).or_default() += 1;
    }
    counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(promised: bool, actual_ms: f64) -> Kept {
        Kept { promised, budget_ms: 10.0, predicted_ms: 8.0, actual_ms, gap_ms: Some(actual_ms + 1.0) }
    }

    #[test]
    fn only_runs_that_promise_the_budget_are_held_to_it() {
        let runs = [kept(true, 10.0), kept(true, 10.5), kept(false, 50.0)];
        assert_eq!(met(&runs, Kept::is_met), (1, 2));
        assert_eq!(met(&runs, Kept::is_met_by_the_gap), (0, 2));
        assert_eq!(kept(true, 10.0).error(), 20.0);
    }

    #[test]
    fn nineteen_of_twenty_are_enough_and_eighteen_are_not() {
        assert_eq!(
            [is_enough((19, 20)), is_enough((18, 20)), is_enough((0, 0))],
            [Some(true), Some(false), None]
        );
        assert_eq!([is_enough((7, 7)), is_enough((6, 7))], [Some(true), Some(false)]);
    }
}
