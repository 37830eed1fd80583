//! What a migration would come to: asked of a holder before its guest is moved.

use std::time::Duration;

use mig::dirtying::Dirtying;
use mig::domain::PAGE_BYTES;
use mig::forecast::{Forecast, Prospect, foresee};
use mig::pacing::InPause;
use mig::policy::Policy;
use serde::{Deserialize, Serialize};

use crate::bandwidth::{Cap, PauseCap};
use crate::convergence::{self, OnStall, Priority};
use crate::units::{as_ms, bytes, millis, rate};

/// How long the guest is watched.
pub const WATCHED: Duration = Duration::from_secs(2);
/// The links that are looked at where none was named, in bytes a second: 1, 10, 25 and 100 Gbit/s.
const LINKS: [u64; 4] = [125_000_000, 1_250_000_000, 3_125_000_000, 12_500_000_000];
/// What the destination's part of the pause, and the messages in it, are taken to cost beside what is known here.
const ELSEWHERE: Duration = Duration::from_millis(1);

/// What is to be foretold; what is absent is as for a migration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimate {
    /// The longest pause that is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// The most rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// What matters most; every priority where it is left out and a bandwidth is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// What to do when rounds do not shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_stall: Option<OnStall>,
    /// What the guest keeps of its speed at least while it is slowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_speed_percent: Option<u8>,
    /// What the rounds may take of the link, or what that gives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Cap>,
    /// What the pause may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_bandwidth: Option<PauseCap>,
}

/// What was seen of the guest, and what follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimated {
    /// The guest's memory that holds something.
    pub filled_bytes: u64,
    /// What its busiest vCPU uses of a processor, where that is known.
    pub busy_percent: Option<u8>,
    /// How much of its memory it had written after how long.
    pub dirtied: Vec<Dirtied>,
    /// What migrations would come to.
    pub forecasts: Vec<Foreseen>,
}

/// What was dirtied within a time, each page once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Dirtied {
    /// The time.
    pub within_ms: f64,
    /// The pages' bytes.
    pub bytes: u64,
}

/// A migration that might be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Foreseen {
    /// What the rounds take of the link.
    pub bandwidth_bytes_per_second: u64,
    /// What matters most in it.
    pub priority: Priority,
    /// Whether the guest would move.
    pub moves: bool,
    /// Whether a pause would fit the limit.
    pub fits: bool,
    /// The rule that would end pre-copy.
    pub stop_reason: String,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// From the first page to the guest running.
    pub total_ms: f64,
    /// The pause.
    pub downtime_ms: f64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// The most the guest would be slowed by.
    pub most_throttle_percent: u8,
}

impl Estimate {
    /// What follows from what was seen.
    pub fn foresee(&self, seen: &Dirtying) -> Estimated {
        let asked = self.bandwidth.and_then(|cap| cap.0);
        let links = asked.map_or(LINKS.to_vec(), |link| vec![link]);
        let priorities = match (self.priority, asked) {
            (Some(priority), _) => vec![priority],
            (None, None) => vec![Priority::Balanced],
            (None, Some(_)) => Priority::ALL.to_vec(),
        };
        let forecasts = links.iter().flat_map(|link| {
            priorities.iter().map(|priority| {
                let forecast = foresee(&self.policy(*priority), &seen.curve(), &self.prospect(*link, seen));
                Foreseen::new(*link, *priority, &forecast)
            })
        });
        let dirtied = |(within, pages): &(Duration, u64)| Dirtied {
            within_ms: as_ms(*within),
            bytes: pages * PAGE_BYTES,
        };
        Estimated {
            filled_bytes: seen.filled_pages * PAGE_BYTES,
            busy_percent: seen.busy_percent,
            dirtied: seen.samples.iter().map(dirtied).collect(),
            forecasts: forecasts.collect(),
        }
    }

    fn policy(&self, priority: Priority) -> Policy {
        let policy = convergence::policy(Some(priority), self.on_stall, self.keep_speed_percent);
        Policy {
            downtime_limit: self.downtime_ms.map_or(policy.downtime_limit, Duration::from_millis),
            max_rounds: self.max_rounds.unwrap_or(policy.max_rounds).max(1),
            ..policy
        }
    }

