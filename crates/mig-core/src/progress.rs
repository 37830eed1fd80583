//! What a migration tells while it runs and when it has ended: the single source for terminals, JSON, logs
//! and metrics.

use std::time::Duration;

use mig_wire::fault::Fault;

use crate::policy::{Decision, StopReason, Throttle};

/// Pages sent, by how they travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PageCounts {
    /// Pages of zeros: a descriptor, no bytes.
    pub zero: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Pages sent compressed.
    pub zstd: u64,
    /// Pages sent as what changed since they were sent before.
    pub delta: u64,
}

impl PageCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.zero + self.with_bytes()
    }

    /// Those that are not of zeros, however they travelled.
    pub fn with_bytes(&self) -> u64 {
        self.raw + self.encoded()
    }

    /// Those that travelled as fewer bytes than they have.
    pub fn encoded(&self) -> u64 {
        self.zstd + self.delta
    }
}

impl std::ops::AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.raw += other.raw;
        self.zstd += other.zstd;
        self.delta += other.delta;
    }
}

/// What one round did, and what the policy made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundReport {
    /// Its number; 0 sends every page.
    pub round: u32,
    /// Pages sent in it.
    pub pages: PageCounts,
    /// Bytes sent in it, headers included.
    pub sent_bytes: u64,
    /// From its first page to the destination's acknowledgement of its last.
    pub elapsed: Duration,
    /// Pages that remain to be sent: those dirtied meanwhile, and those that were held back.
    pub dirtied_pages: u64,
    /// Pages that it left out, since the guest writes them in every round.
    pub held_pages: u64,
    /// Dirtied pages a second.
    pub dirty_pages_per_second: u64,
    /// Bytes that arrived a second: of pages that were encoded, those that they stand for.
    pub bytes_per_second: u64,
    /// The downtime that a switchover now would take.
    pub predicted_downtime: Duration,
    /// By how much the guest was slowed in it.
    pub throttle: Throttle,
    /// What comes next.
    pub decision: Decision,
    /// The stop rule that is nearest to firing (or fired).
    pub nearest_rule: StopReason,
}

/// The downtime, by what it was spent on. The parts follow each other, so they add up to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Downtime {
    /// Getting every vCPU out of the guest and devices quiet.
    pub pause: Duration,
    /// Reading vCPU and device state.
    pub save: Duration,
    /// Reading the dirty log for the last time.
    pub last_sync: Duration,
    /// The last pages and the state, until the destination acknowledged them.
    pub transfer: Duration,
    /// Digests, with `--verify` only.
    pub verify: Duration,
    /// Restoring vCPU and device state on the destination.
    pub load: Duration,
    /// Ready and Commit on the wire; Running too, where the destination does not tell how it timed its start.
    pub commit: Duration,
    /// Starting the vCPUs on the destination, until the last of them was let in, where that is known.
    pub resume: Duration,
}

impl Downtime {
    /// Everything together: from the order to pause to the guest running on the destination.
    pub fn total(&self) -> Duration {
        self.parts().iter().map(|(_, d)| *d).sum()
    }

    /// The parts by name, in their order.
    pub fn parts(&self) -> [(&'static str, Duration); 8] {
        [
            ("pause", self.pause),
            ("save", self.save),
            ("last_sync", self.last_sync),
            ("transfer", self.transfer),
            ("verify", self.verify),
            ("load", self.load),
            ("commit", self.commit),
            ("resume", self.resume),
        ]
    }
}

/// How a migration ended, for the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OutcomeKind {
    /// The guest runs on the destination.
    Moved,
    /// The guest runs on the source, as if nothing had happened.
    StillHere,
    /// It was in doubt, and dropped here on an operator's word that the destination runs it.
    Discarded,
}

impl OutcomeKind {
    /// The word used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::StillHere => "still-here",
            Self::Discarded => "discarded",
        }
    }
}

