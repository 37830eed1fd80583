//! Whether `--bandwidth` is kept: exactly over a round, evenly over 10 ms, and soon after it was changed.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Bench, Set};
use crate::control;
use crate::migration::{self, Moved, Moving, Plan};
use crate::netns::Hosts;
use crate::plot::{self, Series};
use crate::record::{Cell, Outcome, Results, cell};
use crate::spread::{median, one, percentile, three};
use crate::text::{Table, size, verdict};
use crate::traffic::{Traffic, Watch, Window};

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "an idle guest full of random bytes under --bandwidth 1 and 10 Gbit/s: bytes over the time of round 0, and \
            over each 10 ms on the wire; and a cap that is changed meanwhile",
    runs: 3,
    measure,
    render,
};

const NAME: &str = "cap";
/// What is promised of a round.
const EXACT: f64 = 0.02;
/// A changed cap holds from when on 100 ms have the new rate, but for a twentieth.
const HOLDS_OVER_MS: f64 = 100.0;
const HOLDS_WITHIN: f64 = 0.05;
/// Percentiles of the plot.
const PERCENTILES: [usize; 13] = [0, 1, 2, 5, 10, 25, 50, 75, 90, 95, 98, 99, 100];

/// Caps that follow each other, each for so long; the last one until the end.
#[derive(Debug, Clone, Copy)]
struct Case {
    caps: &'static [(&'static str, Duration)],
    channels: &'static str,
    memory_bytes: u64,
}

const fn steady(
    caps: &'static [(&'static str, Duration)],
    channels: &'static str,
    memory_bytes: u64,
) -> Case {
    Case { caps, channels, memory_bytes }
}

const ONE: &[(&str, Duration)] = &[("1Gbit", Duration::MAX)];
const TEN: &[(&str, Duration)] = &[("10Gbit", Duration::MAX)];
const CHANGED: &[(&str, Duration)] =
    &[("10Gbit", Duration::from_millis(350)), ("1Gbit", Duration::from_secs(2)), ("10Gbit", Duration::MAX)];

const CASES: [Case; 5] = [
    steady(ONE, "1", 512 << 20),
    steady(ONE, "auto", 512 << 20),
    steady(TEN, "1", 2 << 30),
    steady(TEN, "auto", 2 << 30),
    Case { caps: CHANGED, channels: "auto", memory_bytes: 1 << 30 },
];

/// A migration under a cap, as it was seen on the wire.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Capped {
    /// How it went.
    pub moved: Moved,
    /// What left the source's host.
    pub traffic: Traffic,
    /// How the cap was changed.
    pub changes: Vec<Change>,
}

/// Another cap.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// As `--set-bandwidth` has it.
    pub cap: String,
    /// When it was asked for, in the time of the traffic.
    pub asked_ms: f64,
    /// When that was answered.
    pub answered_ms: f64,
}

impl Capped {
    /// For whoever watches.
    pub(super) fn in_short(&self) -> String {
        let holds: Vec<String> =
            self.holds().map(|(cap, ms)| format!(", {cap} after {} ms", one(ms, 0))).collect();
        let round = self.moved.rounds.first().map_or(f64::NAN, |round| round.bytes_per_second() / 1e6);
        format!(
            "{:.2} s, round 0 {round:.2} MB/s, {:.4} of what was sent seen{}",
            self.moved.report.total_ms / 1e3,
            self.seen(),
            holds.concat()
        )
    }

    /// Bytes seen over bytes sent.
    fn seen(&self) -> f64 {
        self.traffic.bytes() as f64 / self.moved.report.sent_bytes as f64
    }

    /// Each new cap, and after how many milliseconds it held.
    fn holds(&self) -> impl Iterator<Item = (&str, f64)> {
        self.changes.iter().map(|change| {
            let cap = bytes_per_second(&change.cap).unwrap_or(f64::NAN);
            let held = self.traffic.holds_after_ms(change.asked_ms, cap, HOLDS_OVER_MS, HOLDS_WITHIN);
            (change.cap.as_str(), held.unwrap_or(f64::NAN))
        })
    }
}

/// Of `1Gbit`.
fn bytes_per_second(cap: &str) -> Option<f64> {
    cap.strip_suffix("Gbit")?.parse::<f64>().ok().map(|gbit| gbit * 125e6)
}

