//! Whether encoding pays: the time it takes, beside the time that the link would take for the bytes it saves.
//!
//! Both are measured, on this channel, as time on the wall: where channels share cores or the link, each feels its part
//! of that. What an encoding spends it must have earned, but for a small allowance of all time that passes, by which
//! it is tried again and again where it does not pay.

use std::time::Duration;

/// How long the link takes for a byte, as a channel's writes feel it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Link {
    /// 0 before anything was written.
    ns_per_byte: f64,
}

impl Link {
    /// So many bytes make a slower link known: sockets buffer as much before they wait.
    const SLOWER_BYTES: f64 = (4 << 20) as f64;
    /// So many a faster one. More, since a write that finds room in a buffer says nothing about the link: where less
    /// is sent, because it is encoded, and in small rounds, most do.
    const FASTER_BYTES: f64 = (16 << 20) as f64;

    pub(super) fn written(&mut self, bytes: usize, took: Duration) {
        let bytes = bytes.max(1) as f64;
        // one write that waited for something else, a core perhaps, does not make a link slow
        let felt = (took.as_nanos() as f64 / bytes).min(2.0 * self.ns_per_byte + 1.0);
        let scale = if felt > self.ns_per_byte { Self::SLOWER_BYTES } else { Self::FASTER_BYTES };
        self.ns_per_byte += (felt - self.ns_per_byte) * (bytes / scale).min(1.0);
    }

    /// What the link would take for so many bytes, in nanoseconds.
    pub(super) fn ns(self, bytes: usize) -> f64 {
        self.ns_per_byte * bytes as f64
    }
}

/// What an encoding may spend.
#[derive(Debug, Clone, Copy)]
pub(super) enum Budget {
    /// It is what was asked for, whether it pays or not.
    Unbounded,
    /// What it earns.
    Earned(Account),
}

/// Figures are in nanoseconds, and a page's of the newer pages more than of the older.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    /// Below 0 what is still to be earned.
    balance_ns: f64,
    /// What a page takes.
    page_ns: f64,
    /// What a page earns, or loses.
    net_ns: f64,
}

impl Budget {
    /// What is lost at most on what paid and does not any more.
    const MOST_NS: f64 = 1e6;
    /// The part of all time that is allowed for trying.
    const ALLOWANCE: f64 = 1.0 / 128.0;
    /// What decoding takes of what encoding does: where both ends share the cores, the link feels it.
    const DECODING: f64 = 0.5;
    /// What a page takes is assumed to be that, before one was tried.
    const UNKNOWN_PAGE_NS: f64 = 20e3;
    /// As many pages replace all that is known.
    const KNOWN_PAGES: f64 = 128.0;

    /// A budget of what is earned, which is nothing yet.
    pub(super) fn earned() -> Self {
        Self::Earned(Account { balance_ns: 0.0, page_ns: Self::UNKNOWN_PAGE_NS, net_ns: 0.0 })
    }

    /// Whether it has paid, as far as that is known.
    pub(super) fn pays(self) -> bool {
        match self {
            Self::Unbounded => true,
            Self::Earned(account) => account.net_ns > 0.0 && account.balance_ns > 0.0,
        }
    }

    /// How many pages may be tried although that may not pay.
    pub(super) fn affords(self) -> usize {
        match self {
            Self::Unbounded => usize::MAX,
            Self::Earned(account) => (account.balance_ns / account.page_ns.max(1.0)).max(0.0) as usize,
        }
    }

    /// Whether to go on with what has cost something already: unless it lost more than a little.
    pub(super) fn goes_on(self) -> bool {
        match self {
            Self::Unbounded => true,
            Self::Earned(account) => account.balance_ns > -Self::MOST_NS,
        }
    }

    /// Time has passed.
    pub(super) fn allow_for(&mut self, passed: Duration) {
        if let Self::Earned(account) = self {
            account.add(passed.as_nanos() as f64 * Self::ALLOWANCE);
        }
    }

