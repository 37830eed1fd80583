//! What encoding saves, by what the memory holds.

use std::path::Path;

use anyhow::Result;

use super::convergence::counts;
use super::{Bench, Set};
use crate::events::{Pages, Report};
use crate::migration::{Moved, Plan};
use crate::plot::{self, Dots, Series};
use crate::record::{Cell, Results, cell};
use crate::spread::{median, one, three};
use crate::text::{GIB, Table};

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "512 MiB of text, of a database's records and of random bytes over 1 Gbit/s, idle, and with a quarter \
            dirtied at 0.8 times what the link carries, by --compress: bytes and time",
    runs: 3,
    measure,
    render,
};

const NAME: &str = "memory-kinds";
const KINDS: [&str; 3] = ["text", "heap", "random"];
const ENCODINGS: [&str; 4] = ["off", "zstd", "delta", "auto"];
const BANDWIDTH: &str = "1Gbit";
/// 0.8 of what that carries.
const DIRTIED_BYTES_PER_SECOND: u64 = 100_000_000;
/// What the guest does.
const DOES: [&str; 2] = ["idle", "dirties"];

fn measure(bench: &mut Bench) -> Result<()> {
    let memory_bytes: u64 = if bench.quick { 128 << 20 } else { 512 << 20 };
    // No warm-up: a cell's runs lie far apart, with all others between them.
    for run in 1..=bench.runs {
        for (does, kind, encoding) in cases() {
            let cell = cell([("guest", does.into()), ("memory", kind.into()), ("compress", encoding.into())]);
            bench.migrate(&cell, run, &plan(does, kind, encoding, memory_bytes))?;
        }
    }
    Ok(())
}

fn cases() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    let of = |does| KINDS.into_iter().flat_map(move |kind| ENCODINGS.map(|encoding| (does, kind, encoding)));
    DOES.into_iter().flat_map(of)
}

fn plan(does: &str, kind: &str, encoding: &str, memory_bytes: u64) -> Plan {
    let idle = Plan {
        guest: format!("idle:fill={kind}"),
        bandwidth: Some(BANDWIDTH.into()),
        compress: Some(encoding.into()),
        ..Plan::idle(memory_bytes, 2)
    };
    if does == "idle" {
        return idle;
    }
    Plan {
        guest: format!(
            "dirtier:rate={DIRTIED_BYTES_PER_SECOND},working-set={},pattern=random,fill={kind}",
            memory_bytes / 4
        ),
        // the cap stands for the link, which does not grow for the pause
        pause_bandwidth: Some("capped".into()),
        ..idle
    }
}

fn find<'a>(cells: &[&'a Cell], does: &str, kind: &str, encoding: &str) -> Option<&'a Cell> {
    let is = |c: &Cell, name, value| c.get(name).map(String::as_str) == Some(value);
    // results of before there was a choice are of idle guests
    let does_it = |c: &Cell| c.get("guest").map_or("idle", String::as_str) == does;
    cells.iter().copied().find(|c| does_it(c) && is(c, "memory", kind) && is(c, "compress", encoding))
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let cells = results.cells(NAME);
    let mut table = Table::new(&[
        "guest",
        "memory",
        "--compress",
        "runs",
        "sent, MB",
        "of off, %",
        "total, s",
        "of off, %",
        "rounds",
        "pause, ms",
        "slowed by at most, %",
        "ended by",
        "pages: zero",
        "raw",
        "zstd",
        "delta",
        "source, CPU s/GiB",
        "destination",
    ]);
    for (does, kind, encoding) in cases() {
        let Some(cell) = find(&cells, does, kind, encoding) else { continue };
        let moved = || results.moved(NAME, cell).map(|(_, m)| m);
        let off = |of: fn(&Report) -> f64| {
            let off = find(&cells, does, kind, "off");
            median(off.iter().flat_map(|c| results.moved(NAME, c)).map(|(_, m)| of(&m.report)))
        };
        let sent = |report: &Report| report.sent_bytes as f64 / 1e6;
        let total = |report: &Report| report.total_ms / 1e3;
        let pages = |of: fn(&Pages) -> u64| one(median(moved().map(|m| of(&m.report.pages) as f64)), 0);
        let cpu = |of: fn(&Moved) -> f64| {
            one(median(moved().map(|m| of(m) / (m.report.ram_bytes as f64 / GIB))), 2)
        };
        table.row(&[
            does.into(),
            kind.into(),
            encoding.into(),
            moved().count().to_string(),
            three(moved().map(|m| sent(&m.report)), 0),
            one(median(moved().map(|m| sent(&m.report))) / off(sent) * 100.0, 0),
            three(moved().map(|m| total(&m.report)), 2),
            one(median(moved().map(|m| total(&m.report))) / off(total) * 100.0, 0),
            three(moved().map(|m| f64::from(m.report.rounds)), 0),
            three(moved().filter_map(|m| m.report.downtime_ms), 0),
            three(moved().map(|m| m.report.slowed.map_or(0.0, |s| f64::from(s.most_percent))), 0),
            counts(moved().map(|m| m.report.stop_reason.as_deref().unwrap_or("none"))),
            pages(|p| p.zero),
            pages(|p| p.raw),
            pages(|p| p.zstd),
            pages(|p| p.delta),
            cpu(|m| m.source.cpu_s),
            cpu(|m| m.destination.cpu_s),
        ]);
    }
    let mut text = results.failures(NAME) + &table.finish();
    for does in DOES {
        let plot = format!("{NAME}-{does}.svg");
        draw(results, &cells, does, &directory.join(&plot))?;
        text += &format!("![total time]({plot})\n\n");
    }
    Ok(text)
}

