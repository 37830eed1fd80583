//! How a running guest dirties its memory: watched before it is moved, to foretell how that would go.

use std::time::{Duration, Instant};

use mig_core::Bitmap;
use mig_core::bitmap::PageRun;
use mig_core::domain::CHUNK_PAGES;
use mig_core::forecast::DirtyCurve;

use crate::guest::{BoxError, DirtyTracker, SourceVm};
use crate::memory::Pages;
use crate::source::busy::Busy;
use crate::untouched::Untouched;

/// The first look; each further one comes after three times as long.
const FIRST_LOOK: Duration = Duration::from_millis(1);
/// Pages that are re-armed at a time; a multiple of 64.
const WINDOW_PAGES: u64 = 16 * CHUNK_PAGES;

/// What was seen of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirtying {
    /// How many different pages it had written after how long.
    pub samples: Vec<(Duration, u64)>,
    /// Pages that hold something other than zeros.
    pub filled_pages: u64,
    /// All pages.
    pub pages: u64,
    /// What its busiest vCPU used of a processor, in percent, where that is known.
    pub busy_percent: Option<u8>,
    /// What it expects pausing and saving to cost.
    pub pause: Duration,
    /// Whether it can be slowed.
    pub can_throttle: bool,
}

impl Dirtying {
    /// For forecasts.
    pub fn curve(&self) -> DirtyCurve {
        DirtyCurve::new(self.samples.clone(), self.pages)
    }
}

/// Watches a running guest for about so long, with the dirty log on, which is off again afterwards; reads all of its
/// memory that was ever touched before. The guest runs on, a little slower.
///
/// # Errors
/// The tracker's, or that memory cannot be described; the log is off then, too, unless that is what failed.
pub fn watch<V: SourceVm>(vm: &mut V, over: Duration) -> Result<Dirtying, BoxError> {
    let pages = Pages::new(vm.memory())?;
    let filled_pages = filled(&pages);
    let mut busy = Busy::new();
    busy.look(&vm.processor_times());
    vm.tracker().start()?;
    let sampled = sample(vm.tracker(), &pages, over);
    let stopped = vm.tracker().stop();
    let samples = sampled?;
    stopped?;
    let costs = vm.pause_costs();
    Ok(Dirtying {
        samples,
        filled_pages,
        pages: pages.domain().pages(),
        busy_percent: busy.look(&vm.processor_times()),
        pause: costs.pause + costs.save,
        can_throttle: vm.can_throttle(),
    })
}

/// All pages are watched from one moment on; nothing is re-armed after that, so each counts once.
fn sample(
    tracker: &mut dyn DirtyTracker,
    pages: &Pages,
    over: Duration,
) -> Result<Vec<(Duration, u64)>, BoxError> {
    let mut dirty = Bitmap::empty(pages.domain());
    // what was written before is not asked for, and may be all
    tracker.sync(&mut dirty)?;
    dirty.clear();
    for extent in pages.domain().extents() {
        let mut first = extent.first_page;
        while first < extent.end_page() {
            let count = WINDOW_PAGES.min(extent.end_page() - first);
            let mut words = vec![!0u64; usize::try_from(count / 64)?];
            if !count.is_multiple_of(64) {
                words.push(!(!0 << (count % 64)));
            }
            tracker.rearm(first, &words)?;
            first += count;
        }
    }
    let began = Instant::now();
    let mut samples = Vec::new();
    let mut look = FIRST_LOOK.min(over);
    loop {
        std::thread::sleep(look.saturating_sub(began.elapsed()));
        let at = began.elapsed();
        tracker.sync(&mut dirty)?;
        samples.push((at, dirty.count()));
        if at >= over {
            return Ok(samples);
        }
        look = (look * 3).min(over);
    }
}

fn filled(pages: &Pages) -> u64 {
    let mut untouched = Untouched::new(pages);
    let mut filled = 0;
    for extent in pages.domain().extents() {
        for first in (extent.first_page..extent.end_page()).step_by(CHUNK_PAGES as usize) {
            let run = PageRun { first, count: CHUNK_PAGES.min(extent.end_page() - first) };
            untouched.look(pages, run);
            let holds = |page: &u64| !untouched.contains(*page) && !pages.is_zero(*page);
            filled += (run.first..run.first + run.count).filter(holds).count() as u64;
        }
    }
    filled
}
