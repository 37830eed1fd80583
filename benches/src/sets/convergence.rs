//! Guests that dirty as fast as the link carries, slower, and faster: what each priority makes of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::{Bench, Set};
use crate::migration::{Moved, Plan};
use crate::plot::{self, Dots, Panel, Series};
use crate::record::{Cell, Results, cell};
use crate::speed::Speed;
use crate::spread::{median, one, three};
use crate::text::{Table, size};

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "1 GiB of which 5 % and 50 % are dirtied at 0.25 to 4 times what 1 and 10 Gbit/s carry, with each priority: \
            does it end, within 300 ms, and what is left of the guest's speed",
    runs: 1,
    measure,
    render,
};

const NAME: &str = "convergence";
const MEMORY_BYTES: u64 = 1 << 30;
const PAGE_BYTES: u64 = 4096;
const BUDGET_MS: u64 = 300;
const RATIOS: [&str; 7] = ["0.25", "0.5", "0.8", "0.95", "1.2", "2", "4"];
const WORKING_SETS_PERCENT: [u64; 2] = [5, 50];
const PRIORITIES: [&str; 4] = ["balanced", "shortest-pause", "soonest-done", "never-over-budget"];

/// A cap that stands for a link: its option, and what it carries.
#[derive(Debug, Clone, Copy)]
struct Link {
    name: &'static str,
    bytes_per_second: f64,
}

const LINKS: [Link; 2] =
    [Link { name: "1Gbit", bytes_per_second: 125e6 }, Link { name: "10Gbit", bytes_per_second: 1.25e9 }];

fn measure(bench: &mut Bench) -> Result<()> {
    let (links, working_sets, ratios): (&[Link], &[u64], &[&str]) = if bench.quick {
        (&LINKS[..1], &WORKING_SETS_PERCENT[..1], &["0.5", "2"])
    } else {
        (&LINKS, &WORKING_SETS_PERCENT, &RATIOS)
    };
    // No warm-up: a cell's runs lie far apart, with all others between them.
    for run in 1..=bench.runs {
        for (link, percent) in links.iter().flat_map(|l| working_sets.iter().map(move |w| (l, *w))) {
            for (ratio, priority) in ratios.iter().flat_map(|r| PRIORITIES.map(|p| (*r, p))) {
                let cell = cell([
                    ("bandwidth", link.name.into()),
                    ("working_set_percent", percent.to_string()),
                    ("r", ratio.into()),
                    ("priority", priority.into()),
                ]);
                bench.migrate(&cell, run, &plan(link, percent, ratio.parse()?, priority))?;
            }
        }
    }
    Ok(())
}

fn plan(link: &Link, percent: u64, ratio: f64, priority: &str) -> Plan {
    let rate = (link.bytes_per_second * ratio) as u64;
    Plan {
        guest: format!("dirtier:rate={rate},working-set={},pattern=random", MEMORY_BYTES * percent / 100),
        downtime_ms: Some(BUDGET_MS),
        bandwidth: Some(link.name.into()),
        // the cap stands for the link, which does not grow for the pause
        pause_bandwidth: Some("capped".into()),
        priority: Some(priority.into()),
        has_speed_taken: true,
        after: Duration::from_millis(500),
        ..Plan::idle(MEMORY_BYTES, 2)
    }
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let cells = results.cells(NAME);
    let mut text = results.failures(NAME) + &by_priority(results, &cells);
    for link in LINKS {
        for percent in WORKING_SETS_PERCENT {
            let is_here = |c: &&Cell| {
                is(c, "bandwidth", link.name) && is(c, "working_set_percent", &percent.to_string())
            };
            let cells: Vec<&Cell> = cells.iter().copied().filter(is_here).collect();
            if cells.is_empty() {
                continue;
            }
            let title = format!(
                "{}, {} % dirtied: {}",
                spaced(link.name),
                percent,
                size(MEMORY_BYTES * percent / 100)
            );
            let plot = format!("{NAME}-{}-{percent}.svg", link.name);
            text += &format!("### {title}\n\n{}", table(results, &link, &cells));
            draw(results, &directory.join(&plot), &title, &cells)?;
            text += &format!("![total time and pause over r]({plot})\n\n");
        }
    }
    Ok(text)
}

fn is(cell: &Cell, name: &str, value: &str) -> bool {
    cell.get(name).is_some_and(|found| found == value)
}

/// `1 Gbit/s`.
fn spaced(rate: &str) -> String {
    format!("{} Gbit/s", rate.trim_end_matches("Gbit"))
}

