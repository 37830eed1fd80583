//! Whether encoding pays: the time it takes, beside the time that the link would take for the bytes it saves.
//!
//! Both are measured, on this channel, as time on the wall: where channels share cores or the link, each feels its part
//! of that. What compression waits for others than channels is left out. What pays on the average of the last pages is always done. What does not is tried again and again, in a
//! small part of all time.

use std::time::Duration;

use mig_core::pacing::InPause;

use super::Moment;

/// How long the link takes for a byte, as a channel's writes feel it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Link {
    /// 0 before anything was written.
    ns_per_byte: f64,
}

impl Link {
    /// So long a time makes a slower link known: longer than a write waits for a core.
    const SLOWER: Duration = Duration::from_millis(100);
    /// So many bytes a faster one: more than sockets buffer, since a write that finds room there says nothing about the
    /// link. In small rounds, and where less is sent because it is encoded, most do.
    const FASTER_BYTES: f64 = (16 << 20) as f64;
    /// The part of that which a write says that did not wait, where no more was asked of the link than it is known to
    /// carry: while what is sent is encoded, a slow link looks fast. It must say something, or a link that was slow for
    /// a moment would be taken for slow as long as encoding seems to pay.
    const UNASKED: f64 = 0.25;
    /// Up to there, a channel's writes keep a core busy.
    const BUSY_NS_PER_BYTE: f64 = 8.0;

    /// So many bytes were written, which took so long; since the bytes before them so much had passed.
    pub(super) fn written(&mut self, bytes: usize, took: Duration, passed: Duration) {
        let bytes = bytes.max(1) as f64;
        // whatever one write waited for
        let felt = (took.as_nanos() as f64 / bytes).min(4.0 * self.ns_per_byte + 2.0);
        let part = if felt > self.ns_per_byte {
            took.as_secs_f64() / Self::SLOWER.as_secs_f64()
        } else {
            let is_asked = (passed.as_nanos() as f64 / bytes) <= self.ns_per_byte;
            bytes / Self::FASTER_BYTES * if is_asked { 1.0 } else { Self::UNASKED }
        };
        self.ns_per_byte += (felt - self.ns_per_byte) * part.min(1.0);
    }

    /// What the link would take for so many bytes, in nanoseconds.
    pub(super) fn ns(self, bytes: usize) -> f64 {
        self.ns_per_byte * bytes as f64
    }

    /// By how much it takes longer than a link on which a channel's writes keep a core busy; at least 1, at most 16.
    pub(super) fn slowness(self) -> f64 {
        (self.ns_per_byte / Self::BUSY_NS_PER_BYTE).clamp(1.0, 16.0)
    }
}

/// The link as it is in the rounds, and as it is to be expected in the pause.
#[derive(Debug, Clone, Copy)]
pub(super) struct Links {
    /// As writes feel it, held to the cap.
    in_rounds: Link,
    /// As they would without the cap.
    uncapped: Link,
    in_pause: InPause,
    channels: usize,
}

impl Links {
    pub(super) fn new(in_pause: InPause, channels: usize) -> Self {
        Self { in_rounds: Link::default(), uncapped: Link::default(), in_pause, channels }
    }

    /// So many bytes were written, which took so long; of that the cap `held` them for so long. So long had `passed`
    /// since they began to be encoded.
    pub(super) fn written(&mut self, bytes: usize, took: Duration, held: Duration, passed: Duration) {
        self.in_rounds.written(bytes, took, passed);
        self.uncapped.written(bytes, took.saturating_sub(held), passed.saturating_sub(held));
    }

    /// What to count with. A link that never made a write wait is only known to be faster than the cap, and is taken
    /// for as fast as it looks: what the guest would have to wait for in the pause is then the encoding.
    pub(super) fn at(&self, moment: Moment) -> Link {
        match self.in_pause {
            _ if !moment.is_last => self.in_rounds,
            InPause::Capped => self.in_rounds,
            InPause::Lifted => self.uncapped,
            InPause::Known(bytes_per_second) => {
                let part = self.channels as f64 / bytes_per_second.max(1) as f64;
                Link { ns_per_byte: self.uncapped.ns_per_byte.max(part * 1e9) }
            }
        }
    }
}

/// What an encoding takes and saves, of the newer pages more than of the older.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    /// What a page takes, in nanoseconds.
    page_ns: f64,
    /// What it saves, in bytes.
    saved_bytes: f64,
    /// Of how many that is known.
    pages: f64,
}

impl Cost {
    /// As many pages replace all that is known: several of the largest pieces, since one may wait for a core.
    const KNOWN_PAGES: f64 = 128.0;

