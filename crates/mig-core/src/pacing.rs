//! A bandwidth cap: a token bucket that all channels share.
//!
//! Pure: the time comes from outside. The bucket is kept as the moment up to which all that was granted is paid for,
//! and each grant has its own moment to begin, right behind the one before it: however many channels ask, they go
//! in their order, and the sum is the cap.

use std::time::Duration;

/// The least a cap may be, in bytes a second: 1 Mbit/s. With less no guest moves, and no peer is patient.
pub const MIN_BYTES_PER_SECOND: u64 = 125_000;

/// Time unused up to this is made up for: threads wake late, and a cap that loses what it slept too long is no
/// promise of bandwidth. Nobody sends more than this and a grant beyond the cap, over whatever time.
pub const BURST: Duration = Duration::from_millis(10);
/// What a grant is worth at most, so that traffic is even within [`BURST`].
const GRANT: Duration = Duration::from_millis(2);
/// No grant is smaller, if as much is wanted.
const MIN_GRANT_BYTES: u64 = 4096;

/// What the page channels may take of the link, all together; what is counted is what they write, headers of ours
/// included and those of TCP and below not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Bandwidth {
    /// Bytes a second, at least [`MIN_BYTES_PER_SECOND`]; `None` for as many as the link gives.
    pub cap_bytes_per_second: Option<u64>,
    /// What becomes of the cap in the pause.
    pub in_pause: InPause,
}

/// What becomes of a cap in the last round, while the guest waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum InPause {
    /// It is lifted. What the link gives then is not known: the prediction counts with what came through so far.
    #[default]
    Lifted,
    /// It is changed to so many bytes a second, which somebody knows the link to give: the prediction counts with
    /// them.
    Known(u64),
    /// It stays.
    Capped,
}

impl Bandwidth {
    /// The cap of the last round.
    pub fn pause_cap_bytes_per_second(&self) -> Option<u64> {
        match self.in_pause {
            InPause::Lifted => None,
            InPause::Known(cap) => Some(cap),
            InPause::Capped => self.cap_bytes_per_second,
        }
    }

    /// What the link is known to give in the last round, where somebody said so.
    pub fn known_in_pause(&self) -> Option<u64> {
        match self.in_pause {
            InPause::Known(bytes_per_second) => Some(bytes_per_second),
            InPause::Lifted | InPause::Capped => None,
        }
    }
}

/// Who may send how much when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pacing {
    cap_bytes_per_second: Option<u64>,
    paid_until: Duration,
}

/// Leave to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Not before this moment.
    pub at: Duration,
    /// At most this much; not zero unless nothing was wanted.
    pub bytes: u64,
}

impl Pacing {
    /// With a cap of at least [`MIN_BYTES_PER_SECOND`], which a lower one is raised to, or without one.
    pub fn new(cap_bytes_per_second: Option<u64>) -> Self {
        let cap_bytes_per_second = cap_bytes_per_second.map(|cap| cap.max(MIN_BYTES_PER_SECOND));
        Self { cap_bytes_per_second, paid_until: Duration::ZERO }
    }

    /// Changes the cap for all that is granted from now on. What was granted for later is forgotten: who waits for it
    /// asks again.
    pub fn change(&mut self, now: Duration, cap_bytes_per_second: Option<u64>) {
        *self = Self { paid_until: self.paid_until.min(now), ..Self::new(cap_bytes_per_second) };
    }

    /// Whether there is a cap.
    pub fn is_capped(&self) -> bool {
        self.cap_bytes_per_second.is_some()
    }

    /// Leave to send some of `wanted_bytes`, which are to be sent then.
    pub fn grant(&mut self, now: Duration, wanted_bytes: u64) -> Grant {
        let Some(cap) = self.cap_bytes_per_second else { return Grant { at: now, bytes: wanted_bytes } };
        let most = scaled(GRANT.as_nanos() as u64, cap, 1_000_000_000).max(MIN_GRANT_BYTES);
        let bytes = wanted_bytes.min(most);
        let begin = self.paid_until.max(now.saturating_sub(BURST));
        self.paid_until = begin + Duration::from_nanos(scaled(bytes, 1_000_000_000, cap));
        Grant { at: begin.max(now), bytes }
    }
}

