//! The command line, without a library: the program's size is boot time of an interpreted guest.

use std::path::PathBuf;
use std::time::Duration;

/// What `--help` would say.
pub(crate) const USAGE: &str = "\
usage: watch [--seconds N] [--memory SIZE] [--spin] [--late-limit SECONDS] [--dir DIRECTORY]
  --seconds N     end after N lines; 0, the default, is never
  --memory SIZE   how much memory is watched [default: 4MiB]
  --spin          work all the time, and so see every pause to its full length; else the guest idles mostly
  --late-limit N  a timer that is later than this many seconds is an error [default: 5]
  --dir DIRECTORY where files are written [default: the temporary directory]";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) seconds: u64,
    pub(crate) memory: usize,
    pub(crate) spin: bool,
    pub(crate) late_limit: Duration,
    pub(crate) directory: PathBuf,
    /// The other end of the pipes; told by the program to itself.
    pub(crate) peer: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seconds: 0,
            memory: 4 << 20,
            spin: false,
            late_limit: Duration::from_secs(5),
            directory: std::env::temp_dir(),
            peer: false,
        }
    }
}

impl Options {
    /// # Errors
    /// What is wrong with the words, as a sentence.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--seconds" => options.seconds = number(&value()?)?,
                "--memory" => options.memory = size(&value()?)?,
                "--late-limit" => options.late_limit = Duration::from_secs(number(&value()?)?),
                "--dir" => options.directory = value()?.into(),
                "--spin" => options.spin = true,
                "--peer" => options.peer = true,
                _ => return Err(format!("unknown word '{word}'")),
            }
        }
        Ok(options)
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("'{text}' is no number"))
}

fn size(text: &str) -> Result<usize, String> {
    let wrong = || format!("'{text}' is no size; write 65536, 64KiB or 8MiB");
    let (digits, unit) = match text.strip_suffix("iB") {
        Some(rest) if rest.ends_with('K') => (&rest[..rest.len() - 1], 1 << 10),
        Some(rest) if rest.ends_with('M') => (&rest[..rest.len() - 1], 1 << 20),
        Some(_) => return Err(wrong()),
        None => (text, 1),
    };
    let count: usize = digits.parse().map_err(|_| wrong())?;
    match count.checked_mul(unit) {
        Some(bytes) if bytes >= 64 << 10 => Ok(bytes),
        Some(_) => Err(format!("'{text}' is too little; 64KiB at least")),
        None => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn the_options_are_understood() {
        let options = parse("--seconds 3 --memory 8MiB --spin --late-limit 9 --dir /x").unwrap();
        assert_eq!((options.seconds, options.memory, options.spin), (3, 8 << 20, true));
        assert_eq!((options.late_limit, options.directory), (Duration::from_secs(9), "/x".into()));
        assert_eq!(parse("").unwrap(), Options::default());
        assert_eq!(parse("--memory 65536").unwrap().memory, parse("--memory 64KiB").unwrap().memory);
    }

    #[test]
    fn lines_that_make_no_sense_are_refused() {
        for line in ["--seconds", "--seconds x", "--memory 8GB", "--memory 1KiB", "--memory iB", "seconds"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
