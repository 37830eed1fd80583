//! Bandwidths as options and control requests give them: `1Gbit`, `off`, `capped`.

use std::fmt;
use std::str::FromStr;

use mig::pacing::InPause;
use serde::{Deserialize, Serialize};

use crate::units::{parse_rate, rate_option};

/// A cap in bytes a second, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cap(pub Option<u64>);

/// What becomes of the cap in the pause: `lifted`, `capped`, or what the link is known to give then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PauseCap(pub InPause);

impl FromStr for Cap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(None)),
            _ => parse_rate(text).map(|rate| Self(Some(rate))).map_err(|e| format!("{e}, or off")),
        }
    }
}

impl FromStr for PauseCap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "lifted" => Ok(Self(InPause::Lifted)),
            "capped" => Ok(Self(InPause::Capped)),
            _ => parse_rate(text)
                .map(|rate| Self(InPause::Known(rate)))
                .map_err(|e| format!("{e}, or lifted, or capped")),
        }
    }
}

impl fmt::Display for Cap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("off"),
            Some(rate) => f.write_str(&rate_option(rate)),
        }
    }
}

impl fmt::Display for PauseCap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            InPause::Lifted => f.write_str("lifted"),
            InPause::Capped => f.write_str("capped"),
            InPause::Known(rate) => f.write_str(&rate_option(rate)),
        }
    }
}

impl From<Cap> for String {
    fn from(cap: Cap) -> Self {
        cap.to_string()
    }
}

impl From<PauseCap> for String {
    fn from(cap: PauseCap) -> Self {
        cap.to_string()
    }
}

impl TryFrom<String> for Cap {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl TryFrom<String> for PauseCap {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_are_read_as_they_are_written() {
        for cap in [None, Some(125_000_000), Some(125_001), Some(u64::MAX >> 2)] {
            assert_eq!(Cap(cap).to_string().parse(), Ok(Cap(cap)));
        }
        for cap in [InPause::Lifted, InPause::Capped, InPause::Known(1_250_000_000)] {
            assert_eq!(PauseCap(cap).to_string().parse(), Ok(PauseCap(cap)));
        }
        assert_eq!("1Gbit".parse(), Ok(Cap(Some(125_000_000))));
    }

    #[test]
    fn what_is_no_cap_is_refused_with_what_would_be_one() {
        assert!("fast".parse::<Cap>().unwrap_err().contains("off"));
        assert!("fast".parse::<PauseCap>().unwrap_err().contains("lifted"));
        assert!("1Kbit".parse::<Cap>().unwrap_err().contains("1Mbit"));
    }
}
