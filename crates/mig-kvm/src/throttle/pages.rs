//! The gear that counts pages: a vCPU that has written its share is held until it may write again, and one that computes
//! or reads runs on, whatever share of the time that is.
//!
//! Nobody is held for longer than by time: a vCPU of which more was expected when it was watched, or less of the others,
//! keeps that part of its time all the same.
//!
//! All vCPUs have the same quota, so that those that write least are slowed last. It is such that they write together
//! what they would if each was held for the wanted part of its time, which is what the policy counts with.

use std::time::{Duration, Instant};

use mig::policy::Throttle;

use super::held_for;

/// What nobody has written yet may be written later, up to so much time's worth: a burst of a guest that writes little
/// in the mean.
const SAVED: Duration = Duration::from_millis(50);
/// What was written beyond the quota before it was seen is made up for, up to so much time's worth: a guest's own
/// watchdogs look on.
const OWED: Duration = Duration::from_millis(100);
/// Who was held is let go with so much time's worth to write: less is lost on the way in and out.
const LEAST_FREE: Duration = Duration::from_millis(2);

/// What vCPUs have done so far.
#[derive(Debug, Clone)]
pub(super) struct Done {
    pub(super) at: Instant,
    /// Pages written, by vCPU.
    pub(super) pages: Vec<u64>,
    /// Processor time used, by vCPU.
    pub(super) processor_times: Vec<Duration>,
}

/// How fast vCPUs write that are not slowed: pages a second, and the part of a processor that each uses.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Speeds(Vec<(f64, f64)>);

impl Speeds {
    /// From what they did between two moments; `None` if they wrote nothing.
    pub(super) fn between(before: &Done, after: &Done) -> Option<Self> {
        let passed_s = after.at.saturating_duration_since(before.at).as_secs_f64().max(1e-9);
        let pages =
            before.pages.iter().zip(&after.pages).map(|(b, a)| a.saturating_sub(*b) as f64 / passed_s);
        let times = before.processor_times.iter().zip(&after.processor_times);
        let busy = times.map(|(b, a)| (a.saturating_sub(*b).as_secs_f64() / passed_s).clamp(0.0, 1.0));
        let speeds = Self(pages.zip(busy).collect());
        speeds.0.iter().any(|(pages, _)| *pages > 0.0).then_some(speeds)
    }

    /// How many pages a second each of them may write.
    pub(super) fn quota(&self, throttle: Throttle) -> f64 {
        let kept = f64::from(throttle.kept_percent()) / 100.0;
        // who uses less of its time than is left to it is not slowed
        let left = |(pages, busy): &(f64, f64)| if *busy > kept { pages * kept / busy } else { *pages };
        shared_out(self.0.iter().map(left).sum(), self.0.iter().map(|(pages, _)| *pages).collect())
    }
}

/// The quota with which those that would write so much write `total` together.
fn shared_out(total: f64, mut wanted: Vec<f64>) -> f64 {
    wanted.sort_by(f64::total_cmp);
    let mut left = total;
    for (at, least) in wanted.iter().enumerate() {
        let share = left / (wanted.len() - at) as f64;
        if *least >= share {
            return share;
        }
        left -= least;
    }
    // none is slowed
    wanted.last().copied().unwrap_or(total)
}

/// What each vCPU may write at the moment, and who may not.
#[derive(Debug)]
pub(super) struct Allowance {
    throttle: Throttle,
    quota: f64,
    at: Instant,
    pages: Vec<u64>,
    /// Below zero: owed.
    left: Vec<f64>,
    vcpus: Vec<Turn>,
}

/// A vCPU's turn: it ran, and then is held perhaps.
#[derive(Debug, Clone, Copy, Default)]
struct Turn {
    held: bool,
    ran_for: Duration,
    held_for: Duration,
}

impl Turn {
    fn pass(&mut self, passed: Duration) {
        let time = if self.held { &mut self.held_for } else { &mut self.ran_for };
        *time += passed;
    }

    /// Holds it or not; whether that is another than before.
    fn hold(&mut self, hold: bool) -> bool {
        let changes = hold != self.held;
        if changes && !hold {
            *self = Self::default();
        }
        self.held = hold;
        changes
    }
}

impl Allowance {
    /// Of vCPUs that have written `pages` so far, and may write so many a second each from now on.
    pub(super) fn new(throttle: Throttle, quota: f64, at: Instant, pages: Vec<u64>) -> Self {
        let (left, vcpus) = (vec![0.0; pages.len()], vec![Turn::default(); pages.len()]);
        Self { throttle, quota, at, pages, left, vcpus }
    }

    /// Sees what they have written by now; whether others are to be held than before.
    pub(super) fn look(&mut self, now: Instant, pages: Vec<u64>) -> bool {
        let worth = |time: Duration| self.quota * time.as_secs_f64();
        let (owed, saved, least_free) = (worth(OWED), worth(SAVED), worth(LEAST_FREE));
        let passed = now.saturating_duration_since(self.at);
        let gained = worth(passed);
        let mut changed = false;
        for (((before, now), left), turn) in
            self.pages.iter().zip(&pages).zip(&mut self.left).zip(&mut self.vcpus)
        {
            let written = now.saturating_sub(*before) as f64;
            *left = (*left + gained - written).clamp(-owed, saved);
            turn.pass(passed);
            let has_waited = turn.held && turn.held_for >= held_for(self.throttle, turn.ran_for);
            let hold = !has_waited && *left < if turn.held { least_free } else { 0.0 };
            changed |= turn.hold(hold);
        }
        (self.at, self.pages) = (now, pages);
        changed
    }