/// a * b / c without overflow on the way.
fn scaled(a: u64, b: u64, c: u64) -> u64 {
    u64::try_from(u128::from(a) * u128::from(b) / u128::from(c)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GBIT: u64 = 125_000_000;

    /// What is sent, and when: senders take turns, each wakes as late as told, and wants more as soon as it has sent.
    fn sent(cap: u64, senders: usize, late_us: &[u64], time: Duration) -> Vec<(Duration, u64)> {
        let mut pacing = Pacing::new(Some(cap));
        let mut ready = vec![Duration::ZERO; senders];
        let mut sent = Vec::new();
        for late in late_us.iter().cycle() {
            let sender = (0..senders).min_by_key(|s| ready[*s]).unwrap();
            let grant = pacing.grant(ready[sender], 2 << 20);
            let at = grant.at
                + if grant.at > ready[sender] { Duration::from_micros(*late) } else { Duration::ZERO };
            if at > time {
                sent.sort_unstable();
                return sent;
            }
            sent.push((at, grant.bytes));
            ready[sender] = at;
        }
        unreachable!("the cycle has no end")
    }

    #[test]
    fn the_sum_over_all_channels_is_the_cap_within_two_percent_although_threads_wake_late() {
        for cap in [GBIT / 10, GBIT, 10 * GBIT] {
            for senders in [1, 2, 8] {
                let sent = sent(cap, senders, &[60, 900, 150, 4000, 70], Duration::from_secs(2));
                let bytes: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
                let part = bytes as f64 / (2.0 * cap as f64);
                assert!((0.98..=1.02).contains(&part), "{part} of {cap} by {senders}");
            }
        }
    }

    #[test]
    fn traffic_is_even_over_ten_milliseconds() {
        let sent = sent(GBIT, 4, &[60], Duration::from_secs(1));
        let in_slot =
            |slot: u128| sent.iter().filter(|(at, _)| at.as_millis() / 10 == slot).map(|(_, b)| b).sum();
        for slot in 2..99 {
            let bytes: u64 = in_slot(slot);
            assert!((1_000_000..1_500_000).contains(&bytes), "{bytes} in slot {slot}");
        }
    }

    #[test]
    fn without_a_cap_everything_goes_at_once() {
        let mut pacing = Pacing::new(None);
        let now = Duration::from_secs(7);
        assert_eq!(pacing.grant(now, u64::MAX), Grant { at: now, bytes: u64::MAX });
    }

    #[test]
    fn a_changed_cap_holds_for_the_next_grant() {
        let mut pacing = Pacing::new(Some(GBIT));
        pacing.grant(Duration::ZERO, 1 << 30);
        pacing.change(Duration::ZERO, Some(10 * GBIT));
        assert_eq!(pacing.grant(Duration::ZERO, 1 << 30), Grant { at: Duration::ZERO, bytes: 2_500_000 });
        pacing.change(Duration::ZERO, None);
        assert_eq!(pacing.grant(Duration::ZERO, 1 << 30).bytes, 1 << 30);
        pacing.change(Duration::ZERO, Some(0));
        assert_eq!(pacing.grant(Duration::ZERO, 1 << 30).bytes, MIN_GRANT_BYTES, "the least cap");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        /// The slow oracle: looks at every pair of moments.
        #[test]
        fn over_no_time_is_more_sent_than_the_cap_and_a_burst(
            cap in MIN_BYTES_PER_SECOND..2 * GBIT, senders in 1..5usize,
            late_us in proptest::collection::vec(0..30_000u64, 1..20)
        ) {
            let sent = sent(cap, senders, &late_us, Duration::from_millis(400));
            let slack = scaled(BURST.as_nanos() as u64, cap, 1_000_000_000);
            let grant = scaled(GRANT.as_nanos() as u64, cap, 1_000_000_000).max(MIN_GRANT_BYTES);
            // a sender that wakes late sends what was granted to it before
            let late = late_us.iter().max().unwrap() * cap / 1_000_000;
            for from in 0..sent.len() {
                let mut bytes = 0;
                for (at, count) in &sent[from..] {
                    bytes += count;
                    let paid = scaled((*at - sent[from].0).as_nanos() as u64, cap, 1_000_000_000);
                    prop_assert!(bytes <= paid + slack + late + grant * (1 + senders as u64));
                }
            }
        }
    }
}
