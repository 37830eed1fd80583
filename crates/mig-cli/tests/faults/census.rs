//! Looks at both sides' guests all the while, so that two that beat are seen even if one soon stops.
//!
//! A guest beats between two looks that show different numbers, neither of them 0: a copy that arrives has a
//! number, too. Once the destination's guest has been seen to beat, the source's must not, as long as the
//! destination lives.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
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

type Beats = Arc<Mutex<Vec<Beat>>>;

pub struct Census {
    stop: Arc<AtomicBool>,
    beats: [Beats; 2],
    destination_died: Mutex<Option<Instant>>,
}

impl Census {
    /// Looks at the guests behind the source's and the destination's control sockets from now on.
    pub fn take(controls: [PathBuf; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let beats = controls.map(|control| {
            let (stop, beats) = (stop.clone(), Beats::default());
            let noted = beats.clone();
            std::thread::spawn(move || watch(&control, &stop, &noted));
            beats
        });
        Self { stop, beats, destination_died: Mutex::new(None) }
    }

    /// A side is dead as of now.
    pub fn killed(&self, side: Side) {
        if side == Side::Destination {
            *self.destination_died.lock().unwrap() = Some(Instant::now());
        }
    }

    /// # Panics
    /// There have been two guests.
    pub fn assert_never_two(&self) {
        let died = self.destination_died.lock().unwrap().unwrap_or_else(Instant::now);
        let [source, destination] = self.beats.each_ref().map(|b| b.lock().unwrap());
        let Some(runs_there) = destination.first().map(|b| b.before) else { return };
        let two = source.iter().any(|b| b.after >= runs_there && b.before <= died);
        assert!(!two, "TWO GUESTS: the source's beat after the destination's had begun");
    }
}

impl Drop for Census {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn watch(control: &Path, stop: &AtomicBool, beats: &Mutex<Vec<Beat>>) {
    let mut last: Option<(Instant, u64)> = None;
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let status = try_ask(control, &json!({"cmd": "status"}));
        if let Some(count) = status.and_then(|s| s["heartbeats"].as_u64()).filter(|count| *count > 0) {
            if let Some((after, known)) = last
                && count > known
            {
                beats.lock().unwrap().push(Beat { after, before: Instant::now() });
            }
            last = Some((asked, count));
        }
        std::thread::sleep(INTERVAL);
    }
}
