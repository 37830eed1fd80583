//! How a run ended, and what it may have broken.

use mig_core::Side;
use thiserror::Error;

/// What must never happen.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say it
pub enum Violation {
    #[error("the {side} got the guest running while it was the other's")]
    TwoRunners { side: Side },
    #[error("page {page} at the destination is not what it was at the pause")]
    MemoryDiffers { page: u64 },
    #[error("the state that was loaded is not what was saved")]
    StateDiffers,
    #[error("the {side} waits for ever: {what}")]
    Stuck { side: Side, what: String },
    #[error("the run does not end")]
    Endless,
    #[error("the ends do not fit: {0}")]
    Ends(String),
    #[error("the {side} did something after its end: {what}")]
    AfterTheEnd { side: Side, what: String },
    #[error("the dirty log is still on")]
    StillTracked,
    #[error("the guest is still slowed")]
    StillSlowed,
    #[error("the guest stays, but does not run")]
    NotResumed,
    #[error("the {0} was left to find out by a closed connection")]
    NotTold(Side),
    #[error("downtime: {what} is reported as {reported_ns} ns and took {actual_ns} ns")]
    Downtime { what: &'static str, reported_ns: u64, actual_ns: u64 },
    #[error("{what} holds {held}")]
    Unbounded { what: &'static str, held: u64 },
    #[error("on the wire: {0}")]
    Wire(String),
    #[error("the {side} asks twice at a time: {what}")]
    AsksTwice { side: Side, what: &'static str },
    #[error("{0} copies of the guest run")]
    Alive(u32),
    #[error("the {side} is in doubt for ever, although {why}")]
    DoubtStays { side: Side, why: &'static str },
    #[error("the destination dropped what may be the last copy: {0}")]
    CopyDropped(String),
    #[error("digests: {0}")]
    Digests(String),
}

/// How the source ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum SourceEnd {
    Moved,
    StillHere,
    Discarded,
    /// It still asks.
    InDoubt,
    Crashed,
}

/// How the destination ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DestinationEnd {
    Running,
    NotReceived,
    Lost,
    /// It still holds the copy.
    Held,
    Crashed,
}

/// How a run ended: its first attempt, and how many there were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Summary {
    /// The source's end.
    pub source: SourceEnd,
    /// The destination's end.
    pub destination: DestinationEnd,
    /// Copies of the guest that run.
    pub alive: u32,
    /// Rounds sent.
    pub rounds: u32,
    /// Whether the source was in doubt.
    pub source_doubted: bool,
    /// Whether the destination held a copy in doubt.
    pub destination_doubted: bool,
    /// Attempts to move the guest.
    pub attempts: u32,
}
