//! What a seed stands for: a guest, two hosts, the links between them, and what goes wrong.

use std::time::Duration;

use mig_core::Side;
use mig_core::domain::PAGE_BYTES;
use mig_core::policy::{OnStall, Policy};
use mig_wire::describe::Region;

use crate::random::Random;

/// Where a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    Uniform,
    Hot,
    Sequential,
}

/// How a tracker finds writes; all three keep the contract of `DirtyTracker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracking {
    /// KVM's log with manual protection: a page stays reported until it is re-armed.
    ManualLog,
    /// KVM's plain log: reading it re-arms everything.
    PlainLog,
    /// KVM's ring: a page is reported once, and not again before it is re-armed.
    Ring,
}

/// An action that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names of the actions
pub enum Work {
    Attach,
    StartTracking,
    SendRound,
    Sync,
    Pause,
    Save,
    Locate,
    Resume,
    Prepare,
    Accept,
    Verify,
    Load,
    FindGap,
}

/// What befalls one side at a step of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Blow {
    Cancel,
    /// It thinks that the peer is gone, while messages are still on their way.
    Silence,
    /// Its peer says something senseless.
    Nonsense,
    /// Its process ends; the kernel closes its connections.
    Crash,
    /// Its host ends without a word.
    PowerLoss,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mishap {
    /// The network is cut right after this message of a link (0 to the destination, 1 to the source, from
    /// 2 on page channels).
    Cut {
        /// The link.
        link: usize,
        /// Messages that were sent on it before.
        after: u64,
    },
    /// A side is struck a while after its machine entered a step.
    Strike {
        /// The side.
        side: Side,
        /// The step, as its index in the order of a migration.
        step: usize,
        /// Nanoseconds after.
        after: u64,
        /// With what.
        blow: Blow,
    },
    /// An action fails.
    Fails {
        /// Whose.
        side: Side,
        /// Which.
        work: Work,
        /// How often it succeeds before.
        after: u64,
    },
    /// A page is lost on the way, with digests on.
    LosesPage {
        /// Pages that arrive before.
        after: u64,
    },
}

/// A mistake that a driver could make; the simulator must find each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The source resumes the guest when sending Commit fails.
    CommitFailureResumes,
    /// The source resumes the guest when the link is lost after Commit.
    InDoubtResumes,
    /// The destination runs the guest once it has loaded it, without a Commit.
    RunsOnceLoaded,
    /// The destination gives the guest up, and then still takes a Commit that was on its way.
    LateCommitTaken,
    /// Pages are sent without being watched again.
    RearmSkipped,
    /// Pages are read, and watched again only then.
    ReadBeforeRearm,
    /// The last look at the dirty log comes before state is saved.
    SyncBeforeSave,
    /// A migration starts with the dirty pages that the one before left.
    StartKeepsOldPages,
    /// The destination takes every zero page for one it never received.
    ZeroPagesSkipped,
    /// The destination dies silently and nobody watches for it.
    NoDeadline,
    /// The destination does not ask for the digests it got to be compared.
    VerifySkipped,
    /// The dirty log stays on after a failed migration.
    TrackingLeftOn,
}

/// What work costs, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Costs {
    pub(crate) pause: u64,
    pub(crate) save: u64,
    pub(crate) sync: u64,
    pub(crate) load: u64,
    pub(crate) resume: u64,
    pub(crate) verify: u64,
    pub(crate) prepare: u64,
    pub(crate) gap: u64,
    /// Between re-arming a chunk, reading the front halves of its pages and reading the back halves.
    pub(crate) read: u64,
}

/// One run, but for the small delays that are drawn on the way.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub(crate) regions: Vec<Region>,
    pub(crate) pattern: Pattern,
    /// Nanoseconds between two writes.
    pub(crate) write_every: u64,
    pub(crate) tracking: Tracking,
    pub(crate) save_writes_memory: bool,
    pub(crate) verify: bool,
    pub(crate) channels_asked: u16,
    pub(crate) channels_granted: u16,
    pub(crate) policy: Policy,
    pub(crate) costs: Costs,
    pub(crate) latency: u64,
    pub(crate) jitter: u64,
    pub(crate) nanos_per_page: u64,
    /// How far the destination's clock is ahead.
    pub(crate) clock_ahead: u64,
    /// Whether a side handles nothing else while an action of its is under way.
    pub(crate) source_blocks: bool,
    pub(crate) destination_blocks: bool,
    pub(crate) digests_first: bool,
    /// What goes wrong.
    pub mishaps: Vec<Mishap>,
    pub(crate) mutant: Option<Mutant>,
}

