//! What `--estimate` foretells against what then happens.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::{Bench, Set};
use crate::estimate::Forecast;
use crate::events::Report;
use crate::migration::{Moved, Plan};
use crate::plot::{self, Series};
use crate::record::{Cell, Results, cell};
use crate::spread::{Spread, one};
use crate::text::Table;

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "1 GiB dirtied in ways that end well, late and not at all, over 1 and 10 Gbit/s: each guest is watched by \
            --estimate and then moved with the same options. How near was it",
    runs: 2,
    measure,
    render,
};

const NAME: &str = "estimate";
const MEMORY_BYTES: u64 = 1 << 30;
const BUDGET_MS: u64 = 300;
/// An estimate is near that is no further off.
const NEAR: f64 = 0.25;
/// Pauses below are made of messages and state more than of pages.
const LONG_PAUSE_MS: f64 = 20.0;

/// A guest, and what is asked for.
#[derive(Debug, Clone, Copy)]
struct Case {
    link: &'static str,
    /// `random`, `sequential` and `hot` are a dirtier's patterns; `idle` is full of random bytes.
    guest: &'static str,
    working_set_percent: u64,
    /// What is dirtied over what the link carries.
    r: &'static str,
    /// A priority, or what is to be done at a stall.
    policy: &'static str,
}

const fn case(
    link: &'static str,
    guest: &'static str,
    working_set_percent: u64,
    r: &'static str,
    policy: &'static str,
) -> Case {
    Case { link, guest, working_set_percent, r, policy }
}

/// The first few are those of `--quick`.
const CASES: [Case; 29] = [
    case("1Gbit", "random", 5, "0.5", "balanced"),
    case("1Gbit", "random", 5, "2", "balanced"),
    case("1Gbit", "random", 5, "2", "abort"),
    case("1Gbit", "random", 5, "0.25", "balanced"),
    case("1Gbit", "random", 5, "0.8", "balanced"),
    case("1Gbit", "random", 5, "1.2", "balanced"),
    case("1Gbit", "random", 50, "0.25", "balanced"),
    case("1Gbit", "random", 50, "0.5", "balanced"),
    case("1Gbit", "random", 50, "0.8", "balanced"),
    case("1Gbit", "random", 50, "1.2", "balanced"),
    case("1Gbit", "random", 50, "2", "balanced"),
    case("1Gbit", "sequential", 5, "0.5", "balanced"),
    case("1Gbit", "sequential", 5, "1.2", "balanced"),
    case("1Gbit", "sequential", 50, "0.5", "balanced"),
    case("1Gbit", "sequential", 50, "1.2", "balanced"),
    case("1Gbit", "hot", 50, "0.8", "balanced"),
    case("1Gbit", "hot", 50, "2", "balanced"),
    case("1Gbit", "random", 5, "0.25", "soonest-done"),
    case("1Gbit", "random", 5, "1.2", "never-over-budget"),
    case("1Gbit", "random", 5, "2", "shortest-pause"),
    case("1Gbit", "random", 50, "1.2", "soonest-done"),
    case("1Gbit", "random", 5, "2", "stop-and-copy"),
    case("1Gbit", "random", 50, "1.2", "stop-and-copy"),
    case("1Gbit", "sequential", 50, "1.2", "abort"),
    case("1Gbit", "idle", 100, "0", "balanced"),
    case("10Gbit", "random", 5, "0.8", "balanced"),
    case("10Gbit", "random", 50, "0.5", "balanced"),
    case("10Gbit", "random", 50, "1.2", "balanced"),
    case("10Gbit", "idle", 100, "0", "balanced"),
];
const QUICK: usize = 3;
/// The policies that are a `--on-stall` and no `--priority`.
const ON_STALL: [&str; 2] = ["stop-and-copy", "abort"];

impl Case {
    fn cell(&self) -> Cell {
        cell([
            ("bandwidth", self.link.into()),
            ("guest", self.guest.into()),
            ("working_set_percent", self.working_set_percent.to_string()),
            ("r", self.r.into()),
            ("policy", self.policy.into()),
        ])
    }

