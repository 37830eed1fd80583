//! What is going to happen, in its order.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use mig_core::destination::Event as DestinationEvent;
use mig_core::source::Event as SourceEvent;
use mig_core::{RunPermit, Side};
use mig_wire::frame::Fate;
use mig_wire::section::Section;

use crate::mishap::{Blow, Work};

/// Something under way at a side, with what it needs.
#[derive(Debug)]
pub(crate) enum Job {
    Plain(Work),
    Locate(Vec<u64>),
    Resume(RunPermit),
    Verify(Vec<u64>),
    Load(Vec<Section>),
}

impl Job {
    pub(crate) fn work(&self) -> Work {
        match self {
            Self::Plain(work) => *work,
            Self::Locate(_) => Work::Locate,
            Self::Resume(_) => Work::Resume,
            Self::Verify(_) => Work::Verify,
            Self::Load(_) => Work::Load,
        }
    }
}

/// Something that is going to happen.
#[derive(Debug)]
pub(crate) enum Happening {
    Source(SourceEvent),
    Destination(DestinationEvent),
    /// What was first sent on this link arrives, or would.
    Arrives(usize),
    /// The answers to all attached channels arrive, or would.
    AttachAnswered,
    Done(Side, Job),
    /// A channel of the source turns to a chunk.
    Channel {
        epoch: u32,
        channel: u16,
        chunk: u64,
    },
    Struck(Side, Blow),
    /// A side has heard nothing for as long as it is patient.
    Silence {
        side: Side,
        outage: u32,
    },
    /// So does one whose peer's host has ended.
    PeerGone(Side),
    Heals {
        outage: u32,
    },
    /// The destination has not answered Commit in time.
    Deadline,
    /// A claim reaches the arbiter.
    Claims(Side),
    /// The source sends a question, which arrives, and is answered; or its patience ends.
    Asks(u64),
    Asked(u64),
    Answered(u64, Fate),
    Unanswered(u64),
    OperatorLooks,
}

/// A happening and its time.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) at: u64,
    /// What is done comes first, so that who waited for it sees it; then what was scheduled first.
    order: (bool, u64),
    pub(crate) what: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// The earliest is the greatest, as the heap wants it.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Everything that is going to happen.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    heap: BinaryHeap<Entry>,
    scheduled: u64,
}

impl Queue {
    pub(crate) fn push(&mut self, at: u64, what: Happening) {
        self.scheduled += 1;
        let order = (!matches!(what, Happening::Done(..)), self.scheduled);
        self.heap.push(Entry { at, order, what });
    }

    /// Puts off what was popped, with its place among what was scheduled.
    pub(crate) fn put_off(&mut self, entry: Entry, at: u64) {
        self.heap.push(Entry { at, ..entry });
    }

    pub(crate) fn pop(&mut self) -> Option<Entry> {
        self.heap.pop()
    }

    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }
}
