//! What goes wrong in a run, and the account of what already has.

use mig_core::{Side, Word};

use crate::random::Random;

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
    /// What follows shows that it was sent nevertheless.
    SendCommit,
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
    /// A question with the session's secret arrives, although its source is not in doubt.
    StrayQuestion,
    /// An operator says something at the wrong moment.
    Word(Word),
    /// The network is cut; this side hears nothing more, and the other neither unless it is half open.
    Cut {
        half_open: bool,
        heals_after: Option<u64>,
    },
    /// Its process ends; the kernel closes its connections.
    Crash,
    /// Its host ends without a word.
    PowerLoss,
}

/// The last of a link's that arrives before a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Last {
    Byte(u64),
    Frame(u64),
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mishap {
    /// The network is cut when so much of a link has arrived (link 0 to the destination, 1 to the source,
    /// from 2 on page channels to the destination). What is on its way then waits for the network to heal,
    /// as TCP has it.
    Cut {
        /// The link.
        link: usize,
        /// The last that arrives.
        after: Last,
        /// Whether only the link's direction dies (of all links), and the other lives on.
        half_open: bool,
        /// Nanoseconds until it heals; `None` for never.
        heals_after: Option<u64>,
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
    /// A side's process ends between two actions, also of one and the same transition.
    CrashAfter {
        /// The side.
        side: Side,
        /// Actions it carries out before.
        actions: u64,
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
    /// A question of a source in doubt, or its answer, is lost.
    LosesQuestion {
        /// Questions and answers that arrive before.
        after: u64,
    },
    /// The arbiter cannot be asked for a while.
    ArbiterDown {
        /// Claims that it answers before.
        after: u64,
        /// Claims that it does not answer.
        times: u64,
        /// Whether it decides them all the same, durably, and only the answer is lost.
        decides: bool,
    },
}

impl Blow {
    fn draw(random: &mut Random) -> Self {
        let (half_open, heals_after) = draw_outage(random);
        random.one_of(&[
            Self::Cancel,
            Self::Cancel,
            Self::Silence,
            Self::Nonsense,
            Self::StrayQuestion,
            Self::Word(Word::Resume),
            Self::Word(Word::Discard),
            Self::Cut { half_open, heals_after },
            Self::Cut { half_open, heals_after },
            Self::Crash,
            Self::PowerLoss,
        ])
    }
}

/// Whether it is half open, and after how many nanoseconds it heals, if ever.
fn draw_outage(random: &mut Random) -> (bool, Option<u64>) {
    let most: Option<u64> = random.chance(60).then(|| random.one_of(&[100_000, 5_000_000, 2_000_000_000]));
    (random.chance(40), most.map(|most| random.within(1..most)))
}

impl Mishap {
    pub(crate) fn draw(random: &mut Random) -> Self {
        let side = random.one_of(&[Side::Source, Side::Destination]);
        match random.within(0..100) {
            0..32 => Self::draw_cut(random),
            32..68 => Self::Strike {
                side,
                // the switchover is short, and most of what matters
                step: if random.chance(50) { random.within(10..15) } else { random.within(0..15) } as usize,
                after: random.one_of(&[1, 1_000, 100_000, 1_000_000]) * random.within(1..5),
                blow: Blow::draw(random),
            },
            68..75 => Self::CrashAfter { side, actions: random.within(0..30) },
            75..91 => {
                use Work as W;
                let source = [
                    W::Attach,
                    W::StartTracking,
                    W::SendRound,
                    W::Sync,
                    W::Pause,
                    W::Save,
                    W::SendCommit,
                    W::Resume,
                ];
                let destination = [W::Prepare, W::Accept, W::Verify, W::Load, W::Load, W::Resume, W::FindGap];
                let works = if side == Side::Source { &source[..] } else { &destination[..] };
                // locating is rare, so that it comes with a lost page more often than alone
                let locate = side == Side::Source && random.chance(10);
                let work = if locate { W::Locate } else { random.one_of(works) };
                Self::Fails { side, work, after: if random.chance(70) { 0 } else { random.within(1..9) } }
            }
            91..94 => Self::LosesPage { after: random.within(0..60) },
            94..96 => Self::LosesQuestion { after: random.within(0..4) },
            _ => Self::ArbiterDown {
                after: random.within(0..3),
                times: random.one_of(&[1, 2, 5, 1000]),
                decides: random.chance(50),
            },
        }
    }

    fn draw_cut(random: &mut Random) -> Self {
        let (half_open, heals_after) = draw_outage(random);
        let link = random.within(0..5) as usize;
        // about what the messages of a short migration come to, and the pages of a channel
        let byte = random.within(1..if link < 2 { 700 } else { 100_000 });
        let frame = random.within(1..if link < 2 { 9 } else { 15 });
        let after = random.one_of(&[Last::Byte(byte), Last::Frame(frame)]);
        Self::Cut { link, after, half_open, heals_after }
    }

    /// Whether a side cannot tell it from a peer that is gone.
    pub(crate) fn severs(&self) -> bool {
        match self {
            Self::Cut { .. } | Self::CrashAfter { .. } => true,
            Self::Strike { blow, .. } => !matches!(blow, Blow::Cancel | Blow::Nonsense | Blow::Word(_)),
            Self::Fails { .. }
            | Self::LosesPage { .. }
            | Self::LosesQuestion { .. }
            | Self::ArbiterDown { .. } => false,
        }
    }
}

/// The mishaps of a run, and which of them have happened.
#[derive(Debug)]
pub(crate) struct Mishaps {
    all: Vec<Mishap>,
    spent: Vec<bool>,
    counts: Vec<u64>,
}

impl Mishaps {
    pub(crate) fn new(all: &[Mishap]) -> Self {
        Self { all: all.to_vec(), spent: vec![false; all.len()], counts: vec![0; all.len()] }
    }

    /// The first that is due; it is then used up.
    pub(crate) fn take(&mut self, due: impl Fn(&Mishap) -> bool) -> Option<Mishap> {
        let at = (0..self.all.len()).find(|&i| !self.spent[i] && due(&self.all[i]))?;
        self.spent[at] = true;
        Some(self.all[at])
    }

    /// Counts one more of what a mishap counts, and says whether it is due with this one.
    pub(crate) fn strikes(&mut self, counted: impl Fn(&Mishap) -> Option<u64>) -> bool {
        for i in 0..self.all.len() {
            let Some(after) = counted(&self.all[i]) else { continue };
            self.counts[i] += 1;
            if !self.spent[i] && self.counts[i] > after {
                self.spent[i] = true;
                return true;
            }
        }
        false
    }

    /// Counts one more claim, and says whether the arbiter cannot be asked; if so, whether it decides.
    pub(crate) fn arbiter_is_down(&mut self) -> Option<bool> {
        let mut down = None;
        for i in 0..self.all.len() {
            let Mishap::ArbiterDown { after, times, decides } = self.all[i] else { continue };
            self.counts[i] += 1;
            if (after + 1..=after + times).contains(&self.counts[i]) {
                self.spent[i] = true;
                down = Some(decides);
            }
        }
        down
    }

    /// What has happened.
    pub(crate) fn happened(&self) -> impl Iterator<Item = &Mishap> {
        self.all.iter().zip(&self.spent).filter(|(_, spent)| **spent).map(|(mishap, _)| mishap)
    }
}
