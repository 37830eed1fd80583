//! What a seed stands for: a guest, two hosts, the links between them, and what goes wrong.

use std::time::Duration;

use mig_core::domain::PAGE_BYTES;
use mig_core::policy::{OnStall, Policy, Shorten};
use mig_wire::describe::Region;

use crate::link::{FIRST_CHANNEL, Speed};
use crate::mishap::Mishap;
use crate::mutant::Mutant;
use crate::random::Random;

/// Where a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    Uniform,
    /// A few pages, again and again.
    Hot,
    Sequential,
    /// Nowhere: it waits.
    Idle,
    /// Each of the others for a while, at a speed of its own.
    Phases,
}

/// Who resolves what is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operator {
    Absent,
    /// Says only what is true: resumes where the other side certainly never will, discards where it runs.
    Careful,
    /// Says resume here and there without looking; with an arbiter that must do no harm.
    Careless,
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
    pub(crate) speed: Speed,
    /// A link that is so many times slower than the others, as one congested path among several.
    pub(crate) slow: (usize, u64),
    /// The most that is on its way on a page channel before it waits: the socket buffers.
    pub(crate) window_bytes: u64,
    /// How far the destination's clock is ahead.
    pub(crate) clock_ahead: u64,
    /// Whether a side handles nothing else while an action of its is under way.
    pub(crate) source_blocks: bool,
    pub(crate) destination_blocks: bool,
    pub(crate) digests_first: bool,
    /// Whether both sides use an arbiter.
    pub(crate) arbitrated: bool,
    pub(crate) operator: Operator,
    /// Whether a destination that crashed listens again, knowing nothing.
    pub(crate) restarts: bool,
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
        let verify = random.chance(40);
        let arbitrated = random.chance(50);
        let operator = match random.within(0..3) {
            0 => Operator::Absent,
            1 if arbitrated => Operator::Careless,
            _ => Operator::Careful,
        };
        let none_yet = Self {
            regions,
            pattern: random.one_of(&[Pattern::Uniform, Pattern::Hot, Pattern::Sequential, Pattern::Phases]),
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
                shorten: random.one_of(&[Shorten::Never, Shorten::AtFullSpeed, Shorten::Always]),
                least_kept_percent: random.within(5..101) as u8,
                on_stall: if random.chance(80) { OnStall::StopAndCopy } else { OnStall::Abort },
            },
            costs,
            speed: Speed {
                latency,
                jitter: random.within(1..2_000_000),
                nanos_per_page: random.within(100..50_000),
            },
            slow: (random.within(0..7) as usize, random.within(1..20)),
            window_bytes: random.within(1..8) * 16_384,
            clock_ahead: random.within(0..1 << 40),
            source_blocks: random.chance(50),
            destination_blocks: random.chance(50),
            digests_first: random.chance(50),
            arbitrated,
            operator,
            restarts: random.chance(50),
            mishaps: Vec::new(),
            mutant,
        };
        none_yet.with_other_mishaps(random)
    }

    /// The same again, with other things going wrong.
    pub(crate) fn with_other_mishaps(&self, random: &mut Random) -> Self {
        let mishaps = if random.chance(30) { 0 } else { random.within(1..4) };
        let mishaps: Vec<Mishap> = (0..mishaps).map(|_| Mishap::draw(random)).collect();
        let loses = mishaps.iter().any(|m| matches!(m, Mishap::LosesPage { .. }));
        let down = mishaps.iter().any(|m| matches!(m, Mishap::ArbiterDown { .. }));
        // an arbiter that cannot be asked leaves it to the operator
        let careless = self.operator == Operator::Careless && down;
        let operator = if careless { Operator::Careful } else { self.operator };
        Self { mishaps, operator, verify: self.verify || loses, ..self.clone() }
    }

    /// The same again with nothing going wrong, and no stall that could end it.
    pub(crate) fn quiet(&self) -> Self {
        let policy = Policy { on_stall: OnStall::StopAndCopy, ..self.policy.clone() };
        Self { mishaps: Vec::new(), policy, ..self.clone() }
    }

    pub(crate) fn speed(&self, link: usize) -> Speed {
        let Speed { latency, jitter, nanos_per_page } = self.speed;
        let times = if link == self.slow.0 { self.slow.1 } else { 1 };
        Speed { latency: latency * times, jitter: jitter * times, nanos_per_page: nanos_per_page * times }
    }

    /// All links: the two of the control channel and the page channels.
    pub(crate) fn links(&self) -> usize {
        FIRST_CHANNEL + usize::from(self.channels_asked)
    }

    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }
}
