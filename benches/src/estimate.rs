//! `mig-send --vm --estimate`: what a migration would come to, asked of whoever holds the guest.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::events::Event;
use crate::migration::Plan;
use crate::programs::{Program, Programs};

/// The guest is watched for two seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was seen of the guest, and what follows; the words are those of docs/cli.md.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Estimate {
    pub filled_bytes: u64,
    pub busy_percent: Option<u8>,
    pub dirtied: Vec<Dirtied>,
    pub forecasts: Vec<Forecast>,
}

/// What was dirtied within a time, each page once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Dirtied {
    pub within_ms: f64,
    pub bytes: u64,
}

/// A migration that might be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Forecast {
    pub bandwidth_bytes_per_second: u64,
    pub priority: String,
    pub moves: bool,
    pub fits: bool,
    pub stop_reason: String,
    pub rounds: u32,
    pub total_ms: f64,
    pub downtime_ms: f64,
    pub sent_bytes: u64,
    pub most_throttle_percent: u8,
}

impl Estimate {
    /// Asks the holder at `socket` (`unix:PATH`) for the migration that `plan` is.
    ///
    /// # Errors
    /// There is no estimate, or not of one migration: the plan leaves link or priority open.
    pub fn ask(programs: &Programs, socket: &str, plan: &Plan) -> Result<Self> {
        let mut ask = Command::new(&programs.send);
        ask.args(["--vm", socket, "--estimate", "--json"]).args(plan.policy_options());
        let mut ask = Program::start(ask)?;
        let estimate = ask
            .wait_for(PATIENCE, |event| match event {
                Event::Estimate(estimate) => Some(*estimate),
                _ => None,
            })
            .context("no estimate")?;
        let count = estimate.forecasts.len();
        ensure!(count == 1, "{count} migrations were estimated: give --bandwidth and --priority");
        ask.wait_for_end(PATIENCE)?;
        Ok(estimate)
    }
}
