//! What a switchover now would cost, from what was measured so far.
//!
//! A round costs a fixed overhead and its bytes over the bandwidth. Rounds of many bytes teach the bandwidth: each
//! newer one counts as much as all before it, but the first, in which the destination finds memory for the guest
//! and most pages are looked at rather than sent, is forgotten with the next. Rounds of few pages teach the
//! overhead: the median of the last three, since one that met a busy host says nothing about the next. One of
//! many pages but few bytes (zeros) teaches neither, since its time went into looking. All integers, so that
//! states stay `Eq` and `Hash`.

use std::time::Duration;

use crate::domain::PAGE_BYTES;
use crate::progress::Downtime;

/// Rounds of at least this many bytes measure the bandwidth.
const BANDWIDTH_SAMPLE_BYTES: u64 = 1 << 20;
/// Others of at most this many pages measure the overhead of a round.
const OVERHEAD_SAMPLE_PAGES: u64 = 512;
/// Assumed before anything was measured: 1 Gbit/s, so that the first guess is no promise.
const UNKNOWN_BYTES_PER_SECOND: u64 = 125_000_000;
/// What answering Ready takes beside the way there and back, by which two threads a side hand it on.
const HANDING_OVER: Duration = Duration::from_micros(25);
/// Handing a round to the channels and hearing of its end, beside the way there and back: assumed before a round
/// of few pages was measured.
const UNKNOWN_OVERHEAD: Duration = Duration::from_micros(150);

/// Measured costs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Estimate {
    /// Pausing, as the VM expects it.
    pub pause: Duration,
    /// Saving, as the VM expects it.
    pub save: Duration,
    /// There and back on the control channel.
    pub round_trip: Duration,
    /// Restoring, as the destination expects it.
    pub load: Duration,
    /// Resuming, as the destination expects it.
    pub resume: Duration,
    /// Digests, on one side after the other.
    pub verify: Duration,
    /// What the link is known to give in the pause, in bytes a second, where that is not what rounds have.
    pub pause_bytes_per_second: Option<u64>,
    /// Of the last round of many bytes: what its pages hold, and what of that was on the wire.
    raw_bytes: u64,
    wire_bytes: u64,
    /// Of rounds so far; 0 before there was one.
    bytes_per_second: u64,
    /// How many rounds taught that, up to 2.
    bandwidth_rounds: u8,
    /// What the last rounds of few pages cost beyond their bytes, the newest last.
    overheads: [Option<Duration>; 3],
    dirty_pages: u64,
    dirty_over: Duration,
    /// What reading the dirty log took, the newest last.
    syncs: [Option<Duration>; 3],
}

impl Estimate {
    /// A round has arrived: `pages` of any kind, `sent_bytes` on the wire.
    pub fn round(&mut self, pages: u64, sent_bytes: u64, elapsed: Duration) {
        if sent_bytes >= BANDWIDTH_SAMPLE_BYTES {
            let moving = elapsed.saturating_sub(self.overhead()).max(elapsed / 4);
            let measured = ratio(sent_bytes, 1_000_000_000, nanos(moving).max(1)).max(1);
            self.bytes_per_second = match self.bandwidth_rounds {
                0 | 1 => measured,
                _ => self.bytes_per_second / 2 + measured.div_ceil(2),
            };
            self.bandwidth_rounds = (self.bandwidth_rounds + 1).min(2);
        } else if pages <= OVERHEAD_SAMPLE_PAGES {
            let surplus = elapsed.saturating_sub(self.on_the_wire(sent_bytes));
            self.overheads = [self.overheads[1], self.overheads[2], Some(surplus)];
        }
    }

    /// In the round that has arrived `wire_bytes` stood for `raw_bytes` of pages.
    pub fn encoded(&mut self, raw_bytes: u64, wire_bytes: u64) {
        if raw_bytes >= BANDWIDTH_SAMPLE_BYTES {
            (self.raw_bytes, self.wire_bytes) = (raw_bytes, wire_bytes);
        }
    }

    /// The dirty log was read, `over` after it was read before.
    pub fn dirtied(&mut self, pages: u64, over: Duration, sync: Duration) {
        (self.dirty_pages, self.dirty_over) = (pages, over);
        self.syncs = [self.syncs[1], self.syncs[2], Some(sync)];
    }

