//! What encoding saves, by what the memory holds.

use std::path::Path;

use anyhow::Result;

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
    about: "1 GiB of text, of a database's records and of random bytes over 1 Gbit/s, by --compress: bytes and time",
    runs: 3,
    measure,
    render,
};

const NAME: &str = "memory-kinds";
const KINDS: [&str; 3] = ["text", "heap", "random"];
const ENCODINGS: [&str; 4] = ["off", "zstd", "delta", "auto"];
const BANDWIDTH: &str = "1Gbit";

fn measure(bench: &mut Bench) -> Result<()> {
    let memory_bytes: u64 = if bench.quick { 128 << 20 } else { 1 << 30 };
    // No warm-up: a cell's runs lie far apart, with all others between them.
    for run in 1..=bench.runs {
        for (kind, encoding) in KINDS.iter().flat_map(|k| ENCODINGS.map(|e| (*k, e))) {
            let plan = Plan {
                guest: format!("idle:fill={kind}"),
                bandwidth: Some(BANDWIDTH.into()),
                compress: Some(encoding.into()),
                ..Plan::idle(memory_bytes, 2)
            };
            let cell = cell([("memory", kind.into()), ("compress", encoding.into())]);
            bench.migrate(&cell, run, &plan)?;
        }
    }
    Ok(())
}

fn find<'a>(cells: &[&'a Cell], kind: &str, encoding: &str) -> Option<&'a Cell> {
    let is = |c: &Cell, name, value| c.get(name).map(String::as_str) == Some(value);
    cells.iter().copied().find(|c| is(c, "memory", kind) && is(c, "compress", encoding))
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let cells = results.cells(NAME);
    let mut table = Table::new(&[
        "memory",
        "--compress",
        "runs",
        "sent, MB",
        "of off, %",
        "total, s",
        "of off, %",
        "pages: zero",
        "raw",
        "zstd",
        "delta",
        "source, CPU s/GiB",
        "destination",
    ]);
    for (kind, encoding) in KINDS.iter().flat_map(|k| ENCODINGS.map(|e| (*k, e))) {
        let Some(cell) = find(&cells, kind, encoding) else { continue };
        let moved = || results.moved(NAME, cell).map(|(_, m)| m);
        let off = |of: fn(&Report) -> f64| {
            let off = find(&cells, kind, "off");
            median(off.iter().flat_map(|c| results.moved(NAME, c)).map(|(_, m)| of(&m.report)))
        };
        let sent = |report: &Report| report.sent_bytes as f64 / 1e6;
        let total = |report: &Report| report.total_ms / 1e3;
        let pages = |of: fn(&Pages) -> u64| one(median(moved().map(|m| of(&m.report.pages) as f64)), 0);
        let cpu = |of: fn(&Moved) -> f64| {
            one(median(moved().map(|m| of(m) / (m.report.ram_bytes as f64 / GIB))), 2)
        };
        table.row(&[
            kind.into(),
            encoding.into(),
            moved().count().to_string(),
            three(moved().map(|m| sent(&m.report)), 0),
            one(median(moved().map(|m| sent(&m.report))) / off(sent) * 100.0, 0),
            three(moved().map(|m| total(&m.report)), 2),
            one(median(moved().map(|m| total(&m.report))) / off(total) * 100.0, 0),
            pages(|p| p.zero),
            pages(|p| p.raw),
            pages(|p| p.zstd),
            pages(|p| p.delta),
            cpu(|m| m.source.cpu_s),
            cpu(|m| m.destination.cpu_s),
        ]);
    }
    let totals = |encoding: &str, kind: &str| {
        let cell = find(&cells, kind, encoding);
        cell.iter().flat_map(|c| results.moved(NAME, c)).map(|(_, m)| m.report.total_ms / 1e3).collect()
    };
    let series: Vec<Dots> = ENCODINGS
        .iter()
        .map(|encoding| Series {
            name: (*encoding).into(),
            values: KINDS.iter().map(|kind| ((*kind).to_owned(), totals(encoding, kind))).collect(),
        })
        .collect();
    let title = format!("Total time over {BANDWIDTH}/s, by what memory holds");
    plot::dots(&directory.join("memory-kinds.svg"), &title, ["memory", "total, s"], &series)?;
    Ok(results.failures(NAME) + &table.finish() + "![total time](memory-kinds.svg)\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::Cost;
    use crate::record::{Outcome, Run};

    fn run(encoding: &str, sent_bytes: u64, total_ms: f64) -> Run {
        let report = Report {
            outcome: "moved".into(),
            stop_reason: Some("few-pages".into()),
            rounds: 2,
            total_ms,
            downtime_ms: Some(1.0),
            downtime: None,
            predicted_downtime_ms: None,
            predicted_downtime: None,
            shortfall: None,
            slowed: None,
            guest_gap_ms: None,
            sent_bytes,
            pages: Pages { zero: 1, raw: 2, zstd: 3, delta: 4 },
            ram_bytes: 512 << 20,
            fault: None,
        };
        let cost = |cpu_s| Cost { cpu_s, ..Cost::default() };
        let (source, destination) = (cost(2.0), cost(0.5));
        let moved = Moved { channels: 2, report, rounds: vec![], speed: None, source, destination };
        let cell = cell([("memory", "text".into()), ("compress", encoding.into())]);
        let outcome = Outcome::Moved(Box::new(moved));
        Run { set: NAME.into(), cell, what: "migration".into(), run: 1, outcome }
    }

    #[test]
    fn what_an_encoding_saves_is_in_percent_of_off() {
        let runs = vec![run("zstd", 100_000_000, 2000.0), run("off", 400_000_000, 8000.0)];
        let directory = tempfile::tempdir().unwrap();
        let text = render(&Results { hosts: vec![], runs }, directory.path()).unwrap();
        let zstd = "| text | zstd | 1 | 100 / 100 / 100 | 25 | 2.00 / 2.00 / 2.00 | 25 | 1 | 2 | 3 | 4 | 4.00 | 1.00 |";
        assert!(text.contains(zstd) && text.contains("| text | off | 1 | 400 / 400 / 400 | 100 |"), "{text}");
        assert!(!text.contains("heap"), "{text}");
        assert!(std::fs::read_to_string(directory.path().join("memory-kinds.svg")).unwrap().contains("auto"));
    }
}
