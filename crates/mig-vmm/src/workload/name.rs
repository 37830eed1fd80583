//! Guests by name, `NAME[:key=value,...]`, and sizes such as `100MiB`.
//!
//! Invariant: what `Display` prints, `FromStr` reads back as the same guest.

use std::fmt;
use std::str::FromStr;

use super::layout::PAGE_BYTES;
use super::{Fill, Guest, Pattern};

const KNOWN: &str = "idle[:fill=none|random|text|heap], \
                     dirtier[:rate=SIZE,working-set=SIZE,pattern=sequential|random|hot,\
                     fill=none|random|text|heap], state, clock";
const DEFAULT_RATE_BYTES_PER_SECOND: u64 = 100 << 20;
const DEFAULT_WORKING_SET_BYTES: u64 = 256 << 20;

/// Why a text names no built-in guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestNameError {
    /// No guest of that name.
    #[error("no built-in guest is called {name:?}; there are: {KNOWN}")]
    Name {
        /// The name given.
        name: String,
    },
    /// The guest has no such parameter.
    #[error("the guest {guest} has no parameter {key:?}; there are: {KNOWN}")]
    Key {
        /// The guest.
        guest: &'static str,
        /// The key given.
        key: String,
    },
    /// A parameter given twice.
    #[error("the parameter {key} is given twice")]
    Twice {
        /// The key.
        key: &'static str,
    },
    /// A parameter without `=`.
    #[error("{text:?} is no key=value; there are: {KNOWN}")]
    NoValue {
        /// The part of the text.
        text: String,
    },
    /// A value that the parameter does not take.
    #[error("{key}={value} is not one of {known}")]
    Value {
        /// The parameter.
        key: &'static str,
        /// The value given.
        value: String,
        /// The values it takes.
        known: &'static str,
    },
    /// A size that cannot be read.
    #[error(
        "{key}={value} is not a size: write a whole number of at least {PAGE_BYTES} bytes, such as 65536, 64KiB, 100MiB or 1GiB"
    )]
    Size {
        /// The parameter.
        key: &'static str,
        /// The value given.
        value: String,
    },
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle { fill: Fill::None } => f.write_str("idle"),
            Self::Idle { fill } => write!(f, "idle:fill={fill}"),
            Self::Dirtier { rate_bytes_per_second, working_set_bytes, pattern, fill } => {
                let (rate, working_set) = (Size(*rate_bytes_per_second), Size(*working_set_bytes));
                write!(f, "dirtier:rate={rate},working-set={working_set},pattern={pattern}")?;
                if *fill == Fill::None { Ok(()) } else { write!(f, ",fill={fill}") }
            }
            Self::State => f.write_str("state"),
            Self::Clock => f.write_str("clock"),
        }
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Random => "random",
            Self::Text => "text",
            Self::Heap => "heap",
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::Hot => "hot",
        })
    }
}

impl FromStr for Guest {
    type Err = GuestNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, parameters) = text.split_once(':').unwrap_or((text, ""));
        match name {
            "idle" => {
                let [filled] = values("idle", ["fill"], parameters)?;
                Ok(Self::Idle { fill: fill(filled)? })
            }
            "dirtier" => {
                let [rate, working_set, pattern, filled] =
                    values("dirtier", ["rate", "working-set", "pattern", "fill"], parameters)?;
                let pattern = match pattern {
                    None | Some("sequential") => Pattern::Sequential,
                    Some("random") => Pattern::Random,
                    Some("hot") => Pattern::Hot,
                    Some(other) => return Err(value("pattern", other, "sequential, random, hot")),
                };
                let size = |key, text: Option<&str>, default| match text {
                    None => Ok(default),
                    Some(text) => match text.parse() {
                        Ok(Size(bytes)) if bytes >= PAGE_BYTES => Ok(bytes),
                        _ => Err(GuestNameError::Size { key, value: text.to_owned() }),
                    },
                };
                let working_set = size("working-set", working_set, DEFAULT_WORKING_SET_BYTES)?;
                Ok(Self::Dirtier {
                    rate_bytes_per_second: size("rate", rate, DEFAULT_RATE_BYTES_PER_SECOND)?,
                    working_set_bytes: working_set - working_set % PAGE_BYTES,
                    pattern,
                    fill: fill(filled)?,
                })
            }
            "state" => values("state", [], parameters).map(|[]| Self::State),
            "clock" => values("clock", [], parameters).map(|[]| Self::Clock),
            other => Err(GuestNameError::Name { name: other.to_owned() }),
        }
    }
}

