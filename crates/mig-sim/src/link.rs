//! A link: one direction of one connection. In order, at a bandwidth, with a latency that varies, and with
//! room for so many bytes.

use std::collections::VecDeque;

use mig_core::domain::PAGE_BYTES;
use mig_wire::{HEADER_BYTES, Message};

use crate::guest::Page;
use crate::random::Random;

/// The link that carries control messages to the destination.
pub(crate) const TO_DESTINATION: usize = 0;
/// The link that carries control messages to the source.
pub(crate) const TO_SOURCE: usize = 1;
/// The first of the links that carry pages.
pub(crate) const FIRST_CHANNEL: usize = 2;
/// A channel's first frame, and its descriptor of a run of pages.
const ATTACH_BYTES: u64 = 40 + 34;
const RUN_BYTES: u64 = 16;

/// What travels.
#[derive(Debug, Clone)]
pub(crate) enum Cargo {
    /// A message and the length of its frame.
    Control(Message, u64),
    Attach,
    Pages(Vec<(u64, Page)>),
    RoundEnd(u32),
    /// The sender closed its end.
    Closed,
}

impl Cargo {
    pub(crate) fn bytes(&self) -> u64 {
        let header = HEADER_BYTES as u64;
        match self {
            Self::Control(_, bytes) => *bytes,
            Self::Attach => ATTACH_BYTES,
            Self::Pages(pages) => {
                let raw = pages.iter().filter(|(_, page)| !page.is_zero()).count() as u64;
                header + pages.len() as u64 * RUN_BYTES + raw * PAGE_BYTES
            }
            Self::RoundEnd(_) => header + 16,
            Self::Closed => 0,
        }
    }
}

/// How fast a link is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speed {
    /// Nanoseconds on the way.
    pub(crate) latency: u64,
    /// The most that is added to them.
    pub(crate) jitter: u64,
    pub(crate) nanos_per_page: u64,
}

/// One direction of one connection.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// What is on its way, first in first out: nothing overtakes within a connection.
    queue: VecDeque<Cargo>,
    /// Frames sent so far.
    pub(crate) sent: u64,
    /// What has arrived.
    pub(crate) arrived_bytes: u64,
    pub(crate) arrived_frames: u64,
    /// Bytes on their way.
    pub(crate) bytes_under_way: u64,
    /// How many of those on their way were due while the network was cut.
    pub(crate) stalled: usize,
    /// A channel that waits for room, and the chunk it is at.
    pub(crate) waiting: Option<(u32, u64)>,
    free_at: u64,
    last_arrival: u64,
}

impl Link {
    /// Takes cargo and says when it arrives.
    pub(crate) fn send(&mut self, now: u64, cargo: Cargo, speed: Speed, random: &mut Random) -> u64 {
        let bytes = cargo.bytes();
        self.sent += 1;
        self.bytes_under_way += bytes;
        self.queue.push_back(cargo);
        let busy = bytes.div_ceil(256) * speed.nanos_per_page / 16;
        self.free_at = self.free_at.max(now) + busy;
        let arrival = self.free_at + speed.latency + random.within(0..speed.jitter);
        self.last_arrival = self.last_arrival.max(arrival);
        self.last_arrival
    }

    /// The next to arrive.
    pub(crate) fn front(&self) -> Option<&Cargo> {
        self.queue.front()
    }

    /// Lets the next arrive.
    pub(crate) fn arrive(&mut self) -> Option<Cargo> {
        let cargo = self.queue.pop_front()?;
        self.bytes_under_way -= cargo.bytes();
        self.arrived_bytes += cargo.bytes();
        self.arrived_frames += 1;
        Some(cargo)
    }

    /// After an outage nothing arrives before this.
    pub(crate) fn not_before(&mut self, at: u64) {
        self.last_arrival = self.last_arrival.max(at);
    }

    pub(crate) fn under_way(&self) -> usize {
        self.queue.len()
    }
}