    /// So many pages took so long, and became so many bytes fewer.
    pub(super) fn settle(&mut self, pages: usize, took_ns: f64, saved_bytes: usize) {
        let pages = pages.max(1) as f64;
        self.pages = (self.pages + pages).min(Self::KNOWN_PAGES.max(pages));
        let newer = pages / self.pages;
        self.page_ns += (took_ns / pages - self.page_ns) * newer;
        self.saved_bytes += (saved_bytes as f64 / pages - self.saved_bytes) * newer;
    }

    /// What a page earns on a link, or loses, in nanoseconds; none where nothing is known.
    pub(super) fn net_ns(&self, link: Link) -> Option<f64> {
        (self.pages > 0.0).then_some(self.saved_bytes * link.ns_per_byte - self.page_ns)
    }
}

/// How much an encoding is used.
#[derive(Debug, Clone, Copy)]
pub(super) enum Budget {
    /// It is what was asked for, whether it pays or not.
    Unbounded,
    /// As far as it pays, or may be tried.
    Earned(Account),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    /// What may be spent on trying, in nanoseconds.
    allowed_ns: f64,
    cost: Cost,
}

impl Budget {
    /// What may be spent on trying at a time.
    const MOST_NS: f64 = 4e6;
    /// The part of all time that is allowed for trying. Channels share cores: of those it is several times as much.
    const ALLOWANCE: f64 = 1.0 / 512.0;
    /// What decoding takes of what encoding does: where both ends share the cores, the link feels it.
    const DECODING: f64 = 0.5;
    /// What a page takes is assumed to be that, before one was tried.
    const UNKNOWN_PAGE_NS: f64 = 20e3;

    /// A budget of what pays, of which nothing is known yet.
    pub(super) fn earned() -> Self {
        let cost = Cost { page_ns: Self::UNKNOWN_PAGE_NS, ..Cost::default() };
        Self::Earned(Account { allowed_ns: 0.0, cost })
    }

    /// Whether it pays, as far as that is known.
    pub(super) fn pays(&self, link: Link) -> bool {
        match self {
            Self::Unbounded => true,
            Self::Earned(account) => account.cost.net_ns(link).is_some_and(|net| net > 0.0),
        }
    }

    /// How many pages may be encoded, as it pays or to see whether it does.
    pub(super) fn affords(&self, link: Link) -> usize {
        match self {
            Self::Earned(account) if !self.pays(link) => account.tries(),
            _ => usize::MAX,
        }
    }

    /// How many pages may be encoded to see whether it pays.
    pub(super) fn tries(&self) -> usize {
        match self {
            Self::Earned(account) => account.tries(),
            Self::Unbounded => usize::MAX,
        }
    }

    /// Time has passed. On a slow link a channel waits for most of it, so that trying takes nothing from the others.
    pub(super) fn allow_for(&mut self, passed: Duration, link: Link) {
        if let Self::Earned(account) = self {
            account.allow(passed.as_nanos() as f64 * Self::ALLOWANCE * link.slowness());
        }
    }

    /// Time was spent on finding out how it would pay more.
    pub(super) fn spend(&mut self, took: Duration) {
        if let Self::Earned(account) = self {
            account.allow(-(took.as_nanos() as f64));
        }
    }

    /// So many pages took so long here, and became so many bytes fewer.
    pub(super) fn settle(&mut self, pages: usize, took: Duration, saved_bytes: usize, link: Link) {
        let is_try = !self.pays(link);
        self.took(pages, took, saved_bytes, is_try);
    }

    /// The same, where somebody else knows whether that was a try.
    pub(super) fn took(&mut self, pages: usize, took: Duration, saved_bytes: usize, is_try: bool) {
        let Self::Earned(account) = self else { return };
        let took_ns = with_decoding_ns(took);
        account.cost.settle(pages, took_ns, saved_bytes);
        if is_try {
            account.allow(-took_ns);
        }
    }
}

impl Account {
    fn tries(&self) -> usize {
        (self.allowed_ns / self.cost.page_ns.max(1.0)).max(0.0) as usize
    }

    fn allow(&mut self, ns: f64) {
        self.allowed_ns = (self.allowed_ns + ns).clamp(-Budget::MOST_NS, Budget::MOST_NS);
    }
}

