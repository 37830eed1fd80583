//! Peers that live but neither take nor bring what is under way: deadlines that hold inside a round, and inside
//! a frame.
//!
//! A round has no length that could be known, so what counts is progress: bytes that moved, of those that were
//! to move. A slow link makes progress; a peer that lets a byte a second through does not.

use std::time::Duration;

use crate::transport::Stream;

/// Fewer bytes than this in a whole window are none: a link that moves no more than a few a second moves no
/// guest.
pub(crate) const LEAST_BYTES: u64 = 16 << 10;

/// What the peer's host has taken, and what it has not yet taken although it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Delivery {
    pub(crate) delivered_bytes: u64,
    pub(crate) owed_bytes: u64,
}

impl Delivery {
    pub(crate) fn of(stream: &Stream) -> Self {
        let (written, unacknowledged) = stream.written_bytes();
        Self { delivered_bytes: written - unacknowledged, owed_bytes: unacknowledged }
    }
}

impl std::ops::AddAssign for Delivery {
    fn add_assign(&mut self, other: Self) {
        self.delivered_bytes += other.delivered_bytes;
        self.owed_bytes += other.owed_bytes;
    }
}

/// How long a peer has owed something without moving enough of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meter {
    since: Duration,
    mark: Delivery,
}

/// What a peer has done since it was last seen to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standstill {
    /// For how long.
    pub(crate) lasts: Duration,
    /// Bytes that moved all the same.
    pub(crate) moved_bytes: u64,
    /// Bytes that were to move.
    pub(crate) owed_bytes: u64,
}

impl Meter {
    /// A meter that begins to look at `now`.
    pub(crate) fn new(now: Duration, delivery: Delivery) -> Self {
        Self { since: now, mark: delivery }
    }

    /// For how long the peer has kept what it owed then, or, where it owed nothing, the answer that is
    /// `awaited`. Nothing of the time in which it owes nothing counts: then the wait is for this side.
    pub(crate) fn look(&mut self, now: Duration, delivery: Delivery, awaited: bool) -> Standstill {
        let owed_bytes = self.mark.owed_bytes;
        let moved_bytes = delivery.delivered_bytes.saturating_sub(self.mark.delivered_bytes);
        let goes_on = if owed_bytes > 0 {
            moved_bytes >= owed_bytes.min(LEAST_BYTES)
        } else {
            !awaited || moved_bytes > 0 || delivery.owed_bytes > 0
        };
        if goes_on {
            *self = Self::new(now, delivery);
        }
        Standstill { lasts: now.saturating_sub(self.since), moved_bytes, owed_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(delivered_bytes: u64, owed_bytes: u64) -> Delivery {
        Delivery { delivered_bytes, owed_bytes }
    }

    /// How long the peer stands still in the end, if each second `next` tells what was delivered and is owed.
    fn seconds(count: u64, awaited: bool, next: impl Fn(u64) -> Delivery) -> u64 {
        let mut meter = Meter::new(Duration::ZERO, next(0));
        let looks = (1..=count).map(|s| meter.look(Duration::from_secs(s), next(s), awaited).lasts);
        looks.last().unwrap().as_secs()
    }

    #[test]
    fn a_peer_that_takes_nothing_or_a_byte_a_second_stands_still() {
        assert_eq!(seconds(20, false, |_| delivery(5000, 100_000)), 20);
        assert_eq!(seconds(20, false, |s| delivery(s, 100_000)), 20);
        assert_eq!(seconds(20, true, |s| delivery(s, 77)), 20, "of a little, too");
    }

    #[test]
    fn a_slow_but_steady_peer_goes_on() {
        assert!(seconds(1000, false, |s| delivery(s * 4096, 1 << 20)) < 5);
        assert!(seconds(1000, true, |s| delivery(s, 1)) < 2, "all of a little was taken");
    }

    #[test]
    fn who_owes_nothing_is_waited_for_only_where_an_answer_is_awaited() {
        assert_eq!(seconds(20, false, |_| delivery(5000, 0)), 0);
        assert_eq!(seconds(20, true, |_| delivery(5000, 0)), 20);
        assert_eq!(seconds(20, true, |s| delivery(if s > 15 { 5001 } else { 5000 }, 0)), 4);
    }
}
