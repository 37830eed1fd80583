//! Events: what the programs tell while they work, and the JSON that `--json` and the control socket speak.
//!
//! The single source for terminals and machines: [`crate::render`] shows people the same events. All times
//! are in milliseconds (`_ms`; the parts in `downtime` too), with microseconds as decimals.

mod engine;

use serde::{Deserialize, Serialize};

use crate::control::GuestTime;
use crate::estimate::Estimated;
use crate::failure::Failure;

/// Something that happened; an object a line, named by its member `event`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A receiver waits for a guest.
    Listening {
        /// Where, with the port that was chosen.
        addr: String,
    },
    /// A guest was started here.
    Started(Started),
    /// A migration begins.
    Migrating {
        /// Where the guest is to go.
        to: String,
    },
    /// The peer answered and this was agreed on.
    Connected {
        /// Protocol version.
        version: u16,
        /// Page channels.
        channels: u16,
    },
    /// The destination is ready for pages.
    Accepted,
    /// How far the current round is.
    Copying {
        /// The round.
        round: u32,
        /// Pages of it on their way.
        sent_pages: u64,
        /// Pages it has in all.
        total_pages: u64,
    },
    /// A round has ended.
    Round(Round),
    /// The guest is paused for the switchover.
    Paused,
    /// The guest was committed to the destination.
    Committed,
    /// The destination runs the guest: told by both sides.
    Running(Running),
    /// The source lets its guest run on.
    Resumed,
    /// What migrations would come to.
    Estimate(Estimated),
    /// A migration has ended.
    Report(Box<Report>),
    /// A receive failed; the receiver listens on.
    NotReceived(Failure),
    /// It is not known whether the guest runs on the other side, or will; it is held, paused, on this one.
    /// Told when that begins, and after every question to the other side in vain.
    InDoubt(Doubt),
    /// An operator's word on a guest in doubt was not obeyed; it is in doubt still.
    WordRefused(Failure),
    /// Something else failed.
    Error(Failure),
    /// Somebody who is no source spoke to a receiver, which listens on.
    TurnedAway {
        /// Who.
        peer: String,
        /// Why.
        cause: String,
    },
    /// What somebody should know.
    Note {
        /// The words.
        text: String,
    },
    /// The program has no guest any more and ends.
    Ended {
        /// Why: `moved`, `quit`, or how the guest ended.
        reason: String,
    },
}

/// A guest in doubt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Doubt {
    /// For how long.
    pub for_ms: f64,
    /// How often the other side was asked in vain.
    pub asked: u32,
    /// How it came to this, or why the last question was in vain; and what to do.
    #[serde(flatten)]
    pub failure: Failure,
}

/// The guest that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// What it is.
    pub guest: String,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// Where it can be controlled.
    pub control: Option<String>,
}

/// Pages by how they travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Pages of zeros.
    pub zero: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Pages sent compressed.
    #[serde(default)]
    pub zstd: u64,
    /// Pages sent as what changed since they were sent before.
    #[serde(default)]
    pub delta: u64,
}

/// What one round did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 0.
    pub round: u32,
    /// Pages sent in it.
    pub pages: Pages,
    /// Bytes sent in it.
    pub sent_bytes: u64,
    /// How long it took.
    pub elapsed_ms: f64,
    /// Pages that remain: dirtied meanwhile, or held back.
    pub dirtied_pages: u64,
    /// Pages that it left out: hot ones, held back until the pause.
    #[serde(default)]
    pub held_pages: u64,
    /// The same in bytes.
    pub dirtied_bytes: u64,
    /// Pages dirtied a second.
    pub dirty_pages_per_second: u64,
    /// Bytes that arrived a second.
    pub bytes_per_second: u64,
    /// The downtime of a switchover now.
    pub predicted_downtime_ms: f64,
    /// By how much the guest was slowed in it.
    #[serde(default)]
    pub throttle_percent: u8,
    /// What comes next: `continue`, `hold-back`, `throttle`, `switch-over` or `abort`.
    pub decision: String,
    /// Why, in words.
    #[serde(default)]
    pub why: String,
    /// The rule that fired, unless rounds go on.
    pub stop_reason: Option<String>,
    /// The rule that is nearest to firing, or that fired.
    pub nearest_rule: String,
}

/// The guest runs on the destination. The source knows only that; the destination tells what it received.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Running {
    /// What the destination received.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub received: Option<Received>,
}

/// What a destination received.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Received {
    /// Rounds, the last one included.
    pub rounds: u32,
    /// Bytes over all page channels.
    pub received_bytes: u64,
    /// Pages.
    pub pages: Pages,
    /// Guest memory.
    pub ram_bytes: u64,
    /// Time spent restoring state.
    pub load_ms: f64,
    /// Time spent starting the vCPUs.
    pub resume_ms: f64,
    /// What the guest itself felt, where that can be known.
    pub guest_gap_ms: Option<f64>,
    /// How its time went on.
    pub guest_time: Option<Arrived>,
}