    /// Bytes that arrive in a second.
    pub fn bytes_per_second(&self) -> u64 {
        if self.bandwidth_rounds == 0 { UNKNOWN_BYTES_PER_SECOND } else { self.bytes_per_second }
    }

    /// Pages dirtied in a second.
    pub fn dirty_pages_per_second(&self) -> u64 {
        ratio(self.dirty_pages, 1_000_000_000, nanos(self.dirty_over).max(1))
    }

    /// The downtime of a switchover now, with `dirty_pages` to send, by its parts.
    pub fn downtime(&self, dirty_pages: u64) -> Downtime {
        let meanwhile = self.dirtied_within(self.sync() + self.pause).min(dirty_pages);
        Downtime {
            pause: self.pause,
            save: self.save,
            last_sync: self.sync(),
            transfer: self.sending_in_pause(dirty_pages + meanwhile),
            verify: self.verify,
            load: self.load,
            commit: self.round_trip + HANDING_OVER,
            resume: self.resume,
        }
    }

    /// The downtime of a switchover after another round, with `dirty_pages` to send but for `held_pages` of them.
    pub fn downtime_after_round(&self, dirty_pages: u64, held_pages: u64) -> Downtime {
        let sent_pages = dirty_pages.saturating_sub(held_pages);
        let next = self.dirtied_within(self.sending(sent_pages) + self.sync());
        self.downtime(next.min(sent_pages) + held_pages)
    }

    /// The most pages that the pause can send in this time.
    pub fn pages_within(&self, time: Duration) -> u64 {
        ratio(self.pause_rate(), nanos(time), 1_000_000_000) / PAGE_BYTES
    }

    /// What a round of so many pages takes.
    pub fn sending(&self, pages: u64) -> Duration {
        self.overhead() + self.on_the_wire(pages.saturating_mul(PAGE_BYTES))
    }

    fn sending_in_pause(&self, pages: u64) -> Duration {
        let bytes = pages.saturating_mul(PAGE_BYTES);
        self.overhead() + Duration::from_nanos(ratio(bytes, 1_000_000_000, self.pause_rate()))
    }

    /// Bytes of pages that arrive in a second of the pause; at least 1.
    fn pause_rate(&self) -> u64 {
        // what is known of the link are bytes on the wire, which stand for more where pages are encoded
        let known = self
            .pause_bytes_per_second
            .map(|rate| ratio(rate, self.raw_bytes.max(1), self.wire_bytes.max(1)));
        known.unwrap_or_else(|| self.bytes_per_second()).max(1)
    }

    /// What a round costs beyond its bytes: at least a round trip.
    fn overhead(&self) -> Duration {
        median(&self.overheads).unwrap_or(UNKNOWN_OVERHEAD + self.round_trip).max(self.round_trip)
    }

    /// What reading the dirty log takes.
    fn sync(&self) -> Duration {
        median(&self.syncs).unwrap_or_default()
    }

    fn on_the_wire(&self, bytes: u64) -> Duration {
        Duration::from_nanos(ratio(bytes, 1_000_000_000, self.bytes_per_second()))
    }

    fn dirtied_within(&self, time: Duration) -> u64 {
        ratio(self.dirty_pages, nanos(time), nanos(self.dirty_over).max(1))
    }
}

