//! Exit codes.

use std::process::ExitCode;

/// How a program ends, for whoever started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The guest moved; or, for a receiver, its guest ended well or moved on.
    Done = 0,
    /// The migration failed and the guest stayed; or the guest ended badly.
    Failed = 1,
    /// Nothing was begun: the options, or what they name, are at fault; or it was interrupted before.
    Usage = 2,
    /// It is not known whether the guest runs elsewhere.
    InDoubt = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}