    fn prospect(&self, link: u64, seen: &Dirtying) -> Prospect {
        let pause = match self.pause_bandwidth.map(|cap| cap.0) {
            Some(InPause::Known(rate)) => rate,
            // a link that gives more than the cap is not known
            Some(InPause::Lifted | InPause::Capped) | None => link,
        };
        Prospect {
            bytes_per_second: link,
            pause_bytes_per_second: pause,
            filled_pages: seen.filled_pages,
            ram_bytes: seen.pages * PAGE_BYTES,
            fixed_pause: seen.pause + ELSEWHERE,
            needed_percent: seen.busy_percent.unwrap_or(100),
            can_throttle: seen.can_throttle,
        }
    }
}

impl Foreseen {
    fn new(link: u64, priority: Priority, forecast: &Forecast) -> Self {
        Self {
            bandwidth_bytes_per_second: link,
            priority,
            moves: forecast.moves,
            fits: forecast.fits,
            stop_reason: forecast.stop_reason.name().into(),
            rounds: forecast.rounds,
            total_ms: as_ms(forecast.total),
            downtime_ms: as_ms(forecast.downtime),
            sent_bytes: forecast.sent_bytes,
            most_throttle_percent: forecast.most_throttle.percent(),
        }
    }

    fn line(&self) -> String {
        let slowed = match self.most_throttle_percent {
            0 => String::new(),
            percent => format!(", slowed by {percent} %"),
        };
        let end = match (self.moves, self.fits) {
            (true, true) => "fits",
            (true, false) => "too long",
            (false, _) => "stays",
        };
        format!(
            "{:>12}  {:<17} {:>9} {:>9} {:>10} {:>6}  {end}: {}{slowed}\n",
            rate(self.bandwidth_bytes_per_second),
            self.priority.name(),
            millis(self.total_ms),
            if self.moves { millis(self.downtime_ms) } else { "-".into() },
            bytes(self.sent_bytes),
            self.rounds,
            self.stop_reason,
        )
    }
}

impl Estimated {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!("{} of memory hold data; the guest dirties", bytes(self.filled_bytes));
        for (at, Dirtied { within_ms, bytes: dirtied }) in self.dirtied.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            text += &format!("{comma} {} in {}", bytes(*dirtied), millis(*within_ms));
        }
        if let Some(percent) = self.busy_percent {
            text += &format!("; its busiest vCPU uses {percent} % of a processor");
        }
        let head = ("link", "priority", "total", "pause", "sent", "rounds");
        text += &format!(
            "\n{:>12}  {:<17} {:>9} {:>9} {:>10} {:>6}  end\n",
            head.0, head.1, head.2, head.3, head.4, head.5
        );
        text + &self.forecasts.iter().map(Foreseen::line).collect::<String>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pages_per_second: u64) -> Dirtying {
        Dirtying {
            samples: vec![
                (Duration::from_millis(100), pages_per_second / 10),
                (Duration::from_secs(1), pages_per_second),
            ],
            filled_pages: 1 << 18,
            pages: 1 << 18,
            busy_percent: Some(40),
            pause: Duration::from_millis(1),
            can_throttle: true,
        }
    }

    #[test]
    fn links_are_gone_through_unless_one_is_named_and_then_priorities() {
        let plain = Estimate::default().foresee(&seen(100));
        assert_eq!(plain.forecasts.iter().map(|f| f.bandwidth_bytes_per_second).collect::<Vec<_>>(), LINKS);
        assert!(plain.forecasts.iter().all(|f| f.moves && f.fits && f.priority == Priority::Balanced));
        assert!(plain.forecasts.is_sorted_by(|a, b| a.total_ms > b.total_ms));
        let named = Estimate { bandwidth: Some(Cap(Some(125_000_000))), ..Estimate::default() };
        let named = named.foresee(&seen(50_000));
        assert_eq!(named.forecasts.iter().map(|f| f.priority).collect::<Vec<_>>(), Priority::ALL);
        assert!(named.forecasts.iter().all(|f| f.most_throttle_percent > 0), "{named:?}");
    }

    #[test]
    fn an_estimate_is_a_table_that_fits_a_terminal_for_people() {
        let estimate = Estimate {
            bandwidth: Some(Cap(Some(125_000_000))),
            on_stall: Some(OnStall::Abort),
            ..Estimate::default()
        };
        let text = estimate.foresee(&seen(60_000)).text();
        assert!(
            text.starts_with(
                "1.0 GiB of memory hold data; the guest dirties 23.4 MiB in 100.0 ms, 234.4 MiB in"
            ),
            "{text}"
        );
        assert!(text.contains("busiest vCPU uses 40 %") && text.contains("stays: "), "{text}");
        assert!(text.lines().skip(1).all(|line| line.len() <= 100), "{text}");
    }
}
