//! Looks at both sides' guests all the while, so that two that beat are seen even if one soon stops.
//!
//! A guest beats between two looks that show different numbers, neither of them 0: a copy that arrives has a
//! number, too. Once the destination's guest has been seen to beat, the source's must not, as long as the
//! destination lives.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::pair::Side;
use crate::support::try_ask;

const INTERVAL: Duration = Duration::from_millis(50);

/// At least one beat between the two times.
#[derive(Debug, Clone, Copy)]
struct Beat {
    after: Instant,
    before: Instant,
}

pub struct Census {
    stop: Arc<AtomicBool>,
    watchers: [JoinHandle<Vec<Beat>>; 2],
    killed: [Mutex<Option<Instant>>; 2],
}

impl Census {
    /// Looks at the guests behind the source's and the destination's control sockets from now on.
    pub fn take(controls: [PathBuf; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let watchers = controls.map(|control| {
            let stop = stop.clone();
            std::thread::spawn(move || watch(&control, &stop))
        });
        Self { stop, watchers, killed: [Mutex::new(None), Mutex::new(None)] }
    }

    /// A side is dead as of now.
    pub fn killed(&self, side: Side) {
        *self.killed[side as usize].lock().unwrap() = Some(Instant::now());
    }

    /// # Panics
    /// There were two guests.
    pub fn assert_never_two(self) {
        self.stop.store(true, Ordering::Relaxed);
        let [source, destination] = self.watchers.map(|w| w.join().unwrap());
        let died = self.killed[Side::Destination as usize].lock().unwrap().unwrap_or_else(Instant::now);
        let Some(runs_there) = destination.iter().map(|b| b.before).min() else { return };
        let second = source.iter().find(|b| b.after >= runs_there && b.before <= died);
        assert!(second.is_none(), "TWO GUESTS: the source's beat after the destination's had begun");
    }
}

fn watch(control: &std::path::Path, stop: &AtomicBool) -> Vec<Beat> {
    let mut beats: Vec<Beat> = Vec::new();
    let mut last: Option<(Instant, u64)> = None;
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let status = try_ask(control, &json!({"cmd": "status"}));
        if let Some(count) = status.and_then(|s| s["heartbeats"].as_u64()).filter(|count| *count > 0) {
            if let Some((after, known)) = last
                && count > known
            {
                beats.push(Beat { after, before: Instant::now() });
            }
            last = Some((asked, count));
        }
        std::thread::sleep(INTERVAL);
    }
    beats
}