    fn plan(&self) -> Result<Plan> {
        let link_bytes_per_second = if self.link == "1Gbit" { 125e6 } else { 1.25e9 };
        let guest = match self.guest {
            "idle" => "idle:fill=random".into(),
            pattern => format!(
                "dirtier:rate={},working-set={},pattern={pattern}",
                (link_bytes_per_second * self.r.parse::<f64>()?) as u64,
                MEMORY_BYTES * self.working_set_percent / 100
            ),
        };
        let on_stall = ON_STALL.contains(&self.policy);
        Ok(Plan {
            guest,
            downtime_ms: Some(BUDGET_MS),
            bandwidth: Some(self.link.into()),
            // the cap stands for the link, which does not grow for the pause
            pause_bandwidth: Some("capped".into()),
            priority: Some(if on_stall { "balanced" } else { self.policy }.into()),
            on_stall: on_stall.then(|| self.policy.into()),
            // what an encoding would save is not foretold
            compress: Some("off".into()),
            is_estimated: true,
            after: Duration::from_millis(500),
            ..Plan::idle(MEMORY_BYTES, 2)
        })
    }
}

fn measure(bench: &mut Bench) -> Result<()> {
    let cases = if bench.quick { &CASES[..QUICK] } else { &CASES };
    // No warm-up: a cell's runs lie far apart, with all others between them.
    for run in 1..=bench.runs {
        for case in cases {
            bench.migrate(&case.cell(), run, &case.plan()?)?;
        }
    }
    Ok(())
}

/// A migration beside what was foretold of it.
#[derive(Debug, Clone, Copy)]
struct Pair<'a> {
    cell: &'a Cell,
    run: u32,
    foretold: &'a Forecast,
    actual: &'a Report,
}

impl<'a> Pair<'a> {
    fn of(cell: &'a Cell, run: u32, moved: &'a Moved) -> Option<Self> {
        let foretold = moved.estimate.as_ref()?.forecasts.first()?;
        Some(Self { cell, run, foretold, actual: &moved.report })
    }

    /// How it was to end, and how it did.
    fn ends(&self) -> [&'static str; 2] {
        let foretold = end(self.foretold.moves, self.foretold.fits);
        let fits = self.actual.downtime_ms.is_some_and(|ms| ms <= BUDGET_MS as f64);
        [foretold, end(self.actual.outcome == "moved", fits)]
    }

    fn total_s(&self) -> (f64, f64) {
        (self.foretold.total_ms / 1e3, self.actual.total_ms / 1e3)
    }

    /// The pauses; not a number of a guest that stays or was to stay.
    fn pause_ms(&self) -> (f64, f64) {
        let foretold = if self.foretold.moves { self.foretold.downtime_ms } else { f64::NAN };
        (foretold, self.actual.downtime_ms.unwrap_or(f64::NAN))
    }

    fn sent_mb(&self) -> (f64, f64) {
        (self.foretold.sent_bytes as f64 / 1e6, self.actual.sent_bytes as f64 / 1e6)
    }

    /// By how much the guest was slowed at most, in percent.
    fn slowed(&self) -> (u8, u8) {
        (self.foretold.most_throttle_percent, self.actual.slowed.map_or(0, |s| s.most_percent))
    }
}

/// What was foretold, and what came.
type Both = fn(&Pair<'_>) -> (f64, f64);

fn end(moves: bool, fits: bool) -> &'static str {
    match (moves, fits) {
        (true, true) => "fits",
        (true, false) => "too long",
        (false, _) => "stays",
    }
}

fn ratio((foretold, actual): (f64, f64)) -> f64 {
    actual / foretold
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let cells = results.cells(NAME);
    let pairs: Vec<Pair<'_>> = cells
        .iter()
        .flat_map(|cell| results.ended(NAME, cell).filter_map(|(run, moved)| Pair::of(cell, run, moved)))
        .collect();
    let plots: [(&str, &str, Both); 2] = [
        ("total, s", "estimate-total.svg", |pair| pair.total_s()),
        ("pause, ms", "estimate-pause.svg", |pair| pair.pause_ms()),
    ];
    let mut text = results.failures(NAME) + &summary(&pairs);
    for (what, plot, of) in plots {
        draw(&directory.join(plot), what, &pairs, of)?;
        text += &format!("![{what}]({plot})\n\n");
    }
    Ok(text + &table(&pairs))
}

