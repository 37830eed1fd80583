//! A link: in order, at a bandwidth, with a latency that varies.

use mig_wire::Message;

use crate::guest::Page;
use crate::random::Random;

/// The link that carries control messages to the destination.
pub(crate) const TO_DESTINATION: usize = 0;
/// The link that carries control messages to the source.
pub(crate) const TO_SOURCE: usize = 1;
/// The first of the links that carry pages.
pub(crate) const FIRST_CHANNEL: usize = 2;

/// What travels.
#[derive(Debug, Clone)]
pub(crate) enum Cargo {
    Control(Message),
    Attach,
    Pages(Vec<(u64, Page)>),
    RoundEnd(u32),
    /// The sender closed its end.
    Closed,
}

/// One direction of one connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    /// Messages sent so far.
    pub(crate) sent: u64,
    /// What arrives after this was lost.
    pub(crate) lost_after: Option<u64>,
    free_at: u64,
    last_arrival: u64,
}

impl Link {
    /// When something that takes `busy` on the wire arrives, if sent now.
    pub(crate) fn send(
        &mut self,
        now: u64,
        busy: u64,
        latency: u64,
        jitter: u64,
        random: &mut Random,
    ) -> u64 {
        self.sent += 1;
        self.free_at = self.free_at.max(now) + busy;
        let arrival = self.free_at + latency + random.within(0..jitter);
        self.last_arrival = self.last_arrival.max(arrival);
        self.last_arrival
    }
}