/// How the guest's time went on as it arrived.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arrived {
    /// What was asked for.
    pub choice: GuestTime,
    /// By how much its clocks were moved forward.
    pub advanced_ms: f64,
    /// Whether the source is this host, so that its clocks are right to the microsecond.
    pub same_host: bool,
    /// By how much more than the pause they may have been moved at most: between hosts, whose wall clocks are
    /// all there is to go by.
    pub skew_at_most_ms: f64,
    /// By how much the source's wall clock was ahead of this host's at least; the guest's clocks were then not
    /// moved at all.
    pub source_ahead_ms: f64,
}

/// Where the downtime went, in milliseconds; the parts add up to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the words are those of `mig::observe::Downtime`
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

/// How a migration went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `moved`, `still-here` or `discarded`.
    pub outcome: String,
    /// The rule that ended pre-copy.
    pub stop_reason: Option<String>,
    /// Rounds sent, the last one included.
    pub rounds: u32,
    /// From the order to the end.
    pub total_ms: f64,
    /// The whole downtime.
    pub downtime_ms: Option<f64>,
    /// Its parts.
    pub downtime: Option<Downtime>,
    /// What was predicted as the switchover was decided.
    pub predicted_downtime_ms: Option<f64>,
    /// Its parts.
    pub predicted_downtime: Option<Downtime>,
    /// What was missing for a pause within the limit, if it was not to be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortfall: Option<Shortfall>,
    /// How the guest was slowed so that rounds shrank, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slowed: Option<Slowed>,
    /// What the guest itself felt, where that can be known.
    pub guest_gap_ms: Option<f64>,
    /// Bytes sent over all channels.
    pub sent_bytes: u64,
    /// Pages sent.
    pub pages: Pages,
    /// Guest memory.
    pub ram_bytes: u64,
    /// `off`, `ok` or `mismatch`.
    pub verify: String,
    /// With `ok`: chunks of 2 MiB whose digests agree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_chunks: Option<u64>,
    /// With `mismatch`: guest-physical addresses of the first pages that differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mismatched_addresses: Option<Vec<u64>>,
    /// Why it did not end in `moved`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<Failure>,
}

/// What was missing for a pause within the limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shortfall {
    /// What the guest dirtied.
    pub dirty_bytes_per_second: u64,
    /// What came through.
    pub bytes_per_second: u64,
    /// The limit that would have been met.
    pub met_limit_ms: f64,
    /// Whether the guest could have been slowed more.
    pub could_slow_more: bool,
}

/// What a guest was denied so that rounds shrank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slowed {
    /// The most it was slowed by at a time.
    pub most_percent: u8,
    /// For how long it was slowed at all.
    pub lasted_ms: f64,
    /// For how long each vCPU was held in that.
    pub held_ms: f64,
    /// The least of its speed that it kept over a round, where that is known.
    pub least_speed_percent: Option<u8>,
}

impl Downtime {
    /// The parts by the words that people read, in their order.
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

/// Examples for tests.
#[cfg(test)]
pub(crate) mod examples {
    use std::time::Duration;

    use mig::observe::{self, OutcomeKind, PageCounts, RoundReport, Verification};
    use mig::policy::{Decision, StopReason, Throttle, Why};
    use mig::{Blame, Fault, Side, Step};

    pub(crate) fn round() -> RoundReport {
        RoundReport {
            round: 0,
            pages: PageCounts { zero: 100_000, raw: 30_000, zstd: 1000, delta: 72 },
            sent_bytes: 128 << 20,
            elapsed: Duration::from_millis(400),
            dirtied_pages: 5120,
            held_pages: 0,
            dirty_pages_per_second: 12_800,
            bytes_per_second: 320 << 20,
            predicted_downtime: Duration::from_micros(71_250),
            throttle: Throttle::NONE,
            decision: Decision::Continue(Why::FitsIn { rounds: 2 }),
            nearest_rule: StopReason::WithinBudget,
        }
    }

    pub(crate) fn moved() -> observe::Report {
        let us = Duration::from_micros;
        observe::Report {
            outcome: OutcomeKind::Moved,
            stop_reason: Some(StopReason::WithinBudget),
            rounds: 4,
            total: Duration::from_millis(1240),
            downtime: Some(observe::Downtime {
                pause: us(300),
                save: us(420),
                last_sync: us(110),
                transfer: us(3000),
                verify: us(0),
                load: us(700),
                commit: us(270),
                resume: us(200),
            }),
            predicted_downtime: Some(observe::Downtime {
                transfer: us(5000),
                load: us(500),
                ..observe::Downtime::default()
            }),
            shortfall: None,
            slowed: None,
            guest_gap: Some(us(5900)),
            sent_bytes: 530 << 20,
            pages: PageCounts { zero: 100_000, raw: 130_000, zstd: 4000, delta: 1000 },
            ram_bytes: 1 << 30,
            verification: Verification::Ok { chunks: 512 },
            fault: None,
        }
    }

