//! The lines that the programs print with `--json`, as far as they are measured. `docs/cli.md` has them all.

use serde::{Deserialize, Serialize};

use crate::estimate::Estimate;

/// An event of mig-send or mig-recv.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A receiver waits at an address.
    Listening {
        /// With the port that was chosen.
        addr: String,
    },
    /// A guest was started.
    Started {},
    /// The other side answered.
    Connected {
        /// Connections that carry pages.
        channels: u32,
    },
    /// A round has ended.
    Round(Round),
    /// What a migration would come to.
    Estimate(Box<Estimate>),
    /// A migration has ended.
    Report(Box<Report>),
    /// Something failed.
    Error(Failure),
    /// The same, of a receive.
    NotReceived(Failure),
    /// Whatever is not measured.
    #[serde(other)]
    Other,
}

/// Pages by how they travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pages {
    /// Without their bytes.
    pub zero: u64,
    /// With them.
    pub raw: u64,
    /// Compressed.
    #[serde(default)]
    pub zstd: u64,
    /// As what changed.
    #[serde(default)]
    pub delta: u64,
}

/// A round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From 0.
    pub round: u32,
    /// Sent in it.
    pub pages: Pages,
    /// Sent in it, headers included.
    pub sent_bytes: u64,
    /// From its first page to the acknowledgement of its last.
    pub elapsed_ms: f64,
    /// Dirtied meanwhile.
    pub dirtied_pages: u64,
    /// The same a second.
    pub dirty_pages_per_second: u64,
    /// What was predicted at its end.
    pub predicted_downtime_ms: f64,
    /// By how much the guest was slowed in it.
    #[serde(default)]
    pub throttle_percent: u8,
    /// `continue`, `hold-back`, `throttle`, `switch-over` or `abort`.
    #[serde(default)]
    pub decision: String,
    /// Why, in words.
    #[serde(default)]
    pub why: String,
}

impl Round {
    /// Bytes a second of it.
    pub fn bytes_per_second(&self) -> f64 {
        self.sent_bytes as f64 / (self.elapsed_ms / 1e3)
    }
}

/// How a migration went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `moved`, `still-here` or `discarded`.
    pub outcome: String,
    /// The rule that ended pre-copy.
    pub stop_reason: Option<String>,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// From the order to the end.
    pub total_ms: f64,
    /// The whole pause.
    pub downtime_ms: Option<f64>,
    /// Its parts.
    pub downtime: Option<Downtime>,
    /// What was predicted as the switchover was decided.
    pub predicted_downtime_ms: Option<f64>,
    /// The same by its parts.
    pub predicted_downtime: Option<Downtime>,
    /// What was missing for a pause within the limit.
    pub shortfall: Option<Shortfall>,
    /// How the guest was slowed, if it was.
    pub slowed: Option<Slowed>,
    /// What the guest itself felt.
    pub guest_gap_ms: Option<f64>,
    /// Over all channels.
    pub sent_bytes: u64,
    /// Sent.
    pub pages: Pages,
    /// Guest memory.
    pub ram_bytes: u64,
    /// Why it did not move.
    pub fault: Option<Failure>,
}

/// What was missing for a pause within the limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the words are those of docs/cli.md
pub struct Shortfall {
    pub dirty_bytes_per_second: u64,
    pub bytes_per_second: u64,
    pub met_limit_ms: f64,
    pub could_slow_more: bool,
}

/// How a guest was slowed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the words are those of docs/cli.md
pub struct Slowed {
    pub most_percent: u8,
    pub lasted_ms: f64,
    pub held_ms: f64,
    pub least_speed_percent: Option<u8>,
}

/// The parts of the pause, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the words are those of docs/cli.md
pub struct Downtime {
    pub pause: f64,
    pub save: f64,
    pub last_sync: f64,
    pub transfer: f64,
    pub verify: f64,
    pub load: f64,
    pub commit: f64,
    pub resume: f64,
}

impl Downtime {
    /// The parts by name, in their order.
    pub fn parts(&self) -> [(&'static str, f64); 8] {
        [
            ("pause", self.pause),
            ("save", self.save),
            ("last sync", self.last_sync),
            ("transfer", self.transfer),
            ("verify", self.verify),
            ("load", self.load),
            ("commit", self.commit),
            ("resume", self.resume),
        ]
    }
}

/// A failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the words are those of docs/cli.md
pub struct Failure {
    pub side: String,
    pub step: String,
    pub cause: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}: {}", self.side, self.step, self.cause)
    }
}

