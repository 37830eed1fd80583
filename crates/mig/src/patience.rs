//! How long a peer that is alive may take: for its next word, and, where that depends on the guest and the link,
//! without going on. (A peer that is not alive is noticed by its silence.)

use std::time::{Duration, Instant};

use mig_core::{Blame, Fault, Side, Step};

use crate::link::{Link, MOST_BETWEEN_LOOKS};
use crate::stall::{Delivery, LEAST_BYTES, Meter, Standstill};
use crate::streams::Streams;

/// How often a coordinator looks at how its peer gets on.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a destination may take nothing of what it is sent.
const TAKES_NOTHING: Duration = Duration::from_secs(10);
/// How long it may take to confirm a round that its host, or a tunnel's this side of it, has all of.
const CONFIRMS: Duration = Duration::from_secs(60);
/// How long a source may send nothing of a round: it may be looking for pages worth sending, or pausing its guest.
const SENDS_NOTHING: Duration = Duration::from_secs(30);

/// A source's patience with its destination.
pub(crate) struct WithDestination {
    clock: Clock,
    step: Step,
    entered: Duration,
    /// It was given up in this step, which is said once.
    given_up: bool,
    pages: Meter,
    control: Meter,
}

impl WithDestination {
    pub(crate) fn new(step: Step) -> Self {
        let meter = Meter::new(Duration::ZERO, Delivery::default());
        let (clock, pages) = (Clock::new(), meter.clone());
        Self { clock, step, entered: Duration::ZERO, given_up: false, pages, control: meter }
    }

    /// The source begins a step.
    pub(crate) fn enter(&mut self, step: Step, link: &Link, streams: &Streams) {
        let now = self.clock.now();
        (self.step, self.entered, self.given_up) = (step, now, false);
        self.pages = Meter::new(now, streams.delivery());
        self.control = Meter::new(now, link.delivery());
    }

    /// The fault of a destination that has not gone on for too long. `sent` says that nothing of the round waits
    /// on this side.
    pub(crate) fn look(&mut self, sent: bool, link: &Link, streams: &Streams) -> Option<Fault> {
        let now = self.clock.now();
        let cause = self.look_at(now, sent, streams.delivery(), link.delivery())?;
        if std::mem::replace(&mut self.given_up, true) {
            return None;
        }
        Some(fault(Side::Source, self.step, &cause))
    }

    fn look_at(&mut self, now: Duration, sent: bool, pages: Delivery, control: Delivery) -> Option<String> {
        let copies = matches!(self.step, Step::Round(_) | Step::LastRound);
        let on_pages = self.pages.look(now, pages, copies && sent);
        let on_control = self.control.look(now, control, false);
        let on_either = if copies { [&on_pages, &on_control] } else { [&on_control; 2] };
        let waits = copies || matches!(self.step, Step::Load);
        let mut stuck = on_either.into_iter().filter(|s| s.owed_bytes > 0 && s.lasts > TAKES_NOTHING);
        if waits && let Some(Standstill { lasts, moved_bytes, owed_bytes }) = stuck.next() {
            return Some(format!(
                "took {moved_bytes} of {owed_bytes} bytes that waited for it in {:.1} s",
                lasts.as_secs_f64()
            ));
        }
        if copies {
            return (on_pages.lasts > CONFIRMS).then(|| {
                let s = on_pages.lasts.as_secs_f64();
                format!("has not confirmed for {s:.1} s what its host has all of")
            });
        }
        if waits && control.owed_bytes > LEAST_BYTES {
            // it cannot load what is still on its way
            self.entered = now;
        }
        let limit = with_destination(self.step)?;
        (now.saturating_sub(self.entered) > limit).then(|| too_late(limit))
    }
}

/// A destination's patience with its source.
pub(crate) struct WithSource {
    clock: Clock,
    step: Step,
    entered: Duration,
    /// It was given up in this step, which is said once.
    given_up: bool,
    received: Meter,
    /// What digests of all memory may take the source, in which it sends nothing.
    digests: Duration,
}