impl Scenario {
    pub(crate) fn draw(random: &mut Random, mutant: Option<Mutant>) -> Self {
        let mut at = 0;
        let regions = (0..random.within(1..5))
            .map(|_| {
                let pages = random.within(1..9);
                let region = Region { guest_address: at, bytes: pages * PAGE_BYTES };
                at += (pages + random.within(0..3)) * PAGE_BYTES;
                region
            })
            .collect();
        let latency = random.within(1_000..1_000_000);
        let costs = Costs {
            pause: random.within(1_000..500_000),
            save: random.within(1_000..500_000),
            sync: random.within(1_000..100_000),
            load: random.within(1_000..500_000),
            resume: random.within(1_000..500_000),
            verify: random.within(1_000..500_000),
            prepare: random.within(1_000..500_000),
            gap: random.within(1_000..5_000_000),
            read: random.within(1..50_000),
        };
        let mishaps = if random.chance(30) { 0 } else { random.within(1..4) };
        let mut verify = random.chance(40);
        let mishaps: Vec<Mishap> = (0..mishaps).map(|_| Mishap::draw(random)).collect();
        verify |= mishaps.iter().any(|m| matches!(m, Mishap::LosesPage { .. }));
        Self {
            regions,
            pattern: random.one_of(&[Pattern::Uniform, Pattern::Hot, Pattern::Sequential]),
            write_every: latency / random.within(1..20) + random.within(1_000..100_000),
            tracking: random.one_of(&[Tracking::ManualLog, Tracking::PlainLog, Tracking::Ring]),
            save_writes_memory: random.chance(50),
            verify,
            channels_asked: random.within(1..5) as u16,
            channels_granted: random.within(1..5) as u16,
            policy: Policy {
                downtime_limit: Duration::from_micros(random.within(10..10_000)),
                max_rounds: random.within(1..6) as u32,
                few_pages: random.within(0..4),
                no_progress_rounds: random.within(1..4) as u32,
                traffic_factor: random.within(1..4),
                timeout: random.chance(20).then(|| Duration::from_micros(random.within(10..20_000))),
                on_stall: if random.chance(80) { OnStall::StopAndCopy } else { OnStall::Abort },
            },
            costs,
            latency,
            jitter: random.within(1..2_000_000),
            nanos_per_page: random.within(100..50_000),
            clock_ahead: random.within(0..1 << 40),
            source_blocks: random.chance(50),
            destination_blocks: random.chance(50),
            digests_first: random.chance(50),
            mishaps,
            mutant,
        }
    }

    /// The same again with nothing going wrong, and no stall that could end it.
    pub(crate) fn without_mishaps(&self) -> Self {
        let policy = Policy { on_stall: OnStall::StopAndCopy, ..self.policy.clone() };
        Self { mishaps: Vec::new(), policy, ..self.clone() }
    }

    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }
}

impl Mishap {
    fn draw(random: &mut Random) -> Self {
        let side = random.one_of(&[Side::Source, Side::Destination]);
        match random.within(0..100) {
            0..35 => {
                let link = random.within(0..5) as usize;
                Self::Cut { link, after: random.within(1..if link < 2 { 9 } else { 15 }) }
            }
            35..75 => Self::Strike {
                side,
                step: random.within(0..15) as usize,
                after: random.one_of(&[1, 1_000, 100_000, 1_000_000]) * random.within(1..5),
                blow: random.one_of(&[
                    Blow::Cancel,
                    Blow::Cancel,
                    Blow::Silence,
                    Blow::Nonsense,
                    Blow::Crash,
                    Blow::PowerLoss,
                ]),
            },
            75..95 => {
                use Work as W;
                let source =
                    [W::Attach, W::StartTracking, W::SendRound, W::Sync, W::Pause, W::Save, W::Resume];
                let destination = [W::Prepare, W::Accept, W::Verify, W::Load, W::Load, W::Resume, W::FindGap];
                let works = if side == Side::Source { &source } else { &destination };
                // locating is rare, so that it comes with a lost page more often than alone
                let locate = side == Side::Source && random.chance(10);
                let work = if locate { W::Locate } else { random.one_of(works) };
                Self::Fails { side, work, after: if random.chance(70) { 0 } else { random.within(1..9) } }
            }
            _ => Self::LosesPage { after: random.within(0..60) },
        }
    }
}