/// What a priority came to, over all there is.
fn by_priority(results: &Results, cells: &[&Cell]) -> String {
    let mut table = Table::new(&[
        "priority",
        "runs",
        "outcome",
        "moved within 300 ms",
        "longest pause, ms",
        "total, s",
        "least writes kept, %",
    ]);
    for priority in PRIORITIES {
        let ended: Vec<&Moved> = cells
            .iter()
            .filter(|cell| is(cell, "priority", priority))
            .flat_map(|cell| results.ended(NAME, cell).map(|(_, moved)| moved))
            .collect();
        if ended.is_empty() {
            continue;
        }
        let pauses = || ended.iter().filter_map(|m| m.report.downtime_ms);
        let kept = ended.iter().filter_map(|m| m.speed).map(|speed| speed.writes_kept()[0]);
        table.row(&[
            priority.into(),
            ended.len().to_string(),
            outcomes(&ended),
            within(pauses()),
            one(pauses().fold(f64::NAN, f64::max), 0),
            several(ended.iter().map(|m| m.report.total_ms / 1e3), 1),
            one(kept.fold(f64::NAN, f64::min), 0),
        ]);
    }
    table.finish()
}

fn table(results: &Results, link: &Link, cells: &[&Cell]) -> String {
    let mut table = Table::new(&[
        "r",
        "reached",
        "priority",
        "outcome",
        "within 300 ms",
        "total, s",
        "pause, ms",
        "gap, ms",
        "sent, MB",
        "rounds",
        "ended by",
        "slowed by at most, %",
        "slowed for, s",
        "least use of its processors, %",
        "writes kept, %",
        "after",
        "heartbeats a second before",
        "kept, %",
        "after",
    ]);
    for ratio in RATIOS {
        for priority in PRIORITIES {
            let Some(cell) = cells.iter().find(|c| is(c, "r", ratio) && is(c, "priority", priority)) else {
                continue;
            };
            let ended: Vec<&Moved> = results.ended(NAME, cell).map(|(_, moved)| moved).collect();
            if !ended.is_empty() {
                table.row(&row(ratio, priority, link, &ended));
            }
        }
    }
    table.finish()
}

fn row(ratio: &str, priority: &str, link: &Link, ended: &[&Moved]) -> [String; 19] {
    let reports = || ended.iter().map(|m| &m.report);
    let slowed = || reports().filter_map(|r| r.slowed);
    let speeds = || ended.iter().filter_map(|m| m.speed);
    let reached = |speed: Speed| speed.before.pages_written * PAGE_BYTES as f64 / link.bytes_per_second;
    [
        ratio.into(),
        one(median(speeds().map(reached)), 2),
        priority.into(),
        outcomes(ended),
        within(reports().filter_map(|r| r.downtime_ms)),
        several(reports().map(|r| r.total_ms / 1e3), 1),
        several(reports().filter_map(|r| r.downtime_ms), 0),
        several(reports().filter_map(|r| r.guest_gap_ms), 0),
        several(reports().map(|r| r.sent_bytes as f64 / 1e6), 0),
        several(reports().map(|r| f64::from(r.rounds)), 0),
        counts(reports().map(|r| r.stop_reason.as_deref().unwrap_or("none"))),
        several(slowed().map(|s| f64::from(s.most_percent)), 0),
        several(slowed().map(|s| s.lasted_ms / 1e3), 1),
        several(slowed().filter_map(|s| s.least_speed_percent).map(f64::from), 0),
        several(speeds().map(|s| s.writes_kept()[0]), 0),
        several(speeds().map(|s| s.writes_kept()[1]), 0),
        several(speeds().map(|s| s.before.heartbeats), 0),
        several(speeds().map(|s| s.heartbeats_kept()[0]), 0),
        several(speeds().map(|s| s.heartbeats_kept()[1]), 0),
    ]
}

/// One value as it is, more of them by their least, median and most.
fn several(values: impl Iterator<Item = f64> + Clone, decimals: usize) -> String {
    if values.clone().count() == 1 { one(median(values), decimals) } else { three(values, decimals) }
}

/// `yes`, `no`, or how many of those that were paused.
fn within(pauses_ms: impl Iterator<Item = f64> + Clone) -> String {
    let within = pauses_ms.clone().filter(|ms| *ms <= BUDGET_MS as f64).count();
    match (within, pauses_ms.count()) {
        (_, 0) => "-".into(),
        (1, 1) => "yes".into(),
        (0, 1) => "no".into(),
        (within, of) => format!("{within} of {of}"),
    }
}

fn outcomes(ended: &[&Moved]) -> String {
    counts(ended.iter().map(|m| if m.is_here_still() { "still here" } else { "moved" }))
}

/// A word, or `within-budget 2, no-progress 1`.
pub(super) fn counts<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for word in words {
        *counts.entry(word).or_default() += 1;
    }
    match counts.iter().next() {
        Some((word, 1)) if counts.len() == 1 => (*word).into(),
        _ => counts.iter().map(|(word, count)| format!("{word} {count}")).collect::<Vec<_>>().join(", "),
    }
}

