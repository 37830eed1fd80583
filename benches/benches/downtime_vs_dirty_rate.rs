//! The downtime of real migrations, over dirty rate, working set, memory, channels and a cap on bandwidth.
//!
//! What criterion is given as the time is the downtime that the source reports; total time, bytes and rounds are
//! printed beside it, and written to `target/downtime_vs_dirty_rate.jsonl` with every run. A copy of the working
//! set over plain sockets, on the same link, is the yardstick. A cap needs root: two hosts are made as network
//! namespaces, whose link has a token bucket.
//!
//! A case on its own: `cargo bench -p mig-benches --bench downtime_vs_dirty_rate -- 50k`. The whole matrix, which
//! takes hours: `MIG_BENCH_FULL=1`.

#![allow(missing_docs)] // criterion's macros make undocumented functions

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, criterion_group};
use mig_benches::migration::{self, Moved, Plan};
use mig_benches::netns::Hosts;
use mig_benches::programs::Programs;
use mig_benches::spread::three;
use mig_benches::yardstick::{Copied, Source, Target, Way};
use mig_benches::{child, text};
use serde_json::json;

const PAGE_BYTES: u64 = 4096;
/// Criterion's least.
const SAMPLES: usize = 10;
/// A run that fails is tried again so often before the bench gives up.
const TRIES: usize = 3;

/// A case.
#[derive(Debug, Clone, Copy)]
struct Case {
    /// Pages the guest dirties a second.
    dirty_rate: u64,
    working_set_bytes: u64,
    memory_bytes: u64,
    channels: u16,
    /// Bits a second.
    cap: Option<u64>,
}

const BASE: Case =
    Case { dirty_rate: 50_000, working_set_bytes: 64 << 20, memory_bytes: 512 << 20, channels: 2, cap: None };

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dirty_rate, working_set_bytes, memory_bytes, channels, cap } = self;
        write!(
            f,
            "{}k of {} in {}, {channels} ch",
            dirty_rate / 1000,
            text::size(*working_set_bytes),
            text::size(*memory_bytes)
        )?;
        cap.map_or(Ok(()), |bits| write!(f, ", {} Gbit", bits as f64 / 1e9))
    }
}

/// One quantity changes at a time; all of them together in the full matrix.
fn cases() -> Vec<Case> {
    if std::env::var_os("MIG_BENCH_FULL").is_none_or(|v| v.is_empty() || v == "0") {
        return vec![
            Case { dirty_rate: 0, ..BASE },
            Case { dirty_rate: 10_000, ..BASE },
            BASE,
            Case { dirty_rate: 100_000, ..BASE },
            Case { working_set_bytes: 256 << 20, ..BASE },
            Case { memory_bytes: 2 << 30, ..BASE },
            Case { channels: 1, ..BASE },
            Case { cap: Some(2_000_000_000), ..BASE },
        ];
    }
    let mut all = Vec::new();
    for dirty_rate in [0, 10_000, 50_000, 100_000, 200_000] {
        for working_set_bytes in [64 << 20, 256 << 20, 2 << 30] {
            for memory_bytes in [1 << 30, 4 << 30] {
                for channels in [1, 2, 4] {
                    for cap in [None, Some(1_000_000_000), Some(10_000_000_000)] {
                        if working_set_bytes < memory_bytes {
                            all.push(Case { dirty_rate, working_set_bytes, memory_bytes, channels, cap });
                        }
                    }
                }
            }
        }
    }
    all
}

impl Case {
    fn plan(&self) -> Plan {
        let guest = match self.dirty_rate {
            0 => "idle".into(),
            rate => format!(
                "dirtier:rate={},working-set={}MiB,pattern=random",
                rate * PAGE_BYTES,
                self.working_set_bytes >> 20
            ),
        };
        Plan { guest, channels: Some(self.channels.to_string()), ..Plan::idle(self.memory_bytes, 2) }
    }

    fn copy(&self, hosts: Option<&Hosts>) -> anyhow::Result<Copied> {
        let here = |command: Command| match hosts {
            Some(hosts) => hosts.on_source(command),
            None => command,
        };
        let there = |command: Command| match hosts {
            Some(hosts) => hosts.on_destination(command),
            None => command,
        };
        let way = Way { streams: self.channels.into(), call_bytes: 1 << 20, buffer_bytes: None };
        let mut source = Source::start(usize::try_from(self.working_set_bytes)?, &here)?;
        source.copy(way, Target::Prefaulted, hosts.map_or("127.0.0.1", |_| Hosts::LISTEN), &there)
    }
}