impl WithSource {
    pub(crate) fn new(step: Step) -> Self {
        let received = Meter::new(Duration::ZERO, Delivery::default());
        let (clock, entered, digests) = (Clock::new(), Duration::ZERO, Duration::ZERO);
        Self { clock, step, entered, given_up: false, received, digests }
    }

    /// Allows for digests that should take `expected`.
    pub(crate) fn allow_for_digests(&mut self, expected: Duration) {
        self.digests = 10 * expected;
    }

    /// The destination begins a step.
    pub(crate) fn enter(&mut self, step: Step, link: &Link, streams: &Streams) {
        let now = self.clock.now();
        (self.step, self.entered, self.given_up) = (step, now, false);
        self.received = Meter::new(now, received(link, streams));
    }

    /// The fault of a source that has not gone on for too long.
    pub(crate) fn look(&mut self, link: &Link, streams: &Streams) -> Option<Fault> {
        let now = self.clock.now();
        let cause = self.look_at(now, received(link, streams))?;
        if std::mem::replace(&mut self.given_up, true) {
            return None;
        }
        Some(fault(Side::Destination, self.step, &cause))
    }

    fn look_at(&mut self, now: Duration, received: Delivery) -> Option<String> {
        if let Step::Round(_) = self.step {
            let Standstill { lasts, moved_bytes, .. } = self.received.look(now, received, true);
            let late = lasts > SENDS_NOTHING + self.digests;
            return late
                .then(|| format!("sent {moved_bytes} bytes of the round in {:.1} s", lasts.as_secs_f64()));
        }
        let limit = with_source(self.step)?;
        (now.saturating_sub(self.entered) > limit).then(|| too_late(limit))
    }
}

/// Time that counts against a peer: not that in which this side was stopped, or busy with its guest, and did not
/// look.
struct Clock {
    looked: Instant,
    time: Duration,
}

impl Clock {
    fn new() -> Self {
        Self { looked: Instant::now(), time: Duration::ZERO }
    }

    fn now(&mut self) -> Duration {
        self.at(Instant::now())
    }

    fn at(&mut self, instant: Instant) -> Duration {
        self.time += instant.saturating_duration_since(self.looked).min(MOST_BETWEEN_LOOKS);
        self.looked = instant;
        self.time
    }
}

/// What came in; nobody knows how much more should.
fn received(link: &Link, streams: &Streams) -> Delivery {
    Delivery { delivered_bytes: streams.received_bytes() + link.received_bytes(), owed_bytes: u64::MAX }
}

/// What a source gives the destination, by the source's step; `None` where progress is what counts, or where it
/// waits for nothing.
fn with_destination(step: Step) -> Option<Duration> {
    match step {
        Step::Handshake | Step::Attach => Some(Duration::from_secs(10)),
        // it may set the guest's memory aside: seconds a GiB where its host must find it first
        Step::Describe => Some(Duration::from_secs(600)),
        Step::Load | Step::Verify => Some(Duration::from_secs(60)),
        Step::Commit => Some(Duration::from_secs(30)),
        Step::Connect
        | Step::Prepare
        | Step::Track
        | Step::Round(_)
        | Step::Pause
        | Step::Save
        | Step::LastSync
        | Step::LastRound
        | Step::Resume => None,
    }
}

/// What a destination gives the source, by the destination's step; `None` where progress is what counts, or
/// where it waits for nothing.
fn with_source(step: Step) -> Option<Duration> {
    match step {
        Step::Handshake | Step::Describe | Step::Attach => Some(Duration::from_secs(10)),
        Step::Commit => Some(Duration::from_secs(60)),
        Step::Connect
        | Step::Prepare
        | Step::Track
        | Step::Round(_)
        | Step::Pause
        | Step::Save
        | Step::LastSync
        | Step::LastRound
        | Step::Verify
        | Step::Load
        | Step::Resume => None,
    }
}

fn too_late(limit: Duration) -> String {
    format!("has not gone on in time: {} s", limit.as_secs())
}

