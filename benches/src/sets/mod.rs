//! What the report measures, a set of runs each: how it is run, and what is said of it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;

use crate::migration::{self, Plan};
use crate::programs::Programs;
use crate::record::{Cell, Line, Outcome, Results, Run, Store, label};

pub mod budget;
pub mod cap;
pub mod convergence;
pub mod estimate;
pub mod instructions;
pub mod memory_kinds;
pub mod pause;
pub mod untouched;
pub mod wire;

/// A set.
pub struct Set {
    /// Its name.
    pub name: &'static str,
    /// What it measures.
    pub about: &'static str,
    /// How many runs count, where nobody says.
    pub runs: u32,
    /// Measures it.
    pub measure: fn(&mut Bench) -> Result<()>,
    /// Writes its section, and its plots into the directory.
    pub render: fn(&Results, &Path) -> Result<String>,
}

/// Every set, in the order of the report.
pub const ALL: [Set; 9] = [
    wire::SET,
    untouched::SET,
    budget::SET,
    convergence::SET,
    estimate::SET,
    cap::SET,
    memory_kinds::SET,
    pause::SET,
    instructions::SET,
];

/// What the sets are measured with.
pub struct Bench {
    /// mig-send and mig-recv.
    pub programs: Programs,
    /// Less of everything, to see whether it works.
    pub quick: bool,
    /// Runs of each cell that count.
    pub runs: u32,
    /// What one write of the engine is, for the yardstick that does as the engine does.
    pub engine_call_bytes: usize,
    /// The socket buffers that the engine asks for, if any.
    pub engine_buffer_bytes: Option<usize>,
    /// Where files are written.
    pub directory: PathBuf,
    store: Store,
    set: &'static str,
}

impl Bench {
    /// A bench that keeps its results in `store`.
    pub fn new(programs: Programs, store: Store, directory: PathBuf) -> Self {
        Self {
            programs,
            quick: false,
            runs: 7,
            engine_call_bytes: 2 << 20,
            engine_buffer_bytes: None,
            directory,
            store,
            set: "",
        }
    }

    /// Measures a set.
    ///
    /// # Errors
    /// The results cannot be kept. A run that fails is a result.
    pub fn measure(&mut self, set: &Set, runs: u32) -> Result<()> {
        (self.set, self.runs) = (set.name, runs);
        eprintln!("{}: {}", set.name, set.about);
        (set.measure)(self)
    }

    /// The runs of a cell: the warm-up, and those that count.
    pub fn rounds(&self) -> std::ops::RangeInclusive<u32> {
        0..=self.runs
    }

    /// Does one run, says how it went, and keeps that.
    ///
    /// # Errors
    /// The result cannot be kept.
    pub fn run(
        &mut self,
        cell: &Cell,
        what: &str,
        run: u32,
        work: impl FnOnce(&Self) -> Result<Outcome>,
    ) -> Result<Outcome> {
        let start = Instant::now();
        let outcome = work(self).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        let number = if run == 0 { "warm-up".into() } else { format!("{run}/{}", self.runs) };
        eprintln!(
            "{} {} {what} {number}: {} [{:.1} s]",
            self.set,
            label(cell),
            in_short(&outcome),
            start.elapsed().as_secs_f64()
        );
        let (set, cell, what) = (self.set.to_owned(), cell.clone(), what.to_owned());
        self.store.add(&Line::Run(Run { set, cell, what, run, outcome: outcome.clone() }))?;
        Ok(outcome)
    }

    /// Moves a guest.
    ///
    /// # Errors
    /// The result cannot be kept.
    pub fn migrate(&mut self, cell: &Cell, run: u32, plan: &Plan) -> Result<Outcome> {
        self.run(cell, "migration", run, |bench| {
            let moved = Box::new(migration::run(&bench.programs, plan, None)?);
            Ok(if moved.is_here_still() { Outcome::Stayed(moved) } else { Outcome::Moved(moved) })
        })
    }
}

/// For whoever watches.
fn in_short(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Stayed(moved) => format!(
            "{:.2} s, left here after {} rounds, {}",
            moved.report.total_ms / 1e3,
            moved.report.rounds,
            moved.report.stop_reason.as_deref().unwrap_or("no reason"),
        ),
        Outcome::Moved(moved) => {
            let report = &moved.report;
            let ms = |value: Option<f64>| value.map_or("?".into(), |ms| format!("{ms:.2}"));
            format!(
                "{:.2} s, round 0 {:.2} GB/s, pause {} ms, gap {} ms, predicted {} ms, {} rounds, {}",
                report.total_ms / 1e3,
                moved.rounds.first().map_or(f64::NAN, |round| round.bytes_per_second() / 1e9),
                ms(report.downtime_ms),
                ms(report.guest_gap_ms),
                ms(report.predicted_downtime_ms),
                report.rounds,
                report.stop_reason.as_deref().unwrap_or("no reason"),
            )
        }
        Outcome::Copied(copied) => {
            format!("{:.2} s, {:.2} GB/s", copied.elapsed_ms / 1e3, copied.bytes_per_second() / 1e9)
        }
        Outcome::Capped(capped) => capped.in_short(),
        Outcome::Counted(counted) => counted.in_short(),
        Outcome::Failed(cause) => format!("FAILED: {cause}"),
    }
}
