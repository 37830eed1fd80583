//! A filled, idle guest over one, two, four channels and the engine's own choice, beside plain sockets.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::{Bench, Set};
use crate::migration::{Moved, Plan};
use crate::plot::{self, Series};
use crate::record::{Cell, Outcome, Results, cell};
use crate::spread::{Spread, median, one, three};
use crate::text::{GIB, MIB, Table, size, verdict};
use crate::yardstick::{Copied, Source, Target, Way};

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "an idle guest full of incompressible data over 1, 2, 4 channels and `auto`, beside plain sockets; \
            also memory and processor time",
    runs: 7,
    measure,
    render,
};

const NAME: &str = "wire";
const PREFAULTED: &str = "sockets, prefaulted";
const FRESH: &str = "sockets, fresh";
const AS_ENGINE: &str = "sockets, prefaulted, as the engine";
/// What one call of the plain yardstick is given.
const PLAIN_CALL_BYTES: usize = 1 << 20;
/// QEMU 10.0 with two multifd channels on a machine of this kind: the median of its rates.
const QEMU_BYTES_PER_SECOND: f64 = 3.1e9;

fn measure(bench: &mut Bench) -> Result<()> {
    let memory_bytes: u64 = if bench.quick { 512 << 20 } else { 4 << 30 };
    let mut choices = vec!["1", "2", "4"];
    if takes_auto(bench) {
        choices.push("auto");
    } else {
        eprintln!("wire: mig-send does not take --channels auto; skipped");
    }
    for run in bench.rounds() {
        for choice in &choices {
            let cell = cell([("channels", (*choice).to_owned()), ("memory", size(memory_bytes))]);
            let plan = Plan {
                guest: "idle:fill=random".into(),
                channels: Some((*choice).to_owned()),
                ..Plan::idle(memory_bytes, 2)
            };
            // Which comes first changes, unless the yardstick has to know what was chosen.
            let streams: Option<usize> = choice.parse().ok();
            match streams.filter(|_| run % 2 == 1) {
                Some(streams) => {
                    yardsticks(bench, &cell, run, streams, memory_bytes)?;
                    bench.migrate(&cell, run, &plan)?;
                }
                None => {
                    let outcome = bench.migrate(&cell, run, &plan)?;
                    let chosen = match &outcome {
                        Outcome::Moved(moved) => Some(moved.channels as usize),
                        _ => streams,
                    };
                    if let Some(streams) = chosen {
                        yardsticks(bench, &cell, run, streams, memory_bytes)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Asks a holder that is not there: an option that is not understood is noticed before.
fn takes_auto(bench: &Bench) -> bool {
    let mut command = Command::new(&bench.programs.send);
    command.args(["--vm", "unix:/nowhere/there-is-no-such-socket", "--to", "tcp:127.0.0.1:1"]);
    let output = command.args(["--channels", "auto", "--json"]).output();
    output.is_ok_and(|output| !String::from_utf8_lossy(&output.stdout).contains(r#""step":"options""#))
}

fn yardsticks(bench: &mut Bench, cell: &Cell, run: u32, streams: usize, bytes: u64) -> Result<()> {
    let place = &|command| command;
    let mut source =
        match usize::try_from(bytes).map_err(Into::into).and_then(|bytes| Source::start(bytes, place)) {
            Ok(source) => source,
            Err(error) => {
                bench.run(cell, PREFAULTED, run, |_| Err(error))?;
                return Ok(());
            }
        };
    let plain = Way { streams, call_bytes: PLAIN_CALL_BYTES, buffer_bytes: None };
    let as_engine =
        Way { streams, call_bytes: bench.engine_call_bytes, buffer_bytes: bench.engine_buffer_bytes };
    for (what, way, target) in [
        (PREFAULTED, plain, Target::Prefaulted),
        (FRESH, plain, Target::Fresh),
        (AS_ENGINE, as_engine, Target::Prefaulted),
    ] {
        bench
            .run(cell, what, run, |_| Ok(Outcome::Copied(source.copy(way, target, "127.0.0.1", place)?)))?;
    }
    Ok(())
}

fn render(results: &Results, directory: &Path) -> Result<String> {
    let cells = results.cells(NAME);
    let mut text = String::new();
    text += &results.failures(NAME);
    text += &rates(results, &cells);
    text += &times(results, &cells);
    text += &costs(results, &cells);
    let series = |name: &str, values: &dyn Fn(&Cell) -> Vec<f64>| Series {
        name: name.into(),
        values: cells.iter().map(|cell| (channels(cell).to_owned(), values(cell))).collect(),
    };
    plot::dots(
        &directory.join("wire.svg"),
        "Bytes a second by channels (each run, and the median)",
        ["channels", "GB/s"],
        &[
            series("round 0", &|cell| results.moved(NAME, cell).map(|(_, m)| round_0(m) / 1e9).collect()),
            series("sockets, prefaulted", &|cell| copies(results, cell, PREFAULTED)),
            series("whole migration", &|cell| {
                results.moved(NAME, cell).map(|(_, m)| whole(m) / 1e9).collect()
            }),
            series("sockets, fresh", &|cell| copies(results, cell, FRESH)),
        ],
    )?;
    text += "![bytes a second](wire.svg)\n\n";
    Ok(text)
}

fn rates(results: &Results, cells: &[&Cell]) -> String {
    let mut table = Table::new(&[
        "channels",
        "runs",
        "round 0, GB/s",
        "sockets, prefaulted, GB/s",
        "ratio, run by run",
        "ratio of medians",
        "target: 0.95 (floor 0.90)",
        "sockets as the engine, GB/s",
        "ratio of medians",
    ]);
    for cell in cells {
        let ours: Vec<(u32, f64)> = results.moved(NAME, cell).map(|(run, m)| (run, round_0(m))).collect();
        let plain: Vec<(u32, f64)> =
            results.copied(NAME, cell, PREFAULTED).map(|(run, c)| (run, c.bytes_per_second())).collect();
        let paired = ratios(&ours, &plain);
        let median_of = |of: &[(u32, f64)]| median(of.iter().map(|(_, v)| *v));
        let ratio = median_of(&ours) / median_of(&plain);
        let as_engine = median(copies(results, cell, AS_ENGINE)) * 1e9;
        let judged = Spread::of(paired.clone()).map(|ratio| match ratio.median {
            ratio if ratio >= 0.95 => "met".to_owned(),
            ratio if ratio >= 0.90 => "floor met".to_owned(),
            _ => "**missed**".to_owned(),
        });
        table.row(&[
            chosen(results, cell),
            ours.len().to_string(),
            three(ours.iter().map(|(_, v)| v / 1e9), 2),
            three(copies(results, cell, PREFAULTED), 2),
            three(paired, 2),
            one(ratio, 2),
            judged.unwrap_or("-".into()),
            three(copies(results, cell, AS_ENGINE), 2),
            one(median_of(&ours) / as_engine, 2),
        ]);
    }
    table.finish() + &best(results, cells)
}

/// Whether `auto` is the best of them.
fn best(results: &Results, cells: &[&Cell]) -> String {
    let rate = |cell: &Cell| median(results.moved(NAME, cell).map(|(_, m)| round_0(m)));
    let fixed = cells.iter().filter(|cell| channels(cell) != "auto");
    let Some(best) = fixed.max_by(|a, b| rate(a).total_cmp(&rate(b))) else { return String::new() };
    let Some(auto) = cells.iter().find(|cell| channels(cell) == "auto") else { return String::new() };
    let ratio = rate(auto) / rate(best);
    let picked = results.moved(NAME, auto).filter(|(_, m)| m.channels.to_string() == channels(best)).count();
    let of = results.moved(NAME, auto).count();
    format!(
        "`auto` is to be the best: {:.2} of the best fixed number, {}, which it chose in {picked} of {of} runs: {}.\n\n",
        ratio,
        channels(best),
        verdict((of > 0).then_some(ratio >= 1.0 || 2 * picked > of)),
    )
}

fn times(results: &Results, cells: &[&Cell]) -> String {
    let mut table = Table::new(&[
        "channels",
        "total, s",
        "whole, GB/s",
        "sockets, fresh, GB/s",
        "ratio, run by run",
        "target: no longer than QEMU's multifd",
        "pause, ms",
        "gap, ms",
        "target: gap 2.5",
        "pause - gap, ms",
        "target: 0.5",
    ]);
    for cell in cells {
        let moved = || results.moved(NAME, cell).map(|(_, m)| m);
        let whole_rates: Vec<(u32, f64)> =
            results.moved(NAME, cell).map(|(run, m)| (run, whole(m))).collect();
        let fresh: Vec<(u32, f64)> =
            results.copied(NAME, cell, FRESH).map(|(run, c)| (run, c.bytes_per_second())).collect();
        let gaps: Vec<f64> = moved().filter_map(|m| m.report.guest_gap_ms).collect();
        let differences: Vec<f64> =
            moved().filter_map(|m| Some(m.report.downtime_ms? - m.report.guest_gap_ms?)).collect();
        let qemu = moved().next().map(|m| m.report.ram_bytes as f64 / QEMU_BYTES_PER_SECOND);
        let total = Spread::of(moved().map(|m| m.report.total_ms / 1e3));
        table.row(&[
            chosen(results, cell),
            three(moved().map(|m| m.report.total_ms / 1e3), 2),
            three(whole_rates.iter().map(|(_, v)| v / 1e9), 2),
            three(copies(results, cell, FRESH), 2),
            three(ratios(&whole_rates, &fresh), 2),
            qemu.zip(total).map_or("-".into(), |(qemu, total)| {
                format!("{qemu:.2} s: {}", verdict(Some(total.median <= qemu)))
            }),
            three(moved().filter_map(|m| m.report.downtime_ms), 2),
            three(gaps.iter().copied(), 2),
            verdict(Spread::of(gaps).map(|s| s.median <= 2.5)),
            three(differences.iter().copied(), 2),
            verdict(Spread::of(differences.iter().map(|d| d.abs())).map(|s| s.median <= 0.5)),
        ]);
    }
    table.finish()
}

/// Memory and processor time.
fn costs(results: &Results, cells: &[&Cell]) -> String {
    let mut table = Table::new(&[
        "channels",
        "source beyond the guest, MiB",
        "destination beyond the guest, MiB",
        "target: 64",
        "source, CPU s/GiB",
        "destination, CPU s/GiB",
        "sockets, prefaulted: sender",
        "receiver",
        "sockets, fresh: sender",
        "receiver",
    ]);
    for cell in cells {
        let moved = || results.moved(NAME, cell).map(|(_, m)| m);
        let beyond = |side: fn(&Moved) -> u64| moved().map(move |m| side(m) as f64 / MIB).collect::<Vec<_>>();
        let (here, there) =
            (beyond(|m| m.source.beyond_guest_bytes), beyond(|m| m.destination.beyond_guest_bytes));
        let most = Spread::of(here.iter().chain(&there).copied());
        let cpu =
            |side: fn(&Moved) -> f64| three(moved().map(|m| side(m) / (m.report.ram_bytes as f64 / GIB)), 2);
        let copy = |what, side: fn(&Copied) -> f64| {
            let per_gib = results.copied(NAME, cell, what).map(|(_, c)| side(c) / (c.bytes as f64 / GIB));
            one(median(per_gib), 2)
        };
        table.row(&[
            chosen(results, cell),
            three(here, 1),
            three(there, 1),
            verdict(most.map(|s| s.max <= 64.0)),
            cpu(|m| m.source.cpu_s),
            cpu(|m| m.destination.cpu_s),
            copy(PREFAULTED, |c| c.source_cpu_s),
            copy(PREFAULTED, |c| c.destination_cpu_s),
            copy(FRESH, |c| c.source_cpu_s),
            copy(FRESH, |c| c.destination_cpu_s),
        ]);
    }
    table.finish()
}

fn channels(cell: &Cell) -> &str {
    cell.get("channels").map_or("", String::as_str)
}

/// The choice, and what came of it where it was not a number.
fn chosen(results: &Results, cell: &Cell) -> String {
    let mut found: Vec<u32> = results.moved(NAME, cell).map(|(_, m)| m.channels).collect();
    found.sort_unstable();
    found.dedup();
    let found: Vec<String> = found.iter().map(u32::to_string).collect();
    let memory = cell.get("memory").map_or("", String::as_str);
    match channels(cell) {
        "auto" => format!("auto ({}), {memory}", found.join(", ")),
        number => format!("{number}, {memory}"),
    }
}

fn round_0(moved: &Moved) -> f64 {
    moved.rounds.first().map_or(f64::NAN, |round| round.bytes_per_second())
}

fn whole(moved: &Moved) -> f64 {
    moved.report.sent_bytes as f64 / (moved.report.total_ms / 1e3)
}

fn copies(results: &Results, cell: &Cell, what: &str) -> Vec<f64> {
    results.copied(NAME, cell, what).map(|(_, c)| c.bytes_per_second() / 1e9).collect()
}

/// What both have of the same run, one over the other.
fn ratios(of: &[(u32, f64)], over: &[(u32, f64)]) -> Vec<f64> {
    of.iter()
        .filter_map(|(run, value)| Some(value / over.iter().find(|(other, _)| other == run)?.1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_run() {
        assert_eq!(ratios(&[(1, 2.0), (2, 9.0), (3, 8.0)], &[(3, 4.0), (1, 4.0)]), [0.5, 2.0]);
    }
}