    pub(crate) fn refused() -> observe::Report {
        observe::Report {
            outcome: OutcomeKind::StillHere,
            stop_reason: None,
            rounds: 0,
            downtime: None,
            predicted_downtime: None,
            guest_gap: None,
            sent_bytes: 0,
            pages: PageCounts::default(),
            verification: Verification::Off,
            fault: Some(
                Fault::new(Side::Source, Step::Connect, Blame::Network, "connection refused")
                    .remedy("start mig-recv there first"),
            ),
            ..moved()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn to_json(event: &Event) -> Value {
        serde_json::to_value(event).unwrap()
    }

    #[test]
    fn a_report_has_the_documented_members() {
        let event = Event::Report(Box::new((&examples::moved()).into()));
        assert_eq!(
            to_json(&event),
            json!({
                "event": "report", "outcome": "moved", "stop_reason": "within-budget", "rounds": 4,
                "total_ms": 1240.0, "downtime_ms": 5.0,
                "downtime": {
                    "pause": 0.3, "save": 0.42, "last_sync": 0.11, "transfer": 3.0, "verify": 0.0,
                    "load": 0.7, "commit": 0.27, "resume": 0.2
                },
                "predicted_downtime_ms": 5.5,
                "predicted_downtime": {
                    "pause": 0.0, "save": 0.0, "last_sync": 0.0, "transfer": 5.0, "verify": 0.0,
                    "load": 0.5, "commit": 0.0, "resume": 0.0
                },
                "guest_gap_ms": 5.9, "sent_bytes": 530u64 << 20,
                "pages": { "zero": 100_000, "raw": 130_000, "zstd": 4000, "delta": 1000 }, "ram_bytes": 1u64 << 30,
                "verify": "ok", "verified_chunks": 512
            })
        );
    }

    #[test]
    fn a_report_of_a_failure_has_nulls_and_the_fault() {
        let report = to_json(&Event::Report(Box::new((&examples::refused()).into())));
        assert_eq!(report["outcome"], "still-here");
        for null in ["stop_reason", "downtime_ms", "downtime", "predicted_downtime_ms", "guest_gap_ms"] {
            assert_eq!(report.get(null), Some(&Value::Null), "{null}");
        }
        assert_eq!(
            report["fault"],
            json!({
                "side": "source", "step": "connect", "blame": "network",
                "cause": "connection refused", "remedy": "start mig-recv there first"
            })
        );
    }

    #[test]
    fn every_event_is_read_back_as_it_was_written() {
        let received = Received {
            rounds: 3,
            received_bytes: 9,
            pages: Pages { zero: 1, raw: 2, zstd: 3, delta: 4 },
            ram_bytes: 3,
            load_ms: 0.5,
            resume_ms: 0.25,
            guest_gap_ms: None,
            guest_time: Some(Arrived {
                choice: GuestTime::Advance,
                advanced_ms: 1.5,
                same_host: false,
                skew_at_most_ms: 1.5,
                source_ahead_ms: 0.0,
            }),
        };
        let events = [
            Event::Listening { addr: "tcp:127.0.0.1:4444".into() },
            Event::Started(Started { guest: "idle".into(), vcpus: 2, memory_bytes: 7, control: None }),
            Event::Migrating { to: "tcp:h:1".into() },
            Event::Connected { version: 1, channels: 2 },
            Event::Accepted,
            Event::Copying { round: 1, sent_pages: 2, total_pages: 3 },
            Event::Round((&examples::round()).into()),
            Event::Paused,
            Event::Committed,
            Event::Running(Running::default()),
            Event::Running(Running { received: Some(received) }),
            Event::Resumed,
            Event::Report(Box::new((&examples::refused()).into())),
            Event::NotReceived(Failure::new("a", "b", "c", "d")),
            Event::InDoubt(Doubt { for_ms: 1.5, asked: 3, failure: Failure::new("a", "b", "c", "d") }),
            Event::WordRefused(Failure::new("a", "b", "c", "d")),
            Event::Error(Failure::new("a", "b", "c", "d")),
            Event::TurnedAway { peer: "p".into(), cause: "c".into() },
            Event::Note { text: "t".into() },
            Event::Ended { reason: "moved".into() },
        ];
        for event in events {
            let text = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event, "{text}");
            assert!(!text.contains('\n'));
        }
    }
}