/// The fault of a peer that lives but does not go on. Blamed on the peer, not the network: a destination then
/// ends with its promise that the guest never ran there, and not in doubt.
fn fault(side: Side, step: Step, cause: &str) -> Fault {
    let peer = match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    };
    Fault::new(side, step, Blame::Peer, format!("the {peer} is there but {cause}"))
        .remedy(format!("see what the {peer} and the network between are doing; migrate again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(delivered_bytes: u64, owed_bytes: u64) -> Delivery {
        Delivery { delivered_bytes, owed_bytes }
    }

    /// The second in which a destination is given up, and why, if in each `pages` and `control` tell how it is.
    fn given_up(
        step: Step,
        sent: bool,
        pages: impl Fn(u64) -> Delivery,
        control: impl Fn(u64) -> Delivery,
    ) -> Option<(u64, String)> {
        let mut patience = WithDestination::new(step);
        (0..3600)
            .find_map(|s| Some((s, patience.look_at(Duration::from_secs(s), sent, pages(s), control(s))?)))
    }

    fn pings(s: u64) -> Delivery {
        delivery(96 * s, 48)
    }

    #[test]
    fn time_in_which_nobody_looked_is_not_the_peers() {
        let mut clock = Clock::new();
        let began = clock.looked;
        let looks = [500, 1000, 61_000, 61_500].map(|ms| clock.at(began + Duration::from_millis(ms)));
        assert_eq!(looks.map(|time| time.as_millis()), [500, 1000, 2000, 2500]);
    }

    #[test]
    fn a_destination_may_be_slow_in_a_round_but_not_stand_still() {
        let round = Step::Round(3);
        let (s, why) = given_up(round, false, |s| delivery(s.min(1000), 1 << 20), pings).unwrap();
        assert_eq!((s, why.as_str()), (11, "took 11 of 1048576 bytes that waited for it in 11.0 s"));
        assert_eq!(given_up(round, false, |s| delivery(s * 4096, 1 << 20), pings), None);
        assert_eq!(given_up(round, false, |_| delivery(7, 0), pings), None, "this side has nothing to send");
        let (s, why) = given_up(round, true, |_| delivery(7, 0), pings).unwrap();
        assert_eq!((s, why.as_str()), (61, "has not confirmed for 61.0 s what its host has all of"));
        let (s, _) = given_up(Step::LastRound, true, |_| delivery(7, 0), |_| delivery(9, 1 << 20)).unwrap();
        assert_eq!(s, 11, "the state counts too");
    }

    #[test]
    fn a_destination_has_a_minute_to_load_from_when_it_has_the_state() {
        let state = |s: u64| delivery(s * 10_000, 3_000_000_u64.saturating_sub(s * 10_000));
        let (s, why) = given_up(Step::Load, true, |_| delivery(7, 0), state).unwrap();
        assert!((358..=361).contains(&s) && why.contains("in time: 60 s"), "{s} {why}");
        let (s, _) = given_up(Step::Load, true, |_| delivery(7, 0), |_| delivery(1, 1 << 20)).unwrap();
        assert_eq!(s, 11, "{s}");
        assert_eq!(given_up(Step::Describe, true, |_| delivery(0, 0), pings).unwrap().0, 601);
    }

    #[test]
    fn a_source_may_be_slow_in_a_round_but_not_stand_still() {
        let after = |digests, received: fn(u64) -> u64| {
            let mut patience = WithSource::new(Step::Round(0));
            patience.allow_for_digests(digests);
            let come = |s| delivery(received(s), u64::MAX);
            (0..3600).find(|s| patience.look_at(Duration::from_secs(*s), come(*s)).is_some())
        };
        assert_eq!(after(Duration::ZERO, |s| s), Some(31));
        assert_eq!(after(Duration::from_secs(60), |s| s), Some(631), "it computes digests meanwhile");
        assert_eq!(after(Duration::ZERO, |s| s * 1000), None);
    }
}
