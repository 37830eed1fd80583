//! How long a peer that is alive may take: for its next word, and, where that depends on the guest and the link,
//! without going on. (A peer that is not alive is noticed by its silence.)

use std::time::{Duration, Instant};

use mig_core::{Blame, Fault, Side, Step};

use crate::link::Link;
use crate::stall::{Delivery, LEAST_BYTES, Meter, Standstill};
use crate::streams::Streams;

/// How often a coordinator looks at how its peer gets on.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a destination may take nothing of what it is sent.
const TAKES_NOTHING: Duration = Duration::from_secs(10);
/// How long it may take to confirm a round that its host has all of.
const CONFIRMS: Duration = Duration::from_secs(30);
/// How long a source may send nothing of a round: it may be looking for pages worth sending, or pausing its guest.
const SENDS_NOTHING: Duration = Duration::from_secs(30);

/// A source's patience with its destination.
pub(crate) struct WithDestination {
    clock: Instant,
    step: Step,
    entered: Duration,
    pages: Meter,
    control: Meter,
}

impl WithDestination {
    pub(crate) fn new(step: Step) -> Self {
        let meter = Meter::new(Duration::ZERO, Delivery::default());
        Self { clock: Instant::now(), step, entered: Duration::ZERO, pages: meter.clone(), control: meter }
    }

    /// The source begins a step.
    pub(crate) fn enter(&mut self, step: Step, link: &Link, streams: &Streams) {
        let now = self.clock.elapsed();
        (self.step, self.entered) = (step, now);
        self.pages = Meter::new(now, streams.delivery());
        self.control = Meter::new(now, link.delivery());
    }

    /// The fault of a destination that has not gone on for too long. `sent` says that nothing of the round waits
    /// on this side.
    pub(crate) fn look(&mut self, sent: bool, link: &Link, streams: &Streams) -> Option<Fault> {
        let now = self.clock.elapsed();
        let copies = matches!(self.step, Step::Round(_) | Step::LastRound);
        let pages = self.pages.look(now, streams.delivery(), copies && sent);
        let control = self.control.look(now, link.delivery(), false);
        let stuck = [pages, control].into_iter().find(|s| s.owed_bytes > 0 && s.lasts > TAKES_NOTHING);
        if copies {
            return match stuck {
                Some(Standstill { lasts, moved_bytes, owed_bytes }) => {
                    let s = lasts.as_secs_f64();
                    let cause =
                        format!("took {moved_bytes} of {owed_bytes} bytes that waited for it in {s:.1} s");
                    Some(self.fault(&cause))
                }
                None if pages.lasts > CONFIRMS => {
                    let s = pages.lasts.as_secs_f64();
                    Some(self.fault(&format!("has not confirmed for {s:.1} s what its host has all of")))
                }
                None => None,
            };
        }
        if matches!(self.step, Step::Load) && link.delivery().owed_bytes > LEAST_BYTES && stuck.is_none() {
            // it cannot load what is still on its way
            self.entered = now;
        }
        let limit = with_destination(self.step)?;
        (now.saturating_sub(self.entered) > limit).then(|| self.fault(&too_late(limit)))
    }

    fn fault(&self, cause: &str) -> Fault {
        fault(Side::Source, self.step, cause)
    }
}

/// A destination's patience with its source.
pub(crate) struct WithSource {
    clock: Instant,
    step: Step,
    entered: Duration,
    received: Meter,
    /// What digests of all memory may take the source, in which it sends nothing.
    digests: Duration,
}

impl WithSource {
    pub(crate) fn new(step: Step) -> Self {
        let received = Meter::new(Duration::ZERO, Delivery::default());
        Self { clock: Instant::now(), step, entered: Duration::ZERO, received, digests: Duration::ZERO }
    }

    /// Allows for digests that should take `expected`.
    pub(crate) fn allow_for_digests(&mut self, expected: Duration) {
        self.digests = 10 * expected;
    }

    /// The destination begins a step.
    pub(crate) fn enter(&mut self, step: Step, link: &Link, streams: &Streams) {
        let now = self.clock.elapsed();
        (self.step, self.entered) = (step, now);
        self.received = Meter::new(now, received(link, streams));
    }

    /// The fault of a source that has not gone on for too long.
    pub(crate) fn look(&mut self, link: &Link, streams: &Streams) -> Option<Fault> {
        let now = self.clock.elapsed();
        if let Step::Round(_) = self.step {
            let Standstill { lasts, moved_bytes, .. } =
                self.received.look(now, received(link, streams), true);
            let s = lasts.as_secs_f64();
            let late = lasts > SENDS_NOTHING + self.digests;
            return late.then(|| self.fault(&format!("sent {moved_bytes} bytes of the round in {s:.1} s")));
        }
        let limit = with_source(self.step)?;
        (now.saturating_sub(self.entered) > limit).then(|| self.fault(&too_late(limit)))
    }

    fn fault(&self, cause: &str) -> Fault {
        fault(Side::Destination, self.step, cause)
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
        // it makes the guest's memory: seconds a GiB where its host must find it first
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