fn summary(pairs: &[Pair<'_>]) -> String {
    let agreed = pairs.iter().filter(|p| p.ends()[0] == p.ends()[1]).count();
    let slowed = pairs.iter().filter(|p| (p.slowed().0 > 0) == (p.slowed().1 > 0)).count();
    let mut table =
        Table::new(&["actual over foretold", "runs", "min", "median", "p95", "max", "within 25 %"]);
    let mut row = |what: &str, ratios: &mut dyn Iterator<Item = f64>| {
        let ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
        if let Some(spread) = Spread::of(ratios.iter().copied()) {
            let near = ratios.iter().filter(|ratio| (**ratio - 1.0).abs() <= NEAR).count();
            table.row(&[
                what.into(),
                spread.count.to_string(),
                one(spread.min, 2),
                one(spread.median, 2),
                one(spread.p95, 2),
                one(spread.max, 2),
                format!("{near}, {:.0} %", near as f64 / spread.count as f64 * 100.0),
            ]);
        }
    };
    let longest = |p: &Pair<'_>| p.foretold.downtime_ms.max(p.actual.downtime_ms.unwrap_or(0.0));
    let long = |p: &&Pair<'_>| longest(p) >= LONG_PAUSE_MS;
    row("total", &mut pairs.iter().map(|p| ratio(p.total_s())));
    row("pause", &mut pairs.iter().map(|p| ratio(p.pause_ms())));
    row(
        "pause, foretold or actually 20 ms or more",
        &mut pairs.iter().filter(long).map(|p| ratio(p.pause_ms())),
    );
    row("bytes sent", &mut pairs.iter().map(|p| ratio(p.sent_mb())));
    format!(
        "Of {} runs {agreed} ended as foretold: within {BUDGET_MS} ms (*fits*), after a longer pause (*too long*), or \
         where the guest was (*stays*). In {slowed} it was foretold rightly whether the guest would be slowed.\n\n{}",
        pairs.len(),
        table.finish()
    )
}

fn table(pairs: &[Pair<'_>]) -> String {
    let mut table = Table::new(&[
        "link",
        "guest",
        "dirtied, %",
        "r",
        "policy",
        "run",
        "foretold",
        "actual",
        "total, s",
        "actual",
        "over foretold",
        "pause, ms",
        "actual",
        "sent, MB",
        "actual",
        "rounds",
        "actual",
        "slowed by at most, %",
        "actual",
        "ended by",
        "actual",
    ]);
    for pair in pairs {
        let of_cell = |name: &str| pair.cell.get(name).cloned().unwrap_or_default();
        let [foretold, actual] = pair.ends();
        let (slowed, slowed_actual) = pair.slowed();
        table.row(&[
            of_cell("bandwidth"),
            of_cell("guest"),
            of_cell("working_set_percent"),
            of_cell("r"),
            of_cell("policy"),
            pair.run.to_string(),
            foretold.into(),
            if foretold == actual { actual.into() } else { format!("**{actual}**") },
            one(pair.total_s().0, 1),
            one(pair.total_s().1, 1),
            one(ratio(pair.total_s()), 2),
            one(pair.pause_ms().0, 0),
            one(pair.pause_ms().1, 0),
            one(pair.sent_mb().0, 0),
            one(pair.sent_mb().1, 0),
            pair.foretold.rounds.to_string(),
            pair.actual.rounds.to_string(),
            slowed.to_string(),
            slowed_actual.to_string(),
            pair.foretold.stop_reason.clone(),
            pair.actual.stop_reason.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    table.finish()
}

/// A point for each run; on the line it came as foretold.
fn draw(path: &Path, what: &str, pairs: &[Pair<'_>], of: Both) -> Result<()> {
    let kinds = ["random", "sequential", "hot", "idle"];
    let series: Vec<Series<(f64, f64)>> = kinds
        .iter()
        .map(|kind| Series {
            name: (*kind).into(),
            values: pairs
                .iter()
                .filter(|p| p.cell.get("guest").is_some_and(|guest| guest == kind))
                .map(of)
                .filter(|(foretold, actual)| foretold.is_finite() && actual.is_finite())
                .collect(),
        })
        .filter(|series| !series.values.is_empty())
        .collect();
    plot::against(
        path,
        "What was foretold and what happened",
        [&format!("foretold {what}"), &format!("actual {what}")],
        &series,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::Estimate;
    use crate::examples;
    use crate::record::{Outcome, Run};

    /// Foretold 2 s and 100 ms.
    fn run(number: u32, moves: bool, change: impl FnOnce(&mut Moved)) -> Run {
        let forecast = Forecast {
            bandwidth_bytes_per_second: 125_000_000,
            priority: "balanced".into(),
            moves,
            fits: moves,
            stop_reason: "within-budget".into(),
            rounds: 3,
            total_ms: 2000.0,
            downtime_ms: if moves { 100.0 } else { 0.0 },
            sent_bytes: 250_000_000,
            most_throttle_percent: 0,
        };
        let estimate =
            Estimate { filled_bytes: 1, busy_percent: None, dirtied: vec![], forecasts: vec![forecast] };
        let mut moved = Moved { estimate: Some(estimate), ..examples::moved() };
        change(&mut moved);
        let outcome = match moved.report.outcome.as_str() {
            "moved" => Outcome::Moved(Box::new(moved)),
            _ => Outcome::Stayed(Box::new(moved)),
        };
        Run { set: NAME.into(), cell: CASES[1].cell(), what: "migration".into(), run: number, outcome }
    }

    fn rendered(runs: Vec<Run>) -> (String, String) {
        let directory = tempfile::tempdir().unwrap();
        let text = render(&Results { hosts: vec![], runs }, directory.path()).unwrap();
        let plot = std::fs::read_to_string(directory.path().join("estimate-pause.svg")).unwrap();
        (text, plot)
    }

    #[test]
    fn what_came_is_beside_what_was_foretold() {
        let near = |m: &mut Moved| (m.report.total_ms, m.report.downtime_ms) = (2400.0, Some(110.0));
        let late = |m: &mut Moved| (m.report.total_ms, m.report.downtime_ms) = (4000.0, Some(310.0));
        let (text, plot) = rendered(vec![run(1, true, near), run(2, true, late)]);
        assert!(text.starts_with("Of 2 runs 1 ended as foretold") && text.contains("In 2 it"), "{text}");
        assert!(text.contains("| total | 2 | 1.20 | 1.60 | 2.00 | 2.00 | 1, 50 % |"), "{text}");
        assert!(text.contains("| pause | 2 | 1.10 | 2.10 | 3.10 | 3.10 | 1, 50 % |"), "{text}");
        let row = "| 1Gbit | random | 5 | 2 | balanced | 1 | fits | fits | 2.0 | 2.4 | 1.20 | 100 | 110 | 250 | 250 | 3 | 2 | 0 | 0 | within-budget | few-pages |";
        assert!(text.contains(row) && text.contains("| 2 | fits | **too long** |"), "{text}");
        assert!(plot.contains("foretold pause, ms") && plot.contains("random") && !plot.contains("hot"));
    }

    #[test]
    fn a_guest_that_stays_as_foretold_has_no_pause_to_compare() {
        let stays =
            |m: &mut Moved| (m.report.outcome, m.report.downtime_ms) = ("still-here".to_owned(), None);
        let (text, plot) = rendered(vec![run(1, false, stays), run(2, true, stays)]);
        assert!(text.starts_with("Of 2 runs 1 ended") && text.contains("| stays | stays | 2.0 |"), "{text}");
        assert!(text.contains("| fits | **stays** |") && !text.contains("| pause |"), "{text}");
        assert!(plot.contains("nothing was measured"));
    }

    #[test]
    fn every_case_is_another_one_and_says_what_it_wants() {
        let cells: std::collections::BTreeSet<Cell> = CASES.iter().map(Case::cell).collect();
        assert_eq!(cells.len(), CASES.len());
        let plan = CASES[1].plan().unwrap();
        assert_eq!(plan.guest, "dirtier:rate=250000000,working-set=53687091,pattern=random");
        assert_eq!((plan.priority.as_deref(), plan.on_stall), (Some("balanced"), None));
        let stays = CASES[2].plan().unwrap();
        assert_eq!((stays.priority.as_deref(), stays.on_stall.as_deref()), (Some("balanced"), Some("abort")));
    }
}