fn measure(bench: &mut Bench) -> Result<()> {
    // No warm-up: a cell's runs lie far apart, with all others between them.
    for run in 1..=bench.runs {
        for case in CASES {
            let is_steady = case.caps.len() == 1;
            let memory_bytes =
                if bench.quick && is_steady { case.memory_bytes / 4 } else { case.memory_bytes };
            let plan = Plan {
                guest: "idle:fill=random".into(),
                channels: Some(case.channels.into()),
                bandwidth: Some(case.caps[0].0.into()),
                compress: Some("off".into()),
                ..Plan::idle(memory_bytes, 2)
            };
            let caps: Vec<&str> = case.caps.iter().map(|(cap, _)| *cap).collect();
            let cell = cell([
                ("caps", caps.join(", ")),
                ("channels", case.channels.into()),
                ("memory", size(memory_bytes)),
            ]);
            bench.run(&cell, "migration", run, |bench| {
                let hosts = Hosts::start(None)?;
                let watched = |moving| watch(moving, case.caps);
                let (moved, (traffic, changes)) =
                    migration::run_beside(&bench.programs, &plan, Some(&hosts), watched)?;
                Ok(Outcome::Capped(Box::new(Capped { moved, traffic, changes })))
            })?;
        }
    }
    Ok(())
}

/// Watches a migration to its end, and changes its cap meanwhile.
fn watch(moving: Moving, caps: &[(&str, Duration)]) -> Result<(Traffic, Vec<Change>)> {
    let watch = Watch::start(moving.pid);
    let mut changes = Vec::new();
    for pair in caps.windows(2) {
        let [(_, lasts), (cap, _)] = pair else { continue };
        ensure!(!moving.is_over_within(*lasts), "it was over before the cap was {cap}");
        let asked_ms = watch.now_ms();
        let answer = control::ask(&moving.socket, &json!({"cmd": "bandwidth", "rate": cap}))?;
        ensure!(answer["ok"] == true, "the cap could not be changed: {answer}");
        changes.push(Change { cap: (*cap).into(), asked_ms, answered_ms: watch.now_ms() });
    }
    moving.is_over_within(migration::PATIENCE);
    Ok((watch.finish()?, changes))
}

fn of_cell<'a>(results: &'a Results, cell: &'a Cell) -> Vec<&'a Capped> {
    let runs = results.set(NAME).filter(|run| run.cell == *cell);
    runs.filter_map(|run| match &run.outcome {
        Outcome::Capped(capped) => Some(&**capped),
        _ => None,
    })
    .collect()
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let mut steady = Table::new(&[
        "cap",
        "channels",
        "runs",
        "round 0 over the cap, %",
        "within 2 %",
        "windows",
        "longest, ms",
        "over the cap, %: least",
        "p1",
        "median",
        "p99",
        "most",
        "seen of what was sent, %",
    ]);
    let mut changed = Table::new(&["cap, then", "channels", "runs", "new cap", "held after, ms"]);
    let (mut percentiles, mut rates) = (Vec::new(), Vec::new());
    for cell in results.cells(NAME) {
        let runs = of_cell(results, cell);
        let name = |name: &str| cell.get(name).map_or("", String::as_str);
        if runs.is_empty() {
            continue;
        }
        match bytes_per_second(name("caps")) {
            Some(cap) => {
                steady.row(&steady_row(name("caps"), name("channels"), cap, &runs));
                let over = windows(&runs, cap).map(|w| w.bytes_per_second / cap * 100.0);
                let over: Vec<f64> = over.collect();
                let of = |percent| (percent as f64, percentile(over.iter().copied(), percent));
                percentiles.push(Series {
                    name: format!("{}, {} channels", name("caps"), name("channels")),
                    values: PERCENTILES.map(of).to_vec(),
                });
            }
            None => {
                changed_rows(&mut changed, name("caps"), name("channels"), &runs);
                let rate = |w: &Window| (w.to_ms, w.bytes_per_second / 1e9);
                let series = |(number, run): (usize, &&Capped)| Series {
                    name: format!("run {}", number + 1),
                    values: run.traffic.windows().iter().map(rate).collect(),
                };
                rates.extend(runs.iter().enumerate().map(series));
            }
        }
    }
    let title = "Windows of 10 ms by their rate over the cap";
    plot::lines(
        &directory.join("cap.svg"),
        title,
        ["windows, %, slowest first", "rate over cap, %"],
        &percentiles,
    )?;
    let title = "A cap that is changed twice";
    plot::lines(
        &directory.join("cap-changed.svg"),
        title,
        ["ms since the order", "GB/s over 10 ms"],
        &rates,
    )?;
    Ok(results.failures(NAME)
        + &steady.finish()
        + "![windows](cap.svg)\n\n"
        + &changed.finish()
        + "![rate over time](cap-changed.svg)\n\n")
}