/// The middle one of those that are known, the lower of two.
fn median(samples: &[Option<Duration>; 3]) -> Option<Duration> {
    let mut samples = *samples;
    // the unknown ones come first
    samples.sort_unstable();
    let unknown = samples.iter().filter(|s| s.is_none()).count();
    samples.get(unknown + 2usize.saturating_sub(unknown) / 2).copied().flatten()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// a * b / c without overflow on the way.
fn ratio(a: u64, b: u64, c: u64) -> u64 {
    u64::try_from(u128::from(a) * u128::from(b) / u128::from(c)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_1_gb_per_second() -> Estimate {
        let mut estimate = Estimate::default();
        estimate.round(250_000, 1_000_000_000, Duration::from_secs(1) + UNKNOWN_OVERHEAD);
        estimate
    }

    #[test]
    fn bandwidth_follows_the_newer_rounds() {
        let mut estimate = at_1_gb_per_second();
        assert_eq!(estimate.bytes_per_second(), 1_000_000_000);
        for _ in 0..10 {
            estimate.round(250_000, 1_000_000_000, Duration::from_secs(2));
        }
        assert!((500_000_000..501_000_000).contains(&estimate.bytes_per_second()));
    }

    #[test]
    fn the_first_round_is_forgotten_with_the_next() {
        let mut estimate = at_1_gb_per_second();
        estimate.round(10_000, 40_000_000, Duration::from_millis(10) + UNKNOWN_OVERHEAD);
        assert_eq!(estimate.bytes_per_second(), 4_000_000_000);
    }

    #[test]
    fn one_round_that_met_a_busy_host_does_not_teach_the_overhead() {
        let mut estimate = at_1_gb_per_second();
        for ms in [2, 90, 3] {
            estimate.round(1, 0, Duration::from_millis(ms));
        }
        assert_eq!(estimate.downtime(0).total(), Duration::from_millis(3) + HANDING_OVER);
    }

    #[test]
    fn small_rounds_teach_the_overhead_and_leave_the_bandwidth_alone() {
        let mut estimate = at_1_gb_per_second();
        estimate.round(24, 100_000, Duration::from_micros(1100));
        assert_eq!(estimate.bytes_per_second(), 1_000_000_000);
        assert_eq!(estimate.downtime(0).total(), Duration::from_millis(1) + HANDING_OVER);
    }

    #[test]
    fn a_round_of_zeros_teaches_nothing() {
        let mut estimate = at_1_gb_per_second();
        let before = estimate.clone();
        estimate.round(1_000_000, 50_000, Duration::from_millis(500));
        assert_eq!(estimate, before);
    }

    #[test]
    fn the_downtime_holds_every_cost() {
        let mut estimate = at_1_gb_per_second();
        let ms = Duration::from_millis;
        (estimate.pause, estimate.save, estimate.load) = (ms(1), ms(2), ms(4));
        (estimate.resume, estimate.verify, estimate.round_trip) = (ms(8), ms(16), ms(32));
        estimate.dirtied(0, ms(100), ms(64));
        // 1000 pages are 4.096 ms; the round trip counts once for the pages and once for the commit
        assert_eq!(
            estimate.downtime(1000).total(),
            ms(127 + 32) + Duration::from_micros(4096) + UNKNOWN_OVERHEAD + HANDING_OVER
        );
    }

    #[test]
    fn a_link_that_is_known_to_give_more_in_the_pause_is_counted_with_that_there_alone() {
        let mut estimate = at_1_gb_per_second();
        estimate.dirtied(100_000, Duration::from_secs(1), Duration::ZERO);
        let capped = estimate.clone();
        estimate.pause_bytes_per_second = Some(10_000_000_000);
        let part = |e: &Estimate, pages| e.downtime(pages).transfer - UNKNOWN_OVERHEAD;
        assert_eq!(part(&estimate, 100_000), part(&capped, 100_000) / 10);
        estimate.encoded(400_000_000, 100_000_000);
        assert_eq!(part(&estimate, 100_000), part(&capped, 100_000) / 40, "a byte stands for four");
        estimate.encoded(400_000_000, 400_000_000);
        let (known, before) =
            (estimate.downtime_after_round(100_000, 0), capped.downtime_after_round(100_000, 0));
        assert_eq!(known.transfer - UNKNOWN_OVERHEAD, (before.transfer - UNKNOWN_OVERHEAD) / 10);
    }

    #[test]
    fn another_round_helps_as_far_as_the_guest_is_slower_than_the_link() {
        let mut estimate = at_1_gb_per_second();
        estimate.dirtied(1000, Duration::from_secs(1), Duration::ZERO);
        let (now, next) =
            (estimate.downtime(100_000).total(), estimate.downtime_after_round(100_000, 0).total());
        assert!(next < now / 100, "{next:?} after {now:?}");
        estimate.dirtied(1_000_000, Duration::from_secs(1), Duration::ZERO);
        assert_eq!(estimate.downtime_after_round(100_000, 0), estimate.downtime(100_000));
    }

    #[test]
    fn extreme_figures_neither_overflow_nor_divide_by_zero() {
        let mut estimate = Estimate::default();
        estimate.round(u64::MAX, u64::MAX, Duration::ZERO);
        estimate.dirtied(u64::MAX, Duration::ZERO, Duration::ZERO);
        estimate.downtime_after_round(u64::MAX / 2, u64::MAX / 4);
        estimate.pages_within(Duration::MAX);
        estimate.dirty_pages_per_second();
    }
}