    /// Whether this vCPU has to wait.
    pub(super) fn holds(&self, index: usize) -> bool {
        self.vcpus.get(index).is_some_and(|turn| turn.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_vcpu_writes_what_it_would_with_that_part_of_its_time() {
        let quota = |speeds: &[(f64, f64)], percent| {
            Speeds(speeds.to_vec()).quota(Throttle::of_percent(percent)).round()
        };
        assert_eq!(quota(&[(40_000.0, 1.0)], 75), 10_000.0);
        assert_eq!(quota(&[(40_000.0, 0.25)], 90), 16_000.0, "a quarter of its time is all it uses");
        assert_eq!(quota(&[(40_000.0, 0.25)], 50), 40_000.0, "less is left to it than it uses");
        assert_eq!(quota(&[(100_000.0, 1.0), (1000.0, 1.0)], 80), 19_200.0, "the second is not slowed");
        assert_eq!(quota(&[(100_000.0, 1.0), (0.0, 1.0)], 80), 20_000.0);
    }

    #[test]
    fn what_there_is_is_shared_out_to_the_last_page_and_who_wants_less_has_all_of_it() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..2000 {
            let wanted: Vec<f64> = (0..=random(6)).map(|_| random(1000) as f64).collect();
            let all: f64 = wanted.iter().sum();
            let total = all * random(101) as f64 / 100.0;
            let quota = shared_out(total, wanted.clone());
            // slowly: the more each may write, the more all do
            let written = |quota: f64| wanted.iter().map(|w| w.min(quota)).sum::<f64>();
            assert!((written(quota) - total).abs() < 1e-6 * all.max(1.0), "{wanted:?} {total} {quota}");
        }
    }

    #[test]
    fn who_wrote_nothing_has_no_speed() {
        let done = |at, pages: [u64; 2], used: [u64; 2]| Done {
            at,
            pages: pages.to_vec(),
            processor_times: used.map(ms).to_vec(),
        };
        let began = Instant::now();
        let before = done(began, [5, 5], [10, 10]);
        assert_eq!(Speeds::between(&before, &done(began + ms(100), [5, 5], [90, 10])), None);
        let speeds = Speeds::between(&before, &done(began + ms(100), [1005, 5], [60, 110])).unwrap();
        assert_eq!(speeds.0.iter().map(|(pages, _)| pages.round()).collect::<Vec<_>>(), [10_000.0, 0.0]);
        assert_eq!(speeds.0.iter().map(|(_, busy)| (busy * 10.0).round()).collect::<Vec<_>>(), [5.0, 10.0]);
    }

    #[test]
    fn a_writer_keeps_its_quota_however_late_it_is_seen_and_who_computes_is_let_be() {
        // it writes 200 pages a millisecond whenever it may, of which it may 20
        for look in [1, 2, 5, 9] {
            let began = Instant::now();
            let mut allowance = Allowance::new(Throttle::of_percent(90), 20_000.0, began, vec![0, 0]);
            let mut written = 0;
            for at in (look..=5000).step_by(look as usize) {
                if !allowance.holds(0) {
                    written += 200 * look;
                }
                allowance.look(began + ms(at), vec![written, at / 100]);
                assert!(!allowance.holds(1));
            }
            assert!((99_000..=103_000).contains(&written), "{written} with a look each {look} ms");
        }
    }

    #[test]
    fn a_guest_that_was_quiet_when_it_was_watched_keeps_the_part_of_its_time_that_is_left_to_it() {
        for look in [1, 2, 5, 9] {
            let began = Instant::now();
            let mut allowance = Allowance::new(Throttle::of_percent(80), 10.0, began, vec![0]);
            let (mut written, mut ran) = (0, 0);
            for at in (look..=5000).step_by(look as usize) {
                if !allowance.holds(0) {
                    (written, ran) = (written + 200 * look, ran + look);
                }
                allowance.look(began + ms(at), vec![written]);
            }
            assert!((900..=1100).contains(&ran), "{ran} of 5000 with a look each {look} ms");
        }
    }

    #[test]
    fn what_was_saved_in_a_quiet_phase_is_a_burst_and_no_more() {
        let began = Instant::now();
        let mut allowance = Allowance::new(Throttle::of_percent(99), 1000.0, began, vec![0]);
        assert!(!allowance.look(began + ms(10_000), vec![0]));
        assert!(!allowance.look(began + ms(10_000), vec![50]));
        assert!(allowance.look(began + ms(10_000), vec![52]) && allowance.holds(0));
        assert!(
            !allowance.look(began + ms(10_003), vec![52]),
            "it is held until there is something to write"
        );
        assert!(allowance.look(began + ms(10_005), vec![52]) && !allowance.holds(0));
        // owes no more than the longest time that it may be held for
        assert!(allowance.look(began + ms(10_006), vec![1_000_000]));
        assert!(allowance.look(began + ms(10_110), vec![1_000_000]) && !allowance.holds(0));
    }
}