fn windows<'a>(runs: &'a [&'a Capped], cap: f64) -> impl Iterator<Item = Window> + 'a {
    runs.iter().flat_map(move |run| run.traffic.flowing(cap))
}

fn steady_row(name: &str, channels: &str, cap: f64, runs: &[&Capped]) -> [String; 13] {
    let rounds = || runs.iter().filter_map(|run| run.moved.rounds.first());
    let exact = || rounds().map(|round| round.bytes_per_second() / cap);
    let over = || windows(runs, cap).map(|w| w.bytes_per_second / cap * 100.0);
    let at = |percent| one(percentile(over(), percent), 1);
    let longest = windows(runs, cap).map(|w| w.to_ms - w.from_ms).fold(f64::NAN, f64::max);
    [
        name.into(),
        channels.into(),
        runs.len().to_string(),
        three(exact().map(|ratio| ratio * 100.0), 2),
        verdict(Some((median(exact()) - 1.0).abs() <= EXACT)),
        over().count().to_string(),
        one(longest, 1),
        at(0),
        at(1),
        at(50),
        at(99),
        at(100),
        three(runs.iter().map(|run| run.seen() * 100.0), 2),
    ]
}

fn changed_rows(table: &mut Table, name: &str, channels: &str, runs: &[&Capped]) {
    let changes = runs.iter().map(|run| run.changes.len()).max().unwrap_or(0);
    for number in 0..changes {
        let held: Vec<(&str, f64)> = runs.iter().filter_map(|run| run.holds().nth(number)).collect();
        let cap = held.first().map_or("", |(cap, _)| cap);
        let never = held.iter().filter(|(_, ms)| ms.is_nan()).count();
        let mut text = three(held.iter().map(|(_, ms)| *ms), 0);
        if never > 0 {
            text += &format!(", **never in {never}**");
        }
        table.row(&[name.into(), channels.into(), held.len().to_string(), cap.into(), text]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples;
    use crate::record::Run;
    use crate::traffic::Look;

    fn run(caps: &str, number: u32, capped: Capped) -> Run {
        let cell = cell([("caps", caps.into()), ("channels", "auto".into())]);
        let outcome = Outcome::Capped(Box::new(capped));
        Run { set: NAME.into(), cell, what: "migration".into(), run: number, outcome }
    }

    /// Looks every 10 ms at a rate that follows from the time in milliseconds.
    fn traffic(rate: fn(u32) -> u64) -> Traffic {
        let mut bytes = 0;
        let look = |at| {
            bytes += if at == 0 { 0 } else { rate(at * 10) / 100 };
            Look { at_ms: f64::from(at) * 10.0, bytes }
        };
        Traffic::of((0..200_u32).map(look).collect())
    }

    fn rendered(runs: Vec<Run>) -> String {
        let directory = tempfile::tempdir().unwrap();
        let text = render(&Results { hosts: vec![], runs }, directory.path()).unwrap();
        assert!(
            directory.path().join("cap.svg").exists() && directory.path().join("cap-changed.svg").exists()
        );
        text
    }

    #[test]
    fn a_steady_cap_is_judged_over_a_round_and_shown_over_windows() {
        // one window in a hundred is half as fast
        let traffic = traffic(|ms| if ms % 1000 == 500 { 62_500_000 } else { 125_000_000 });
        let mut moved = examples::moved();
        (moved.rounds[0].sent_bytes, moved.rounds[0].elapsed_ms) = (250_000_000, 1980.0);
        moved.report.sent_bytes = traffic.bytes();
        let exact = Capped { moved, traffic, changes: vec![] };
        let mut slow = exact.clone();
        slow.moved.rounds[0].elapsed_ms = 2100.0;
        let text = rendered(vec![run("1Gbit", 1, exact.clone())]);
        let row = "| 1Gbit | auto | 1 | 101.01 / 101.01 / 101.01 | met | 189 | 10.0 | 50.0 | 50.0 | 100.0 | 100.0 | 100.0 | 100.00 / 100.00 / 100.00 |";
        assert!(text.contains(row), "{text}");
        assert!(rendered(vec![run("1Gbit", 1, slow)]).contains("| **missed** |"));
    }

    #[test]
    fn a_changed_cap_holds_when_the_new_rate_is_there_to_stay() {
        let traffic = traffic(|ms| match ms {
            ..=500 => 1_250_000_000,
            510..=530 => 400_000_000,
            _ => 125_000_000,
        });
        let change = |cap: &str, asked_ms| Change { cap: cap.into(), asked_ms, answered_ms: asked_ms + 1.0 };
        let changes = vec![change("1Gbit", 500.0), change("10Gbit", 1500.0)];
        let text = rendered(vec![run(
            "10Gbit, 1Gbit, 10Gbit",
            1,
            Capped { moved: examples::moved(), traffic, changes },
        )]);
        assert!(text.contains("| 10Gbit, 1Gbit, 10Gbit | auto | 1 | 1Gbit | 30 / 30 / 30 |"), "{text}");
        assert!(text.contains("| 1 | 10Gbit | -, **never in 1** |"), "{text}");
    }
}
