//! What went wrong, in the four answers that every error of the programs gives: which side, at which step,
//! why, and what to do.

use std::fmt;

use mig::{Blame, Fault};
use serde::{Deserialize, Serialize};

/// A failure as it is shown, in words; also the `error` of a control answer and the `fault` of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `source` or `destination`.
    pub side: String,
    /// What that side was doing: a step of the migration, or `options`, `listen`, `start`, `control`, ...
    pub step: String,
    /// Whose fault it is: `local`, `peer`, `network` or `configuration`.
    pub blame: String,
    /// Why.
    pub cause: String,
    /// What somebody can do about it.
    pub remedy: String,
}

impl Failure {
    /// A failure that is the configuration's fault, which most are that happen before there is a guest.
    pub fn new(
        side: impl Into<String>,
        step: impl Into<String>,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            side: side.into(),
            step: step.into(),
            blame: "configuration".into(),
            cause: cause.into(),
            remedy: remedy.into(),
        }
    }

    /// The same failure, as this host's fault.
    #[must_use]
    pub fn local(self) -> Self {
        Self { blame: "local".into(), ..self }
    }
}

impl From<&Fault> for Failure {
    fn from(fault: &Fault) -> Self {
        Self {
            side: fault.side.to_string(),
            step: fault.step.to_string(),
            blame: fault.blame.to_string(),
            cause: fault.cause.clone(),
            remedy: if fault.remedy.is_empty() {
                usual_remedy(fault.blame).into()
            } else {
                fault.remedy.clone()
            },
        }
    }
}

/// For faults that know no better one: nobody is left without.
fn usual_remedy(blame: Blame) -> &'static str {
    match blame {
        Blame::Local => "do away with the cause on this host, and try again",
        Blame::Peer => "look at what the other side says of it, and try again",
        Blame::Network => "check the network between both hosts, and try again",
        Blame::Configuration => "do away with the cause, and try again",
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::from(&fault)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {}", self.side, self.step, self.cause)
    }
}

impl std::error::Error for Failure {}

/// An error with all its causes, on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use mig::{Side, Step};

    #[test]
    fn a_fault_keeps_all_that_it_says() {
        let fault = Fault::new(Side::Destination, Step::Round(3), Blame::Network, "the peer went silent")
            .remedy("look at the network");
        let failure = Failure::from(fault);
        assert_eq!(failure.side, "destination");
        assert_eq!(failure.step, "round 3");
        assert_eq!(failure.blame, "network");
        assert_eq!(failure.to_string(), "destination, round 3: the peer went silent");
        assert_eq!(failure.remedy, "look at the network");
        let silent = Failure::from(Fault::new(Side::Source, Step::Save, Blame::Local, "no"));
        assert!(!silent.remedy.is_empty(), "there is always something to do");
    }
}
