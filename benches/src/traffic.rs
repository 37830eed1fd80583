//! What leaves a host over the wire, looked at every 10 ms.
//!
//! The kernel's counters have the headers of every packet in them, and a packet is as large as the sender hands it
//! down: some tens of kilobytes, which the veth pair does not cut up. So of the bytes that were counted those of the
//! headers are taken off, a constant times the packets that were counted. What is left is what the program wrote and
//! TCP carried; what is retransmitted would count twice, and a veth pair loses nothing.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::netns::INTERFACE;

const INTERVAL: Duration = Duration::from_millis(10);
/// A look that took longer says too little of when it was.
const LONGEST_LOOK: Duration = Duration::from_micros(300);
/// Ethernet 14, IPv4 20, TCP 20 and its time stamps 12. Packets that open a connection have a few more.
const HEADER_BYTES: u64 = 66;
/// What begins and ends is not looked at for smoothness.
const EDGE_MS: f64 = 50.0;

/// The counters at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Milliseconds since the first look was due.
    pub at_ms: f64,
    /// Sent until then, without headers.
    pub bytes: u64,
}

/// The looks at one migration, in their order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Traffic {
    looks: Vec<Look>,
}

/// What passed between two looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// From when.
    pub from_ms: f64,
    /// Until when.
    pub to_ms: f64,
    /// How fast.
    pub bytes_per_second: f64,
}

impl Window {
    fn between(before: &Look, after: &Look) -> Self {
        let bytes = after.bytes.saturating_sub(before.bytes) as f64;
        let bytes_per_second = bytes / (after.at_ms - before.at_ms) * 1e3;
        Self { from_ms: before.at_ms, to_ms: after.at_ms, bytes_per_second }
    }
}

impl Traffic {
    /// Of these looks.
    pub fn of(looks: Vec<Look>) -> Self {
        Self { looks }
    }

    /// All windows between two looks.
    pub fn windows(&self) -> Vec<Window> {
        self.looks.windows(2).map(|pair| Window::between(&pair[0], &pair[1])).collect()
    }

    /// The windows from the first to the last with at least a tenth of the cap, without 50 ms on both ends.
    pub fn flowing(&self, cap_bytes_per_second: f64) -> Vec<Window> {
        let mut windows = self.windows();
        let flows = |w: &&Window| w.bytes_per_second >= cap_bytes_per_second / 10.0;
        let Some(from_ms) = windows.iter().find(flows).map(|w| w.from_ms + EDGE_MS) else {
            return Vec::new();
        };
        let to_ms = windows.iter().rfind(flows).map_or(from_ms, |w| w.to_ms - EDGE_MS);
        windows.retain(|w| w.from_ms >= from_ms && w.to_ms <= to_ms);
        windows
    }

    /// How long after a moment a rate holds: until the first look from which on `over_ms` have that rate, but for a
    /// part of `tolerance`.
    pub fn holds_after_ms(
        &self,
        moment_ms: f64,
        bytes_per_second: f64,
        over_ms: f64,
        tolerance: f64,
    ) -> Option<f64> {
        let later = self.looks.iter().filter(|look| look.at_ms >= moment_ms);
        let holds = |look: &&Look| {
            let end = self.looks.iter().find(|end| end.at_ms >= look.at_ms + over_ms);
            end.is_some_and(|end| {
                let rate = Window::between(look, end).bytes_per_second;
                (rate / bytes_per_second - 1.0).abs() <= tolerance
            })
        };
        later.into_iter().find(holds).map(|look| look.at_ms - moment_ms)
    }

    /// All that was sent.
    pub fn bytes(&self) -> u64 {
        match (self.looks.first(), self.looks.last()) {
            (Some(first), Some(last)) => last.bytes.saturating_sub(first.bytes),
            _ => 0,
        }
    }
}

/// Looks at what leaves the host of a process, until it is told to end or the process has ended.
#[derive(Debug)]
pub struct Watch {
    start: Instant,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Look>>,
}