/// What took so long here, the other side's part included.
pub(super) fn with_decoding_ns(took: Duration) -> f64 {
    took.as_nanos() as f64 * (1.0 + Budget::DECODING)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// How many of 10,000 tries, each of 4 pages and 100 us, are made in the 10 s that they would take, each saving so
    /// many bytes.
    fn tried(saved_bytes: usize, ns_per_byte: f64) -> usize {
        let (mut budget, link) = (Budget::earned(), Link { ns_per_byte });
        let tries = (0..10_000).filter(|_| {
            budget.allow_for(MS, link);
            let tries = budget.affords(link) >= 4;
            if tries {
                budget.settle(4, MS / 10, saved_bytes, link);
            }
            tries
        });
        tries.count()
    }

    #[test]
    fn what_does_not_pay_takes_a_fraction_of_a_hundredth_of_the_time_and_what_does_is_always_done() {
        for saved_bytes in [0, 100_000] {
            let vain = tried(saved_bytes, 1.0);
            assert!(
                (110..140).contains(&vain),
                "{vain} of 10,000, a tenth of the time and half of that at the peer"
            );
        }
        let paying = tried(160_000, 1.0);
        assert!(paying > 9900, "{paying}");
        assert!((900..1050).contains(&tried(0, 64.0)), "more on a slow link");
    }

    #[test]
    fn one_piece_that_waited_for_a_core_does_not_end_what_pays_and_several_do() {
        let (mut budget, link) = (Budget::earned(), Link { ns_per_byte: 30.0 });
        let net = |budget: &mut Budget, took| budget.settle(32, took, 100_000, link);
        (0..9).for_each(|_| net(&mut budget, MS));
        assert!(budget.pays(link));
        net(&mut budget, MS * 4);
        assert!(budget.pays(link));
        (0..4).for_each(|_| net(&mut budget, MS * 4));
        assert!(!budget.pays(link));
        assert_eq!(budget.affords(link), 0, "until time has passed");
    }

    #[test]
    fn a_link_is_known_by_what_its_writes_take_once_buffers_are_full() {
        let mut link = Link::default();
        let mut write = |bytes, us| {
            let took = Duration::from_micros(us);
            link.written(bytes, took, took);
            link.ns(1000)
        };
        // into a buffer, then as fast as a link of 1 Gbit/s
        write(2 << 20, 700);
        let slow = (0..40).map(|_| write(2 << 20, 16_777)).last().unwrap();
        assert!((7500.0..8100.0).contains(&slow), "{slow} ns a thousand bytes");
        // a small round, which fits into buffers
        let still = (0..4).map(|_| write(256 << 10, 80)).last().unwrap();
        assert!(still > 7000.0, "{still}");
        let fast = (0..100).map(|_| write(2 << 20, 700)).last().unwrap();
        assert!(fast < 400.0, "{fast}");
        let once = write(2 << 20, 10_000);
        assert!(once < 900.0, "{once}: one write that waited for a core");
    }

    #[test]
    fn a_link_that_encoding_leaves_idle_is_not_soon_taken_for_a_fast_one() {
        let after = |passed_ms| {
            let mut link = Link { ns_per_byte: 32.0 };
            (0..16).for_each(|_| link.written(1 << 20, MS / 10, Duration::from_millis(passed_ms)));
            link.ns_per_byte
        };
        // 38 ns a byte, and 19
        let (idle, asked) = (after(40), after(20));
        assert!((23.0..27.0).contains(&idle), "{idle}");
        assert!(asked < 18.0, "{asked}");
        let mut link = Link { ns_per_byte: 32.0 };
        (0..1000).for_each(|_| link.written(1 << 20, MS / 10, MS * 40));
        assert!(link.ns_per_byte < 0.2, "{link:?}");
    }

    #[test]
    fn what_was_asked_for_has_no_bounds() {
        let mut budget = Budget::Unbounded;
        let link = Link::default();
        budget.settle(1, MS * 1000, 0, link);
        assert!(budget.pays(link) && budget.affords(link) > 1 << 20);
    }

    #[test]
    fn what_pays_on_one_link_is_known_not_to_on_a_faster_one() {
        let [slow, fast] = [16.0, 0.5].map(|ns_per_byte| Link { ns_per_byte });
        let mut budget = Budget::earned();
        (0..8).for_each(|_| budget.settle(32, MS / 2, 100_000, slow));
        assert!(budget.pays(slow) && !budget.pays(fast));
    }

    #[test]
    fn in_the_pause_the_link_is_what_it_will_be_then() {
        let at = |in_pause, is_last| {
            let mut links = Links::new(in_pause, 2);
            // 1 Gbit/s, held by a cap, on a link of 10
            for _ in 0..500 {
                let took = Duration::from_micros(16_777);
                links.written(2 << 20, took, took - Duration::from_micros(1678), took);
            }
            links.at(Moment { round: 3, is_last }).ns(1000)
        };
        for in_pause in [InPause::Lifted, InPause::Capped, InPause::Known(1 << 30)] {
            assert!((7500.0..8100.0).contains(&at(in_pause, false)), "{in_pause:?}");
        }
        assert!((7500.0..8100.0).contains(&at(InPause::Capped, true)));
        assert!((750.0..820.0).contains(&at(InPause::Lifted, true)));
        assert!((3900.0..4100.0).contains(&at(InPause::Known(500_000_000), true)), "by two channels");
        assert!((750.0..820.0).contains(&at(InPause::Known(1 << 40), true)), "measured to be slower");
    }
}
