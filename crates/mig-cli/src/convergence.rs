//! What is to happen to a guest that dirties memory as fast as it is sent, as options and control requests say it.

use clap::ValueEnum;
use mig::policy::{self, Policy};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// What matters most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // the words are those of `mig::policy::Priority`
pub enum Priority {
    Balanced,
    ShortestPause,
    SoonestDone,
    NeverOverBudget,
}

/// What to do when rounds do not shrink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnStall {
    /// Pause the guest all the same
    StopAndCopy,
    /// Slow it, and if that does not help, pause it all the same
    Throttle,
    /// Leave it here
    Abort,
}

impl Priority {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::Balanced, Self::ShortestPause, Self::SoonestDone, Self::NeverOverBudget];

    /// The word for it.
    pub fn name(self) -> &'static str {
        policy::Priority::from(self).name()
    }
}

impl From<Priority> for policy::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Balanced => Self::Balanced,
            Priority::ShortestPause => Self::ShortestPause,
            Priority::SoonestDone => Self::SoonestDone,
            Priority::NeverOverBudget => Self::NeverOverBudget,
        }
    }
}

/// The policy of a priority, changed by what was said besides.
pub fn policy(
    priority: Option<Priority>,
    on_stall: Option<OnStall>,
    keep_speed_percent: Option<u8>,
) -> Policy {
    let mut policy = priority.map_or_else(policy::Priority::default, Into::into).policy();
    match on_stall {
        None => {}
        Some(OnStall::Throttle) => policy.on_stall = policy::OnStall::StopAndCopy,
        Some(OnStall::StopAndCopy) => {
            (policy.on_stall, policy.least_kept_percent) = (policy::OnStall::StopAndCopy, 100);
        }
        Some(OnStall::Abort) => (policy.on_stall, policy.least_kept_percent) = (policy::OnStall::Abort, 100),
    }
    policy.least_kept_percent = keep_speed_percent.unwrap_or(policy.least_kept_percent);
    policy
}

/// Whether what was said goes together.
///
/// # Errors
/// A part that cannot be, or two that exclude each other.
pub fn check(on_stall: Option<OnStall>, keep_speed_percent: Option<u8>) -> Result<(), Failure> {
    let wrong = |cause: String, remedy: &str| Err(Failure::new("source", "options", cause, remedy));
    match keep_speed_percent {
        Some(percent) if !(1..=100).contains(&percent) => {
            wrong(format!("keep_speed_percent is {percent}"), "give 1 to 100")
        }
        Some(..100) if on_stall.is_some_and(|s| s != OnStall::Throttle) => wrong(
            "keep_speed_percent is for a guest that may be slowed, and on_stall leaves it alone".into(),
            "leave one of them out, or choose throttle",
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_word_the_engine_decides() {
        assert_eq!(policy(None, None, None), Policy::default());
    }

    #[test]
    fn what_is_to_happen_at_a_stall_overrules_the_priority_and_the_speed_to_keep_overrules_both() {
        let never = Some(Priority::NeverOverBudget);
        let left_alone = policy(never, Some(OnStall::StopAndCopy), None);
        assert_eq!((left_alone.on_stall, left_alone.least_kept_percent), (policy::OnStall::StopAndCopy, 100));
        let slowed = policy(never, Some(OnStall::Throttle), None);
        assert_eq!((slowed.on_stall, slowed.least_kept_percent), (policy::OnStall::StopAndCopy, 5));
        assert_eq!(policy(None, Some(OnStall::Abort), None).least_kept_percent, 100);
        assert_eq!(policy(never, None, Some(30)).least_kept_percent, 30);
    }
}
