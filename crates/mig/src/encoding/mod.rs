//! How pages travel: sorted and encoded by the sender, described by the wire's run table, decoded by the receiver.

mod cache;
pub(crate) mod decoder;
pub(crate) mod delta;
pub(crate) mod encoder;
mod reluctance;
pub(crate) mod zero;
pub(crate) mod zstd;

use std::fmt;
use std::str::FromStr;

use mig_core::progress::PageCounts;
use mig_wire::hello::Capabilities;
use mig_wire::pages::{Encoding, Run};
use thiserror::Error;

/// Whether pages are encoded, so that fewer bytes are sent, at the price of time on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compress {
    /// No page but those of zeros.
    #[default]
    Off,
    /// All that shrink by an eighth, by zstd.
    Zstd(Level),
    /// Those that were sent in the round before, as what changed of them since.
    Delta,
    /// Whatever is measured to be faster than to send pages as they are, on this link.
    Auto,
}

/// A compression level of zstd: 1 to 19; the higher, the slower and the fewer bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Level(u8);

impl Level {
    /// A level; none if there is no such.
    pub fn new(level: u8) -> Option<Self> {
        (1..=19).contains(&level).then_some(Self(level))
    }
}

/// The fastest.
impl Default for Level {
    fn default() -> Self {
        Self(1)
    }
}

/// A text that says nothing about encoding.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "'{text}' is no way to compress; give auto, off, delta, zstd or zstd:LEVEL with a level from 1 to 19"
)]
pub struct UnknownCompress {
    text: String,
}

impl FromStr for Compress {
    type Err = UnknownCompress;

    fn from_str(text: &str) -> Result<Self, UnknownCompress> {
        let level = |digits: &str| digits.parse().ok().and_then(Level::new);
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "delta" => Ok(Self::Delta),
            "zstd" => Ok(Self::Zstd(Level::default())),
            _ => text
                .strip_prefix("zstd:")
                .and_then(level)
                .map(Self::Zstd)
                .ok_or_else(|| UnknownCompress { text: text.chars().take(40).collect() }),
        }
    }
}

impl fmt::Display for Compress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Auto => f.write_str("auto"),
            Self::Delta => f.write_str("delta"),
            Self::Zstd(level) => write!(f, "zstd:{}", level.0),
        }
    }
}

impl Compress {
    /// The encodings to ask the destination for.
    pub(crate) fn encodings(self) -> Capabilities {
        match self {
            Self::Off => Capabilities::empty(),
            Self::Zstd(_) => Capabilities::ZSTD,
            Self::Delta => Capabilities::DELTA,
            Self::Auto => Capabilities::PAGE_ENCODINGS,
        }
    }
}

impl From<Level> for i32 {
    fn from(level: Level) -> Self {
        level.0.into()
    }
}

/// The pages of a table, by how they travel.
pub(crate) fn counts(table: &[Run]) -> PageCounts {
    let mut counts = PageCounts::default();
    for run in table {
        let kind = match run.encoding {
            Encoding::Zero => &mut counts.zero,
            Encoding::Raw => &mut counts.raw,
            Encoding::Zstd { .. } => &mut counts.zstd,
            Encoding::Delta { .. } => &mut counts.delta,
        };
        *kind += u64::from(run.count);
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_compress_are_written_as_they_are_read() {
        for text in ["auto", "off", "delta", "zstd:1", "zstd:19"] {
            assert_eq!(text.parse::<Compress>().unwrap().to_string(), text);
        }
        assert_eq!("zstd".parse::<Compress>().unwrap().to_string(), "zstd:1");
        for wrong in ["", "zstd:", "zstd:0", "zstd:20", "zstd:256", "zstd:x", "Zstd", "lz4", "off "] {
            let error = wrong.parse::<Compress>().unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains("1 to 19"), "{error}");
        }
    }
}