fn draw(results: &Results, cells: &[&Cell], does: &str, path: &Path) -> Result<()> {
    let totals = |encoding: &str, kind: &str| {
        let cell = find(cells, does, kind, encoding);
        cell.iter().flat_map(|c| results.moved(NAME, c)).map(|(_, m)| m.report.total_ms / 1e3).collect()
    };
    let series: Vec<Dots> = ENCODINGS
        .iter()
        .map(|encoding| Series {
            name: (*encoding).into(),
            values: KINDS.iter().map(|kind| ((*kind).to_owned(), totals(encoding, kind))).collect(),
        })
        .collect();
    let title = format!("{does}: total time over {BANDWIDTH}/s, by what memory holds");
    plot::dots(path, &title, ["memory", "total, s"], &series)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples;
    use crate::record::{Outcome, Run};

    fn run(does: Option<&str>, encoding: &str, sent_bytes: u64, total_ms: f64) -> Run {
        let mut moved = examples::moved();
        (moved.report.sent_bytes, moved.report.total_ms) = (sent_bytes, total_ms);
        let mut cell = cell([("memory", "text".into()), ("compress", encoding.into())]);
        cell.extend(does.map(|does| ("guest".to_owned(), does.to_owned())));
        let outcome = Outcome::Moved(Box::new(moved));
        Run { set: NAME.into(), cell, what: "migration".into(), run: 1, outcome }
    }

    #[test]
    fn what_an_encoding_saves_is_in_percent_of_off() {
        let runs = vec![
            run(None, "zstd", 100_000_000, 2000.0),
            run(None, "off", 400_000_000, 8000.0),
            run(Some("dirties"), "off", 500_000_000, 9000.0),
            run(Some("dirties"), "delta", 250_000_000, 4500.0),
        ];
        let directory = tempfile::tempdir().unwrap();
        let text = render(&Results { hosts: vec![], runs }, directory.path()).unwrap();
        let zstd = "| idle | text | zstd | 1 | 100 / 100 / 100 | 25 | 2.00 / 2.00 / 2.00 | 25 | 2 / 2 / 2 | 1 / 1 / 1 | 0 / 0 / 0 | few-pages | 1 | 2 | 3 | 4 | 4.00 | 1.00 |";
        assert!(
            text.contains(zstd) && text.contains("| idle | text | off | 1 | 400 / 400 / 400 | 100 |"),
            "{text}"
        );
        assert!(text.contains("| dirties | text | delta | 1 | 250 / 250 / 250 | 50 |"), "{text}");
        assert!(!text.contains("heap"), "{text}");
        for plot in ["memory-kinds-idle.svg", "memory-kinds-dirties.svg"] {
            assert!(std::fs::read_to_string(directory.path().join(plot)).unwrap().contains("auto"));
        }
    }

    #[test]
    fn a_guest_that_dirties_has_the_same_memory_and_less_than_the_link_carries() {
        let plan = plan("dirties", "heap", "auto", 512 << 20);
        assert_eq!(plan.guest, "dirtier:rate=100000000,working-set=134217728,pattern=random,fill=heap");
        assert_eq!(
            (plan.pause_bandwidth.as_deref(), plan.compress.as_deref()),
            (Some("capped"), Some("auto"))
        );
    }
}
