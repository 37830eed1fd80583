//! One choice that people understand, which sets the rest.

use std::fmt;
use std::str::FromStr;

use super::{OnStall, Policy, Shorten};

/// The least of its speed that any priority leaves to a guest, in percent.
pub const LEAST_KEPT_PERCENT: u8 = 5;

/// What matters most to the guest's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Priority {
    /// A short pause where it is to be had, a guest that keeps a fifth of its speed, and an end.
    #[default]
    Balanced,
    /// A short pause, although the guest keeps a twentieth of its speed on the way.
    ShortestPause,
    /// The end: the first pause within the budget is taken, and the guest keeps a twentieth of its speed to get there.
    SoonestDone,
    /// The budget: rather no migration than a longer pause.
    NeverOverBudget,
}

impl Priority {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::Balanced, Self::ShortestPause, Self::SoonestDone, Self::NeverOverBudget];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::ShortestPause => "shortest-pause",
            Self::SoonestDone => "soonest-done",
            Self::NeverOverBudget => "never-over-budget",
        }
    }

    /// What it sets, with everything else as it is by default.
    pub fn policy(self) -> Policy {
        let balanced = Policy::default();
        match self {
            Self::Balanced => balanced,
            Self::ShortestPause => {
                Policy { shorten: Shorten::Always, least_kept_percent: LEAST_KEPT_PERCENT, ..balanced }
            }
            Self::SoonestDone => Policy {
                least_kept_percent: LEAST_KEPT_PERCENT,
                shorten: Shorten::Never,
                no_progress_rounds: 1,
                ..balanced
            },
            Self::NeverOverBudget => {
                Policy { least_kept_percent: LEAST_KEPT_PERCENT, on_stall: OnStall::Abort, ..balanced }
            }
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|priority| priority.name() == text)
            .ok_or_else(|| format!("'{text}' is none of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_read_as_they_are_written() {
        for priority in Priority::ALL {
            assert_eq!(priority.to_string().parse(), Ok(priority));
        }
        assert!("fast".parse::<Priority>().unwrap_err().contains("soonest-done"));
    }

    #[test]
    fn balanced_is_the_default_and_only_the_last_one_gives_up() {
        assert_eq!(Priority::default().policy(), Policy::default());
        let gives_up = Priority::ALL.map(|p| p.policy().on_stall == OnStall::Abort);
        assert_eq!(gives_up, [false, false, false, true]);
    }
}
