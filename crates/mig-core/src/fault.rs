//! What went wrong, as data: which side, at which step, who is to blame, why, and what to do.

use std::fmt;

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

    /// Adds what somebody can do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
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
