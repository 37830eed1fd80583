//! How fast a guest runs, by its own counts: its heartbeats, and the pages that a dirtier has written.
//!
//! Both are asked for by `check` on the control socket of whoever holds the guest. That pauses the guest for as long
//! as its memory is looked at; a count is as it was in that pause, so what passes between two is a stretch of time
//! in which the guest was not disturbed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::control;

/// For how long a holder is asked again that is about to have the guest.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest's speed, a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Heartbeats of vCPU 0.
    pub heartbeats: f64,
    /// Pages written, each as often as it was.
    pub pages_written: f64,
}

/// A guest's speed around a migration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Before the order.
    pub before: Rate,
    /// From the order to the report, the pause included.
    pub during: Rate,
    /// After it, wherever the guest is.
    pub after: Rate,
}

impl Speed {
    /// Heartbeats in percent of those before: while it moved, and after.
    pub fn heartbeats_kept(&self) -> [f64; 2] {
        [self.during, self.after].map(|rate| rate.heartbeats / self.before.heartbeats * 100.0)
    }

    /// The same of the pages written.
    pub fn writes_kept(&self) -> [f64; 2] {
        [self.during, self.after].map(|rate| rate.pages_written / self.before.pages_written * 100.0)
    }
}

/// A guest's counts at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count {
    heartbeats: u64,
    pages_written: u64,
    asked: Instant,
    answered: Instant,
}

impl Count {
    /// Asks the holder at `socket`, again while it says that it has no guest that runs.
    pub(crate) fn ask(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let asked = Instant::now();
            let answer = control::ask(socket, &json!({"cmd": "check"}))?;
            let answered = Instant::now();
            if answer["ok"] == true {
                let (heartbeats, pages_written) = read(&answer).with_context(|| answer.to_string())?;
                return Ok(Self { heartbeats, pages_written, asked, answered });
            }
            if asked > deadline {
                bail!("the guest cannot be checked: {answer}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What passed a second from this count to a later one.
    pub(crate) fn until(&self, later: &Self) -> Rate {
        let seconds = later.asked.saturating_duration_since(self.answered).as_secs_f64();
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / seconds;
        Rate {
            heartbeats: rate(self.heartbeats, later.heartbeats),
            pages_written: rate(self.pages_written, later.pages_written),
        }
    }
}

/// Heartbeats and pages written of an answer.
fn read(answer: &Value) -> Option<(u64, u64)> {
    // "N pages as the guest left them after M writes"
    let words = answer["found"].as_str()?.strip_suffix(" writes")?;
    Some((answer["heartbeats"].as_u64()?, words.rsplit(' ').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_an_answer() {
        let answer = serde_json::json!({
            "ok": true, "heartbeats": 70, "found": "123 pages as the guest left them after 4567 writes"
        });
        assert_eq!(read(&answer), Some((70, 4567)));
        assert_eq!(read(&serde_json::json!({"ok": true, "heartbeats": 70, "found": "nothing"})), None);
    }

    #[test]
    fn a_rate_leaves_out_the_time_in_which_the_guest_was_looked_at() {
        let start = Instant::now();
        let at = |asked, answered, count| Count {
            heartbeats: count,
            pages_written: count * 10,
            asked: start + Duration::from_secs(asked),
            answered: start + Duration::from_secs(answered),
        };
        let rate = at(0, 3, 100).until(&at(5, 9, 300));
        assert_eq!(rate, Rate { heartbeats: 100.0, pages_written: 1000.0 });
    }

    #[test]
    fn what_is_kept_is_in_percent_of_what_was_before() {
        let rate = |heartbeats, pages_written| Rate { heartbeats, pages_written };
        let speed =
            Speed { before: rate(200.0, 1000.0), during: rate(100.0, 50.0), after: rate(200.0, 990.0) };
        assert_eq!((speed.heartbeats_kept(), speed.writes_kept()), ([50.0, 100.0], [5.0, 99.0]));
    }
}