/// Reads a line.
///
/// # Errors
/// It is no event.
pub fn parse(line: &str) -> Result<Event, serde_json::Error> {
    serde_json::from_str(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND: &str = r#"{"event":"round","round":0,"pages":{"zero":786000,"raw":262576},"sent_bytes":1075707904,"elapsed_ms":500.0,"dirtied_pages":7,"dirtied_bytes":28672,"dirty_pages_per_second":14,"bytes_per_second":2150000000,"predicted_downtime_ms":1.8,"decision":"continue","stop_reason":null,"nearest_rule":"few-pages"}"#;
    const REPORT: &str = r#"{"event":"report","outcome":"moved","stop_reason":"within-budget","rounds":4,"total_ms":1240.0,"downtime_ms":5.0,"downtime":{"pause":0.3,"save":0.42,"last_sync":0.11,"transfer":3.0,"verify":0.0,"load":0.7,"commit":0.27,"resume":0.2},"predicted_downtime_ms":5.5,"guest_gap_ms":5.9,"sent_bytes":555745280,"pages":{"zero":100000,"raw":135000},"ram_bytes":1073741824,"verify":"off"}"#;

    #[test]
    fn a_round_and_its_rate_are_read() {
        let Event::Round(round) = parse(ROUND).unwrap() else { panic!("no round") };
        assert_eq!((round.round, round.pages.raw, round.dirty_pages_per_second), (0, 262_576, 14));
        assert_eq!(round.bytes_per_second(), 2_151_415_808.0);
        assert_eq!((round.throttle_percent, &*round.decision, &*round.why), (0, "continue", ""));
    }

    #[test]
    fn a_report_of_a_slowed_guest_that_stays_is_read() {
        let line = r#"{"event":"report","outcome":"still-here","stop_reason":"no-progress","rounds":9,"total_ms":9000.0,"downtime_ms":null,"downtime":null,"predicted_downtime_ms":410.5,"predicted_downtime":null,"shortfall":{"dirty_bytes_per_second":500000000,"bytes_per_second":125000000,"met_limit_ms":410.5,"could_slow_more":false},"slowed":{"most_percent":95,"lasted_ms":4000.0,"held_ms":3000.0,"least_speed_percent":null},"guest_gap_ms":null,"sent_bytes":7,"pages":{"zero":1,"raw":2,"zstd":0,"delta":0},"ram_bytes":1073741824,"verify":"off"}"#;
        let Event::Report(report) = parse(line).unwrap() else { panic!("no report") };
        let slowed = report.slowed.unwrap();
        assert_eq!((slowed.most_percent, slowed.held_ms, slowed.least_speed_percent), (95, 3000.0, None));
        assert_eq!(report.shortfall.map(|s| (s.met_limit_ms, s.could_slow_more)), Some((410.5, false)));
    }

    #[test]
    fn a_report_is_read_and_its_parts_add_up() {
        let Event::Report(report) = parse(REPORT).unwrap() else { panic!("no report") };
        let sum: f64 = report.downtime.unwrap().parts().iter().map(|(_, ms)| ms).sum();
        assert!((sum - report.downtime_ms.unwrap()).abs() < 1e-9);
        assert_eq!((report.stop_reason.as_deref(), report.fault), (Some("within-budget"), None));
    }

    #[test]
    fn an_estimate_is_read() {
        let line = r#"{"event":"estimate","filled_bytes":53687091,"busy_percent":40,"dirtied":[{"within_ms":100.0,"bytes":4096}],"forecasts":[{"bandwidth_bytes_per_second":125000000,"priority":"balanced","moves":true,"fits":false,"stop_reason":"no-progress","rounds":9,"total_ms":9000.0,"downtime_ms":400.0,"sent_bytes":7,"most_throttle_percent":80}]}"#;
        let Event::Estimate(estimate) = parse(line).unwrap() else { panic!("no estimate") };
        let forecast = &estimate.forecasts[0];
        assert_eq!((forecast.moves, forecast.fits, forecast.most_throttle_percent), (true, false, 80));
        assert_eq!((estimate.busy_percent, estimate.dirtied[0].bytes), (Some(40), 4096));
    }

    #[test]
    fn a_failure_says_where_and_why() {
        let line = r#"{"event":"error","side":"source","step":"options","blame":"configuration","cause":"no such thing","remedy":"see --help"}"#;
        let Event::Error(failure) = parse(line).unwrap() else { panic!("no error") };
        assert_eq!(failure.to_string(), "source, options: no such thing");
    }

    #[test]
    fn what_is_not_measured_is_passed_over_and_what_is_no_event_is_not() {
        assert_eq!(parse(r#"{"event":"paused"}"#).unwrap(), Event::Other);
        assert_eq!(parse(r#"{"event":"news","what":1}"#).unwrap(), Event::Other);
        let started = r#"{"event":"started","guest":"idle","vcpus":2,"memory_bytes":1,"control":"unix:/x"}"#;
        assert_eq!(parse(started).unwrap(), Event::Started {});
        assert!(parse("the guest runs").is_err() && parse(r#"{"event":"report"}"#).is_err());
    }
}