/// What was missing for a pause within the limit, where pre-copy ended without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shortfall {
    /// What the guest dirtied, in bytes a second: what it dirtied again in a round counts once.
    pub dirty_bytes_per_second: u64,
    /// What came through, in bytes a second.
    pub bytes_per_second: u64,
    /// The limit that would have been met.
    pub met_limit: Duration,
    /// Whether the guest could have been slowed more.
    pub could_slow_more: bool,
}

/// What a guest was denied so that rounds shrank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slowed {
    /// The most it was slowed by at a time.
    pub most: Throttle,
    /// For how long it was slowed at all.
    pub lasted: Duration,
    /// For how long each vCPU was held in that.
    pub held: Duration,
    /// The least of its speed that it kept over a round, in percent: what it used of the processors, to what it used
    /// before. Where that is known.
    pub least_speed_percent: Option<u8>,
}

/// What `--verify` found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Verification {
    /// It was not asked for, or not reached.
    Off,
    /// The digests of all chunks agree.
    Ok {
        /// How many chunks of 2 MiB were compared.
        chunks: u64,
    },
    /// Pages that differ, by guest-physical address.
    Mismatch {
        /// The first few of them.
        guest_addresses: Vec<u64>,
    },
}

/// How a migration went, whatever its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Which rule ended pre-copy, where it came that far.
    pub stop_reason: Option<StopReason>,
    /// How many rounds were sent, the last one (in the pause) included.
    pub rounds: u32,
    /// From the order to migrate to the end.
    pub total: Duration,
    /// Where the downtime went; absent unless the guest moved.
    pub downtime: Option<Downtime>,
    /// What the policy predicted as it decided to switch over.
    pub predicted_downtime: Option<Downtime>,
    /// What was missing for a pause within the limit, if it was not to be had.
    pub shortfall: Option<Shortfall>,
    /// What the guest itself felt, where both sides share a clock and the guest beats.
    pub guest_gap: Option<Duration>,
    /// How the guest was slowed so that rounds shrank, if it was.
    pub slowed: Option<Slowed>,
    /// Bytes sent over all channels.
    pub sent_bytes: u64,
    /// Pages sent.
    pub pages: PageCounts,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// What `--verify` found.
    pub verification: Verification,
    /// Why it did not end in `moved`.
    pub fault: Option<Fault>,
}

impl Report {
    /// The report of a migration that failed before the peer heard of it.
    pub fn still_here(fault: Fault, ram_bytes: u64, total: Duration) -> Self {
        Self {
            outcome: OutcomeKind::StillHere,
            stop_reason: None,
            rounds: 0,
            total,
            downtime: None,
            predicted_downtime: None,
            shortfall: None,
            guest_gap: None,
            slowed: None,
            sent_bytes: 0,
            pages: PageCounts::default(),
            ram_bytes,
            verification: Verification::Off,
            fault: Some(fault),
        }
    }
}

/// Something an observer may want to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A receiver was spoken to by somebody who is no source for it; it goes on listening.
    TurnedAway {
        /// Who.
        peer: String,
        /// Why.
        cause: String,
    },
    /// The peer answered and this was agreed on.
    Connected {
        /// Protocol version.
        version: u16,
        /// Page channels.
        channels: u16,
    },
    /// The destination is ready for pages.
    Accepted,
    /// Pages of the current round sent so far; at most a few a second.
    Copying {
        /// The round.
        round: u32,
        /// Pages of it handed to channels so far.
        sent_pages: u64,
        /// Pages it has in all.
        total_pages: u64,
    },
    /// A round has ended.
    Round(RoundReport),
    /// The guest is paused for the switchover.
    Paused,
    /// The guest was committed to the destination.
    Committed,
    /// The destination runs the guest.
    Running,
    /// The source lets its guest run on.
    Resumed,
    /// Nobody here knows whether the other side runs the guest, or will. It is held, paused, until the other
    /// side, an arbiter or an operator tells. Told once on entering, and after every question in vain.
    InDoubt {
        /// Why: at first how it came to this, then why the last question was in vain.
        fault: Fault,
        /// How often the other side was asked.
        asked: u32,
    },
    /// An operator's word was not obeyed.
    WordRefused {
        /// Why.
        cause: String,
    },
}
