//! A guest that never touched its memory.

use std::path::Path;

use anyhow::Result;

use super::{Bench, Set};
use crate::migration::Plan;
use crate::record::{Results, cell};
use crate::spread::{Spread, three};
use crate::text::{MIB, Table, size, verdict};

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "an idle guest that never touched its memory: time, and memory of the destination",
    runs: 7,
    measure,
    render,
};

const NAME: &str = "untouched";

fn measure(bench: &mut Bench) -> Result<()> {
    let memory_bytes: u64 = if bench.quick { 512 << 20 } else { 4 << 30 };
    for run in bench.rounds() {
        bench.migrate(&cell([("memory", size(memory_bytes))]), run, &Plan::idle(memory_bytes, 2))?;
    }
    Ok(())
}

fn render(results: &Results, _: &Path) -> Result<String> {
    let mut table = Table::new(&[
        "memory",
        "runs",
        "total, s",
        "target: 0.3",
        "sent, MiB",
        "destination resident, MiB",
        "target: under 100",
        "of it the guest's",
        "source resident, MiB",
        "pause, ms",
        "gap, ms",
    ]);
    for cell in results.cells(NAME) {
        let moved = || results.moved(NAME, cell).map(|(_, m)| m);
        let total = Spread::of(moved().map(|m| m.report.total_ms / 1e3));
        let resident =
            || moved().map(|m| (m.destination.guest_bytes + m.destination.beyond_guest_bytes) as f64 / MIB);
        table.row(&[
            cell.get("memory").cloned().unwrap_or_default(),
            moved().count().to_string(),
            three(moved().map(|m| m.report.total_ms / 1e3), 3),
            verdict(total.map(|s| s.median <= 0.3)),
            three(moved().map(|m| m.report.sent_bytes as f64 / MIB), 1),
            three(resident(), 1),
            verdict(Spread::of(resident()).map(|s| s.median < 100.0)),
            three(moved().map(|m| m.destination.guest_bytes as f64 / MIB), 1),
            three(moved().map(|m| (m.source.guest_bytes + m.source.beyond_guest_bytes) as f64 / MIB), 1),
            three(moved().filter_map(|m| m.report.downtime_ms), 2),
            three(moved().filter_map(|m| m.report.guest_gap_ms), 2),
        ]);
    }
    Ok(results.failures(NAME) + &table.finish())
}
