//! What went wrong, as data: which side, at which step, who is to blame, why, and what to do.

use std::fmt;

use crate::bytes::{Reader, WireError, Writer};

/// The longest text in a fault, in bytes.
pub const MAX_TEXT_BYTES: usize = 2048;

/// Where a failure happened, as seen by the side that reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The side the guest leaves.
    Source,
    /// The side the guest comes to.
    Destination,
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// This host: a system call, KVM, memory.
    Local,
    /// The peer: it sent something wrong, or refused.
    Peer,
    /// What lies between: refused, lost, silent.
    Network,
    /// What was asked for cannot be: a name, an address, an option.
    Configuration,
}

/// The step of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the words are the meaning
pub enum Step {
    Connect,
    Handshake,
    Describe,
    Prepare,
    Attach,
    Track,
    Round(u32),
    Pause,
    Save,
    LastSync,
    LastRound,
    Verify,
    Load,
    Commit,
    Resume,
}

/// A failure that ends a migration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The side it happened on.
    pub side: Side,
    /// What that side was doing.
    pub step: Step,
    /// Whose fault it is.
    pub blame: Blame,
    /// Why.
    pub cause: String,
    /// What somebody can do about it; may be empty.
    pub remedy: String,
}

impl Fault {
    /// A failure without a remedy; see [`Fault::remedy`].
    pub fn new(side: Side, step: Step, blame: Blame, cause: impl Into<String>) -> Self {
        Self { side, step, blame, cause: cause.into(), remedy: String::new() }
    }

    /// Ended on this side because somebody wanted it to; for a reason of this host's own, if there is one.
    pub fn cancelled(side: Side, step: Step, reason: Option<String>) -> Self {
        match reason {
            Some(reason) => Self::new(side, step, Blame::Local, reason)
                .remedy("migrate again when there is a guest to move"),
            None => {
                Self::new(side, step, Blame::Configuration, "cancelled").remedy("migrate again when it suits")
            }
        }
    }

    /// Adds what somebody can do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        let (step, round) = self.step.to_wire();
        writer.u8(self.side as u8).u8(self.blame as u8).u8(step).u32(round);
        writer.text(&self.cause, MAX_TEXT_BYTES).text(&self.remedy, MAX_TEXT_BYTES);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let unknown = |what, value: u8| WireError::Unknown { what, value: u64::from(value) };
        let side = match reader.u8()? {
            0 => Side::Source,
            1 => Side::Destination,
            value => return Err(unknown("side of a fault", value)),
        };
        let blame = match reader.u8()? {
            0 => Blame::Local,
            1 => Blame::Peer,
            2 => Blame::Network,
            3 => Blame::Configuration,
            value => return Err(unknown("blame of a fault", value)),
        };
        let (step, round) = (reader.u8()?, reader.u32()?);
        let step = Step::from_wire(step, round).ok_or_else(|| unknown("step of a fault", step))?;
        Ok(Self {
            side,
            step,
            blame,
            cause: reader.text(MAX_TEXT_BYTES)?,
            remedy: reader.text(MAX_TEXT_BYTES)?,
        })
    }
}

/// Steps in the order of their numbers on the wire; `Round` carries its round beside it.
const STEPS: [Step; 15] = [
    Step::Connect,
    Step::Handshake,
    Step::Describe,
    Step::Prepare,
    Step::Attach,
    Step::Track,
    Step::Round(0),
    Step::Pause,
    Step::Save,
    Step::LastSync,
    Step::LastRound,
    Step::Verify,
    Step::Load,
    Step::Commit,
    Step::Resume,
];

impl Step {
    fn to_wire(self) -> (u8, u32) {
        let (plain, round) = match self {
            Self::Round(round) => (Self::Round(0), round),
            other => (other, 0),
        };
        let at = STEPS.iter().position(|s| *s == plain).expect("every step is in the table");
        (at as u8, round)
    }

    fn from_wire(step: u8, round: u32) -> Option<Self> {
        match STEPS.get(usize::from(step))? {
            Self::Round(_) => Some(Self::Round(round)),
            other => (round == 0).then_some(*other),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Peer => "peer",
            Self::Network => "network",
            Self::Configuration => "configuration",
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Handshake => "handshake",
            Self::Describe => "describe",
            Self::Prepare => "prepare",
            Self::Attach => "attach",
            Self::Track => "track",
            Self::Round(round) => return write!(f, "round {round}"),
            Self::Pause => "pause",
            Self::Save => "save",
            Self::LastSync => "last sync",
            Self::LastRound => "last round",
            Self::Verify => "verify",
            Self::Load => "load",
            Self::Commit => "commit",
            Self::Resume => "resume",
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {}", self.side, self.step, self.cause)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

impl std::error::Error for Fault {}
