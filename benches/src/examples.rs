//! A migration as tests of what is said of one need it.

use crate::events::{Pages, Report, Round};
use crate::migration::{Cost, Moved};

/// Half a GiB that moved in two seconds and paused for a millisecond.
pub(crate) fn moved() -> Moved {
    let report = Report {
        outcome: "moved".into(),
        stop_reason: Some("few-pages".into()),
        rounds: 2,
        total_ms: 2000.0,
        downtime_ms: Some(1.0),
        downtime: None,
        predicted_downtime_ms: None,
        predicted_downtime: None,
        shortfall: None,
        slowed: None,
        guest_gap_ms: None,
        sent_bytes: 250_000_000,
        pages: Pages { zero: 1, raw: 2, zstd: 3, delta: 4 },
        ram_bytes: 512 << 20,
        fault: None,
    };
    let round = Round {
        round: 0,
        pages: Pages::default(),
        sent_bytes: 250_000_000,
        elapsed_ms: 1990.0,
        dirtied_pages: 0,
        dirty_pages_per_second: 0,
        predicted_downtime_ms: 1.0,
        throttle_percent: 0,
        decision: "switch-over".into(),
        why: String::new(),
    };
    let cost = |cpu_s| Cost { cpu_s, ..Cost::default() };
    Moved {
        channels: 2,
        report,
        rounds: vec![round],
        speed: None,
        estimate: None,
        source: cost(2.0),
        destination: cost(0.5),
    }
}