fn draw(results: &Results, path: &Path, title: &str, cells: &[&Cell]) -> Result<()> {
    let ratios: Vec<&str> =
        RATIOS.into_iter().filter(|ratio| cells.iter().any(|c| is(c, "r", ratio))).collect();
    let series = |of: fn(&Moved) -> Option<f64>| -> Vec<Dots> {
        let values = |priority: &str, ratio: &str| {
            let cell = cells.iter().find(|c| is(c, "r", ratio) && is(c, "priority", priority));
            cell.map(|c| results.ended(NAME, c).filter_map(|(_, m)| of(m)).collect()).unwrap_or_default()
        };
        let of_one = |priority: &str| ratios.iter().map(|r| ((*r).to_owned(), values(priority, r))).collect();
        PRIORITIES.map(|p| Series { name: p.to_owned(), values: of_one(p) }).into()
    };
    let totals = series(|m| Some(m.report.total_ms / 1e3));
    let pauses = series(|m| m.report.downtime_ms);
    let upper = format!("{title}. Total time");
    plot::two_of_dots(
        path,
        "r: what is dirtied over what the link carries",
        [
            Panel { title: &upper, axis: "total, s", series: &totals, limit: None },
            Panel {
                title: "The pause, of those that moved; the line is the limit",
                axis: "pause, ms",
                series: &pauses,
                limit: Some(BUDGET_MS as f64),
            },
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Report, Slowed};
    use crate::examples;
    use crate::record::{Outcome, Run};
    use crate::speed::Rate;

    /// 30 thousand pages a second before, of which a tenth is left while it moves.
    fn ended(pause_ms: Option<f64>) -> Moved {
        let rate = |pages_written| Rate { heartbeats: 1000.0, pages_written };
        let mut moved = examples::moved();
        moved.rounds[0].decision = if pause_ms.is_some() { "switch-over" } else { "abort" }.into();
        moved.report = Report {
            outcome: if pause_ms.is_some() { "moved" } else { "still-here" }.into(),
            stop_reason: Some("no-progress".into()),
            rounds: 7,
            total_ms: 2500.0,
            downtime_ms: pause_ms,
            slowed: Some(Slowed {
                most_percent: 90,
                lasted_ms: 1500.0,
                held_ms: 1.0,
                least_speed_percent: Some(11),
            }),
            guest_gap_ms: pause_ms.map(|ms| ms + 1.0),
            sent_bytes: 345_000_000,
            ..moved.report
        };
        moved.speed = Some(Speed { before: rate(30e3), during: rate(3e3), after: rate(29.7e3) });
        moved
    }

    fn run(priority: &str, run: u32, outcome: Outcome) -> Run {
        let pairs =
            [("bandwidth", "1Gbit"), ("working_set_percent", "5"), ("r", "0.95"), ("priority", priority)];
        let cell = cell(pairs.map(|(name, value)| (name, value.to_owned())));
        Run { set: NAME.into(), cell, what: "migration".into(), run, outcome }
    }

    #[test]
    fn a_guest_that_was_left_where_it_was_is_a_result_and_has_no_pause() {
        let runs = vec![
            run("balanced", 1, Outcome::Moved(Box::new(ended(Some(410.0))))),
            run("never-over-budget", 1, Outcome::Stayed(Box::new(ended(None)))),
        ];
        let directory = tempfile::tempdir().unwrap();
        let text = render(&Results { hosts: vec![], runs }, directory.path()).unwrap();
        let moved = "| 0.95 | 0.98 | balanced | moved | no | 2.5 | 410 | 411 | 345 | 7 | no-progress | 90 | 1.5 | 11 | 10 | 99 | 1000 | 100 | 100 |";
        let stayed = "| 0.95 | 0.98 | never-over-budget | still here | - | 2.5 | - | - | 345 |";
        assert!(text.contains(moved) && text.contains(stayed), "{text}");
        assert!(text.contains("### 1 Gbit/s, 5 % dirtied: 51 MiB") && !text.contains("10 Gbit/s"), "{text}");
        assert!(
            text.contains("| balanced | 1 | moved | no | 410 | 2.5 | 10 |") && !text.contains("Failed"),
            "{text}"
        );
        let plot = std::fs::read_to_string(directory.path().join("convergence-1Gbit-5.svg")).unwrap();
        assert!(plot.contains("never-over-budget") && plot.contains("pause, ms"));
    }

    #[test]
    fn several_runs_of_a_cell_are_counted_and_spread() {
        let at = |number, pause| run("balanced", number, Outcome::Moved(Box::new(ended(Some(pause)))));
        let failed = run("balanced", 4, Outcome::Failed("it broke".into()));
        let runs = vec![at(1, 200.0), at(2, 300.0), at(3, 301.0), failed];
        let directory = tempfile::tempdir().unwrap();
        let text = render(&Results { hosts: vec![], runs }, directory.path()).unwrap();
        assert!(text.contains("| moved 3 | 2 of 3 |") && text.contains("| 200 / 300 / 301 |"), "{text}");
        assert!(text.contains("no-progress 3") && text.contains("it broke"), "{text}");
    }

    #[test]
    fn the_guest_dirties_what_the_ratio_says() {
        let plan = plan(&LINKS[0], 5, "0.8".parse().unwrap(), "balanced");
        assert_eq!(plan.guest, "dirtier:rate=100000000,working-set=53687091,pattern=random");
        assert_eq!(plan.bandwidth.as_deref(), Some("1Gbit"));
        assert_eq!(plan.pause_bandwidth.as_deref(), Some("capped"));
    }
}
