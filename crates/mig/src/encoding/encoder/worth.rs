//! Whether encoding pays: the time it takes, beside the time that the link would take for the bytes it saves.
//!
//! Both are measured, on this channel, as time on the wall: where channels share cores or the link, each feels its part
//! of that. What pays on the average of the last pages is always done. What does not is tried again and again, in a
//! small part of all time.

use std::time::Duration;

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

    pub(super) fn written(&mut self, bytes: usize, took: Duration) {
        let bytes = bytes.max(1) as f64;
        // whatever one write waited for
        let felt = (took.as_nanos() as f64 / bytes).min(4.0 * self.ns_per_byte + 2.0);
        let part = if felt > self.ns_per_byte {
            took.as_secs_f64() / Self::SLOWER.as_secs_f64()
        } else {
            bytes / Self::FASTER_BYTES
        };
        self.ns_per_byte += (felt - self.ns_per_byte) * part.min(1.0);
    }

    /// What the link would take for so many bytes, in nanoseconds.
    pub(super) fn ns(self, bytes: usize) -> f64 {
        self.ns_per_byte * bytes as f64
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

/// Figures are in nanoseconds, and a page's of the newer pages more than of the older.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    /// What may be spent on trying.
    allowed_ns: f64,
    /// What a page takes.
    page_ns: f64,
    /// What a page earns, or loses.
    net_ns: f64,
}

impl Budget {
    /// What may be spent on trying at a time.
    const MOST_NS: f64 = 1e6;
    /// The part of all time that is allowed for trying. Channels share cores: of those it is several times as much.
    const ALLOWANCE: f64 = 1.0 / 512.0;
    /// Up to there, a channel's writes keep a core busy.
    const BUSY_NS_PER_BYTE: f64 = 8.0;
    /// What decoding takes of what encoding does: where both ends share the cores, the link feels it.
    const DECODING: f64 = 0.5;
    /// What a page takes is assumed to be that, before one was tried.
    const UNKNOWN_PAGE_NS: f64 = 20e3;
    /// As many pages replace all that is known: several of the largest pieces, since one may wait for a core.
    const KNOWN_PAGES: f64 = 128.0;

    /// A budget of what pays, of which nothing is known yet.
    pub(super) fn earned() -> Self {
        Self::Earned(Account { allowed_ns: 0.0, page_ns: Self::UNKNOWN_PAGE_NS, net_ns: 0.0 })
    }

    /// Whether it pays, as far as that is known.
    pub(super) fn pays(self) -> bool {
        match self {
            Self::Unbounded => true,
            Self::Earned(account) => account.net_ns > 0.0,
        }
    }

    /// How many pages may be encoded, as it pays or to see whether it does.
    pub(super) fn affords(self) -> usize {
        match self {
            Self::Earned(account) if !self.pays() => {
                (account.allowed_ns / account.page_ns.max(1.0)).max(0.0) as usize
            }
            _ => usize::MAX,
        }
    }

    /// Time has passed. On a slow link a channel waits for most of it, so that trying takes nothing from the others.
    pub(super) fn allow_for(&mut self, passed: Duration, link: Link) {
        if let Self::Earned(account) = self {
            let slowness = (link.ns_per_byte / Self::BUSY_NS_PER_BYTE).clamp(1.0, 16.0);
            account.allow(passed.as_nanos() as f64 * Self::ALLOWANCE * slowness);
        }
    }

    /// Time was spent on finding out how it would pay more.
    pub(super) fn spend(&mut self, took: Duration) {
        if let Self::Earned(account) = self {
            account.allow(-(took.as_nanos() as f64));
        }
    }

    /// So many pages took so long, and the link would have taken so long for what that saved.
    pub(super) fn settle(&mut self, pages: usize, took: Duration, saved_ns: f64) {
        let paid = self.pays();
        let Self::Earned(account) = self else { return };
        let (pages, took_ns) = (pages.max(1) as f64, took.as_nanos() as f64 * (1.0 + Self::DECODING));
        let newer = (pages / Self::KNOWN_PAGES).min(1.0);
        account.page_ns += (took_ns / pages - account.page_ns) * newer;
        account.net_ns += ((saved_ns - took_ns) / pages - account.net_ns) * newer;
        if !paid {
            account.allow(-took_ns);
        }
    }
}

impl Account {
    fn allow(&mut self, ns: f64) {
        self.allowed_ns = (self.allowed_ns + ns).clamp(-Budget::MOST_NS, Budget::MOST_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// How many of 10,000 tries, each of 4 pages and 100 us, are made in the 10 s that they would take, each saving so
    /// much.
    fn tried(saved_ns: f64, ns_per_byte: f64) -> usize {
        let mut budget = Budget::earned();
        let tries = (0..10_000).filter(|_| {
            budget.allow_for(MS, Link { ns_per_byte });
            let tries = budget.affords() >= 4;
            if tries {
                budget.settle(4, MS / 10, saved_ns);
            }
            tries
        });
        tries.count()
    }

    #[test]
    fn what_does_not_pay_takes_a_fraction_of_a_hundredth_of_the_time_and_what_does_is_always_done() {
        for saved_ns in [0.0, 100e3] {
            let vain = tried(saved_ns, 1.0);
            assert!(
                (110..140).contains(&vain),
                "{vain} of 10,000, a tenth of the time and half of that at the peer"
            );
        }
        assert!(tried(160e3, 1.0) > 9900);
        assert!((900..1050).contains(&tried(0.0, 64.0)), "more on a slow link");
    }

    #[test]
    fn one_piece_that_waited_for_a_core_does_not_end_what_pays_and_several_do() {
        let mut budget = Budget::earned();
        let net = |budget: &mut Budget, took| budget.settle(32, took, 3e6);
        (0..9).for_each(|_| net(&mut budget, MS));
        assert!(budget.pays());
        net(&mut budget, MS * 4);
        assert!(budget.pays());
        (0..4).for_each(|_| net(&mut budget, MS * 4));
        assert!(!budget.pays());
        assert_eq!(budget.affords(), 0, "until time has passed");
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
    fn what_was_asked_for_has_no_bounds() {
        let mut budget = Budget::Unbounded;
        budget.settle(1, MS * 1000, 0.0);
        assert!(budget.pays() && budget.affords() > 1 << 20);
    }
}
