//! How the pause grows with vCPUs and with memory.

use std::path::Path;

use anyhow::Result;

use super::{Bench, Set};
use crate::migration::Plan;
use crate::plot::{self, Series};
use crate::record::{Cell, Results, cell};
use crate::spread::{median, one, three};
use crate::text::Table;

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "the parts of the pause over 1 to 16 vCPUs, over 1 to 16 GiB never touched, and 1 to 6 GiB filled",
    runs: 7,
    measure,
    render,
};

const NAME: &str = "pause";
/// The axes, and what of a plan they change.
const AXES: [&str; 3] = ["vCPUs", "GiB", "GiB, filled"];

fn measure(bench: &mut Bench) -> Result<()> {
    let [vcpus, memory, filled]: [&[u32]; 3] = if bench.quick {
        [&[1, 4], &[1, 2], &[]]
    } else {
        [&[1, 2, 4, 8, 16], &[1, 2, 4, 8, 16], &[1, 2, 4, 6]]
    };
    for run in bench.rounds() {
        for (axis, values) in AXES.iter().zip([vcpus, memory, filled]) {
            for value in values {
                let gib = |count: u32| u64::from(count) << 30;
                let plan = match *axis {
                    "vCPUs" => Plan::idle(gib(1), *value),
                    "GiB" => Plan::idle(gib(*value), 2),
                    _ => Plan { guest: "idle:fill=random".into(), ..Plan::idle(gib(*value), 2) },
                };
                let cell = cell([("axis", (*axis).to_owned()), ("value", value.to_string())]);
                bench.migrate(&cell, run, &plan)?;
            }
        }
    }
    Ok(())
}

fn value(cell: &Cell) -> f64 {
    cell.get("value").and_then(|v| v.parse().ok()).unwrap_or(f64::NAN)
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let mut text = results.failures(NAME);
    let mut lines = Vec::new();
    for axis in AXES {
        let cells = results.cells(NAME);
        let mut cells: Vec<&Cell> =
            cells.into_iter().filter(|c| c.get("axis").map(String::as_str) == Some(axis)).collect();
        cells.sort_by(|a, b| value(a).total_cmp(&value(b)));
        if cells.is_empty() {
            continue;
        }
        let parts = ["pause", "save", "last sync", "transfer", "load", "commit", "resume"];
        let mut head = vec![axis, "runs", "pause, ms", "gap, ms"];
        head.extend(parts);
        head.extend(["predicted, ms", "total, s"]);
        let mut table = Table::new(&head);
        let mut pauses = Vec::new();
        for cell in &cells {
            let moved = || results.moved(NAME, cell).map(|(_, m)| m);
            let part = |name: &str| {
                let found = moved().filter_map(|m| m.report.downtime);
                median(found.filter_map(|d| d.parts().into_iter().find(|p| p.0 == name).map(|p| p.1)))
            };
            let mut row = vec![
                value(cell).to_string(),
                moved().count().to_string(),
                three(moved().filter_map(|m| m.report.downtime_ms), 2),
                three(moved().filter_map(|m| m.report.guest_gap_ms), 2),
            ];
            row.extend(parts.map(|name| one(part(name), 2)));
            row.push(three(moved().filter_map(|m| m.report.predicted_downtime_ms), 2));
            row.push(three(moved().map(|m| m.report.total_ms / 1e3), 2));
            table.row(&row);
            let pause = median(moved().filter_map(|m| m.report.downtime_ms));
            pauses.extend(pause.is_finite().then_some((value(cell), pause)));
        }
        text += &table.finish();
        text += &flatness(axis, &pauses);
        lines.push(Series { name: axis.to_owned(), values: pauses });
    }
    let unit = ["vCPUs, or GiB of memory", "median pause, ms"];
    plot::lines(&directory.join("pause.svg"), "The pause as the guest grows", unit, &lines)?;
    Ok(text + "The parts are medians. ![the pause](pause.svg)\n\n")
}

/// What one more of something costs, from the least to the most.
fn flatness(axis: &str, pauses: &[(f64, f64)]) -> String {
    let [first, .., last] = pauses else { return String::new() };
    let slope = (last.1 - first.1) / (last.0 - first.0) * 1e3;
    format!(
        "From {} to {} {axis}: {:+.2} ms, which is {slope:+.0} µs each. Target: flat.\n\n",
        first.0,
        last.0,
        last.1 - first.1
    )
}