fn fill(text: Option<&str>) -> Result<Fill, GuestNameError> {
    Ok(match text {
        None | Some("none") => Fill::None,
        Some("random") => Fill::Random,
        Some("text") => Fill::Text,
        Some("heap") => Fill::Heap,
        Some(other) => return Err(value("fill", other, "none, random, text, heap")),
    })
}

fn value(key: &'static str, value: &str, known: &'static str) -> GuestNameError {
    GuestNameError::Value { key, value: value.to_owned(), known }
}

/// The values of `keys` in `parameters`, in the order of the keys.
fn values<'a, const N: usize>(
    guest: &'static str,
    keys: [&'static str; N],
    parameters: &'a str,
) -> Result<[Option<&'a str>; N], GuestNameError> {
    let mut values = [None; N];
    for part in parameters.split(',').filter(|part| !part.is_empty()) {
        let (key, value) =
            part.split_once('=').ok_or_else(|| GuestNameError::NoValue { text: part.to_owned() })?;
        let at = keys
            .iter()
            .position(|k| *k == key)
            .ok_or_else(|| GuestNameError::Key { guest, key: key.to_owned() })?;
        if values[at].replace(value).is_some() {
            return Err(GuestNameError::Twice { key: keys[at] });
        }
    }
    Ok(values)
}

/// Bytes, with the largest binary unit that divides them.
struct Size(u64);

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Size {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (digits, shift) = UNITS
            .iter()
            .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits, *shift)))
            .unwrap_or((text, 0));
        let number: u64 = if digits.starts_with('+') { Err(()) } else { digits.parse().map_err(|_| ()) }?;
        number.checked_mul(1 << shift).map(Size).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_guest_is_read_back_as_itself() {
        for text in [
            "idle",
            "idle:fill=random",
            "idle:fill=text",
            "idle:fill=heap",
            "dirtier:rate=100MiB,working-set=256MiB,pattern=sequential",
            "dirtier:rate=1234567,working-set=64KiB,pattern=random",
            "dirtier:rate=2GiB,working-set=3GiB,pattern=hot",
            "dirtier:rate=1MiB,working-set=1MiB,pattern=random,fill=heap",
            "state",
            "clock",
        ] {
            let guest: Guest = text.parse().unwrap();
            assert_eq!(guest.to_string(), text);
            assert_eq!(guest.to_string().parse::<Guest>().unwrap(), guest);
        }
    }

    #[test]
    fn parameters_left_out_have_defaults() {
        assert_eq!("idle:fill=none".parse::<Guest>().unwrap().to_string(), "idle");
        assert_eq!(
            "dirtier".parse::<Guest>().unwrap().to_string(),
            "dirtier:rate=100MiB,working-set=256MiB,pattern=sequential"
        );
        let whole_pages = "dirtier:working-set=10000".parse::<Guest>().unwrap();
        assert!(matches!(whole_pages, Guest::Dirtier { working_set_bytes: 8192, .. }));
    }

    #[test]
    fn what_is_not_known_is_answered_with_what_is() {
        for (text, expected) in [
            ("idel", "no built-in guest is called \"idel\"; there are: idle[:fill"),
            ("", "there are: idle"),
            ("idle:full=random", "the guest idle has no parameter \"full\""),
            ("clock:rate=1MiB", "the guest clock has no parameter \"rate\""),
            ("idle:fill=zero", "fill=zero is not one of none, random, text, heap"),
            ("dirtier:pattern=cold", "pattern=cold is not one of sequential, random, hot"),
            ("dirtier:fill=zero", "fill=zero is not one of none, random, text, heap"),
            ("dirtier:rate", "\"rate\" is no key=value"),
            ("dirtier:rate=1MiB,rate=2MiB", "rate is given twice"),
            ("dirtier:rate=fast", "rate=fast is not a size"),
            ("dirtier:rate=1MB", "such as 65536, 64KiB"),
            ("dirtier:working-set=0", "at least 4096 bytes"),
            ("dirtier:working-set=-4KiB", "not a size"),
            ("dirtier:working-set=99999999999TiB", "not a size"),
        ] {
            let error = text.parse::<Guest>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?} gave {error:?}");
        }
    }
}