    /// Time was spent on finding out how it would pay more.
    pub(super) fn spend(&mut self, took: Duration) {
        if let Self::Earned(account) = self {
            account.add(-(took.as_nanos() as f64));
        }
    }

    /// So many pages took so long, and the link would have taken so long for what that saved.
    pub(super) fn settle(&mut self, pages: usize, took: Duration, saved_ns: f64) {
        let Self::Earned(account) = self else { return };
        let (pages, took_ns) = (pages.max(1) as f64, took.as_nanos() as f64 * (1.0 + Self::DECODING));
        let newer = (pages / Self::KNOWN_PAGES).min(1.0);
        account.add(saved_ns - took_ns);
        account.page_ns += (took_ns / pages - account.page_ns) * newer;
        account.net_ns += ((saved_ns - took_ns) / pages - account.net_ns) * newer;
    }
}

impl Account {
    fn add(&mut self, ns: f64) {
        self.balance_ns = (self.balance_ns + ns).min(Budget::MOST_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// How many of 10,000 tries, each of 4 pages and 100 us, are allowed in the 10 s that they would take, each saving
    /// so much.
    fn allowed(saved_ns: f64) -> usize {
        let mut budget = Budget::earned();
        let tries = (0..10_000).filter(|_| {
            budget.allow_for(MS);
            let allowed = budget.pays() || budget.affords() >= 4;
            if allowed {
                budget.settle(4, MS / 10, saved_ns);
            }
            allowed
        });
        tries.count()
    }

    #[test]
    fn what_does_not_pay_takes_less_than_a_hundredth_of_the_time_and_what_does_is_always_tried() {
        let vain = allowed(0.0);
        assert!(
            (450..550).contains(&vain),
            "{vain} of 10,000, each a tenth of the time and half as much at the peer"
        );
        assert!(allowed(100e3) < 1700, "it saves two thirds of what it takes");
        assert!(allowed(160e3) > 9900);
    }

    #[test]
    fn what_paid_and_does_not_any_more_ends_soon() {
        let mut budget = Budget::earned();
        budget.allow_for(MS);
        (0..1000).for_each(|_| budget.settle(4, MS, 5e6));
        assert!(budget.pays());
        let tries = (0..1000).take_while(|_| {
            budget.settle(4, MS / 10, 0.0);
            budget.pays()
        });
        assert_eq!(tries.count(), 6, "of 150 us each, and then it lost a millisecond");
        assert!(budget.goes_on());
        (0..7).for_each(|_| budget.settle(4, MS / 10, 0.0));
        assert!(!budget.goes_on());
    }

    #[test]
    fn a_link_is_known_by_what_its_writes_take_once_buffers_are_full() {
        let mut link = Link::default();
        let mut write = |bytes, us| {
            link.written(bytes, Duration::from_micros(us));
            link.ns(1000)
        };
        // into a buffer, then as fast as a link of 1 Gbit/s
        write(2 << 20, 700);
        let slow = (0..12).map(|_| write(2 << 20, 16_777)).last().unwrap();
        assert!((7500.0..8100.0).contains(&slow), "{slow} ns a thousand bytes");
        // a small round, which fits into buffers
        let still = (0..4).map(|_| write(256 << 10, 80)).last().unwrap();
        assert!(still > 7000.0, "{still}");
        let fast = (0..100).map(|_| write(2 << 20, 700)).last().unwrap();
        assert!(fast < 400.0, "{fast}");
        let once = write(2 << 20, 100_000);
        assert!(once < 1400.0, "{once}: one write that waited");
    }

    #[test]
    fn what_was_asked_for_has_no_bounds() {
        let mut budget = Budget::Unbounded;
        budget.settle(1, MS * 1000, 0.0);
        assert!(budget.pays() && budget.goes_on() && budget.affords() > 1 << 20);
    }
}