impl Watch {
    /// Starts to look.
    pub fn start(pid: u32) -> Self {
        let start = Instant::now();
        let ended = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let path = format!("/proc/{pid}/net/dev");
            let mut looks = Vec::new();
            while let Ok((at, bytes)) = look(path.as_ref()) {
                looks.push(Look { at_ms: (at - start).as_secs_f64() * 1e3, bytes });
                if end.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep((at + INTERVAL).saturating_duration_since(Instant::now()));
            }
            looks
        });
        Self { start, ended, thread }
    }

    /// Milliseconds since it began, as in [`Look::at_ms`].
    pub fn now_ms(&self) -> f64 {
        self.start.elapsed().as_secs_f64() * 1e3
    }

    /// What was seen.
    ///
    /// # Errors
    /// Nothing was.
    pub fn finish(self) -> Result<Traffic> {
        self.ended.store(true, Ordering::Relaxed);
        let looks = self.thread.join().expect("the watching thread does not panic");
        ensure!(looks.len() > 1, "the counters of {INTERFACE} cannot be read");
        Ok(Traffic { looks })
    }
}

/// The bytes sent, and when that was: in the middle of the reading, which is done again if it was held up.
fn look(path: &Path) -> Result<(Instant, u64)> {
    let mut found;
    let mut tries = 0;
    loop {
        let before = Instant::now();
        let text = std::fs::read_to_string(path)?;
        let took = before.elapsed();
        found = (before + took / 2, sent(&text).context("no counters")?);
        tries += 1;
        if took <= LONGEST_LOOK || tries == 5 {
            return Ok(found);
        }
    }
}

/// What the interface sent, without headers, of the text of `net/dev` (proc(5)).
fn sent(text: &str) -> Option<u64> {
    let values =
        text.lines().find_map(|line| line.trim_start().strip_prefix(INTERFACE)?.strip_prefix(':'))?;
    let mut sent = values.split_whitespace().skip(8).map(str::parse::<u64>);
    let (bytes, packets) = (sent.next()?.ok()?, sent.next()?.ok()?);
    Some(bytes.saturating_sub(packets * HEADER_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A look every 10 ms, with so many bytes between.
    fn traffic(bytes: &[u64]) -> Traffic {
        let mut sum = 0;
        let mut looks = vec![Look { at_ms: 0.0, bytes: 0 }];
        for (at, bytes) in (1..).zip(bytes) {
            sum += bytes;
            looks.push(Look { at_ms: f64::from(at) * 10.0, bytes: sum });
        }
        Traffic::of(looks)
    }

    #[test]
    fn headers_are_taken_off_what_was_counted() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n  \
                    wire: 1 2 0 0 0 0 0 0 131204 2 0 0 0 0 0 0\n";
        assert_eq!(sent(text), Some(131_072));
        assert_eq!(sent("    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n"), None);
    }

    #[test]
    fn rates_follow_from_when_it_was_looked() {
        let looks = [(0.0, 5), (10.0, 1005), (30.0, 5005)].map(|(at_ms, bytes)| Look { at_ms, bytes });
        let traffic = Traffic::of(looks.to_vec());
        let rates: Vec<f64> = traffic.windows().iter().map(|w| w.bytes_per_second).collect();
        assert_eq!((rates, traffic.bytes()), (vec![100e3, 200e3], 5000));
    }

    #[test]
    fn a_gap_between_is_no_edge() {
        let mut bytes = vec![0, 0, 1, 100];
        bytes.extend([100; 10]);
        bytes.push(0);
        bytes.extend([100; 10]);
        bytes.extend([1, 0, 0]);
        let flowing = traffic(&bytes).flowing(10e3);
        assert_eq!((flowing.first().unwrap().from_ms, flowing.last().unwrap().to_ms), (80.0, 200.0));
        assert_eq!(flowing.iter().filter(|w| w.bytes_per_second == 0.0).count(), 1);
        assert_eq!(traffic(&[0; 30]).flowing(10e3), []);
    }

    #[test]
    fn a_rate_holds_from_the_look_from_which_on_the_mean_is_near() {
        let mut bytes = vec![1000; 10];
        bytes.extend([600, 102, 98]);
        bytes.extend([100; 20]);
        let traffic = traffic(&bytes);
        let holds = |over_ms| traffic.holds_after_ms(95.0, 10e3, over_ms, 0.05);
        assert_eq!(holds(50.0), Some(15.0));
        assert_eq!(holds(500.0), None);
    }
}