fn downtime_vs_dirty_rate(criterion: &mut Criterion) {
    let programs = match Programs::find(None) {
        Ok(programs) => programs,
        Err(error) => return eprintln!("SKIPPED: {error:#}"),
    };
    let raw = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/downtime_vs_dirty_rate.jsonl");
    let mut raw = File::create(&raw).expect("target can be written");
    let mut group = criterion.benchmark_group("downtime_vs_dirty_rate");
    group.sampling_mode(SamplingMode::Flat).sample_size(SAMPLES);
    // A migration a sample: what criterion would plan with is the downtime, and not the time of a run.
    group.warm_up_time(Duration::from_nanos(1)).measurement_time(Duration::from_nanos(1));
    for case in cases() {
        let hosts = case.cap.map(|cap| Hosts::start(Some(cap))).transpose();
        let hosts = match hosts {
            Ok(hosts) => hosts,
            Err(error) => {
                eprintln!("SKIPPED {case}: a cap needs root, iproute2 and network namespaces ({error:#})");
                continue;
            }
        };
        let moves = RefCell::new(Vec::new());
        group.bench_function(case.to_string(), |bencher| {
            bencher.iter_custom(|count| {
                let moved = (0..count).map(|_| moved(&programs, &case, hosts.as_ref()));
                let moved: Vec<(Moved, Duration)> = moved.collect();
                let downtime = moved.iter().map(|(_, downtime)| *downtime).sum();
                moves.borrow_mut().extend(moved.into_iter().map(|(moved, _)| moved));
                downtime
            });
        });
        let moves = moves.into_inner();
        if moves.is_empty() {
            // left out by a filter
            continue;
        }
        let copied = case.copy(hosts.as_ref()).map_err(|error| format!("{error:#}"));
        println!("{}", beside(&moves, &copied));
        let line = json!({
            "case": case.to_string(),
            "dirty_pages_per_second": case.dirty_rate,
            "working_set_bytes": case.working_set_bytes,
            "memory_bytes": case.memory_bytes,
            "channels": case.channels,
            "cap_bits_per_second": case.cap,
            "sockets": copied.as_ref().ok(),
            "migrations": moves,
        });
        writeln!(raw, "{line}").expect("target can be written");
    }
    group.finish();
}

/// Moves the case's guest once.
///
/// # Panics
/// When it fails again and again: a bench that leaves out what failed would lie.
fn moved(programs: &Programs, case: &Case, hosts: Option<&Hosts>) -> (Moved, Duration) {
    for _ in 0..TRIES {
        match migration::run(programs, &case.plan(), hosts) {
            Ok(moved) => {
                if let Some(ms) = moved.report.downtime_ms {
                    return (moved, Duration::from_secs_f64(ms / 1e3));
                }
                eprintln!("{case}: no downtime in the report");
            }
            Err(error) => eprintln!("{case}: FAILED: {error:#}"),
        }
    }
    panic!("{case} failed {TRIES} times in a row");
}

/// What criterion has no room for.
fn beside(moves: &[Moved], copied: &Result<Copied, String>) -> String {
    let over = |of: fn(&Moved) -> f64, decimals| three(moves.iter().map(of), decimals);
    let sockets = match copied {
        Ok(copied) => format!("{:.2} GB/s", copied.bytes_per_second() / 1e9),
        Err(error) => format!("FAILED: {error}"),
    };
    let gaps = moves.iter().filter_map(|m| m.report.guest_gap_ms);
    let predicted = moves.iter().filter_map(|m| m.report.predicted_downtime_ms);
    format!(
        "  of {} migrations: total {} s, {} MiB, {} rounds, gap {} ms, predicted {} ms; plain sockets {sockets}",
        moves.len(),
        over(|m| m.report.total_ms / 1e3, 2),
        over(|m| m.report.sent_bytes as f64 / text::MIB, 0),
        over(|m| f64::from(m.report.rounds), 0),
        three(gaps, 2),
        three(predicted, 2),
    )
}

criterion_group!(benches, downtime_vs_dirty_rate);

fn main() {
    child::run_if_asked();
    if !std::env::args().any(|argument| argument == "--bench") {
        return eprintln!("SKIPPED: no test, but a bench; run it with `cargo bench`");
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
