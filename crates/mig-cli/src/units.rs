//! Sizes and durations as people write and read them: `1GiB`, `300ms`.

use std::time::Duration;

use mig::pacing::MIN_BYTES_PER_SECOND;

const SIZES: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
/// In bytes a second.
const BIT_RATES: [(&str, f64); 3] = [("Gbit", 125e6), ("Mbit", 125e3), ("Kbit", 125.0)];
const TIMES: [(&str, f64); 4] = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0)];

/// Reads `512MiB`, `1.5GiB`, or plain bytes; the result is in bytes.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "" => 1,
        _ => SIZES
            .iter()
            .find(|(name, _)| *name == unit)
            .map(|(_, factor)| *factor)
            .ok_or_else(|| format!("'{unit}' is no unit of size; write 512MiB or 1GiB"))?,
    };
    let bad = || format!("'{text}' is no size; write 512MiB or 1GiB");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(|| format!("{text} is more than 2^64 bytes"));
    }
    let bytes = number.parse::<f64>().map_err(|_| bad())? * factor as f64;
    if !bytes.is_finite() || bytes.fract() != 0.0 || bytes >= 2f64.powi(63) {
        return Err(bad());
    }
    Ok(bytes as u64)
}

/// Reads `300ms`, `2s`, `1.5s`, `500us`, `1m`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let bad = || format!("'{text}' is no duration; write 300ms or 2s");
    let factor = TIMES.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(bad)?;
    let number = number.parse::<f64>().map_err(|_| bad())?;
    Duration::try_from_secs_f64(number * factor).map_err(|_| bad())
}

/// Reads `1Gbit`, `2.5Gbit`, `100Mbit` (a second), or `100MiB` (a second); the result is in bytes a second, at least
/// [`MIN_BYTES_PER_SECOND`].
///
/// # Errors
/// What is wrong with the text.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let bad = || format!("'{text}' is no bandwidth; write 1Gbit or 100MiB, a second");
    let rate = match BIT_RATES.iter().find(|(name, _)| *name == unit) {
        Some((_, bytes)) => {
            let rate = number.parse::<f64>().map_err(|_| bad())? * bytes;
            if rate < 2f64.powi(63) { rate as u64 } else { return Err(bad()) }
        }
        None if unit.is_empty() => return Err(bad()),
        None => parse_size(text).map_err(|_| bad())?,
    };
    if rate < MIN_BYTES_PER_SECOND {
        return Err(format!("{text} is too little to move a guest; give at least 1Mbit"));
    }
    Ok(rate)
}

/// The same as an option: exact.
pub fn rate_option(bytes_per_second: u64) -> String {
    match BIT_RATES.iter().find(|(_, bytes)| bytes_per_second as f64 % bytes == 0.0) {
        Some((unit, bytes)) if bytes_per_second < 1 << 50 => {
            format!("{}{unit}", bytes_per_second as f64 / bytes)
        }
        _ => format!("{bytes_per_second}B"),
    }
}

/// `1 Gbit/s`, `2.5 Gbit/s`: for reading.
pub fn rate(bytes_per_second: u64) -> String {
    let (unit, bytes) =
        BIT_RATES.iter().find(|(_, bytes)| bytes_per_second as f64 >= *bytes).unwrap_or(&("Kbit", 125.0));
    let number = format!("{:.2}", bytes_per_second as f64 / bytes);
    format!("{} {unit}/s", number.trim_end_matches('0').trim_end_matches('.'))
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

/// `530.1 MiB`: for reading, with one decimal.
pub fn bytes(count: u64) -> String {
    let (unit, factor) = SIZES.iter().find(|(_, factor)| count >= *factor).unwrap_or(&("B", 1));
    if *factor == 1 { format!("{count} B") } else { format!("{:.1} {unit}", count as f64 / *factor as f64) }
}

/// `1 GiB`, `544 MiB`: exact where the number is round.
pub fn round_bytes(count: u64) -> String {
    match SIZES.iter().find(|(_, factor)| count >= *factor && count.is_multiple_of(*factor)) {
        Some((unit, factor)) => format!("{} {unit}", count / factor),
        None => format!("{count} B"),
    }
}

/// Milliseconds as `0.42 ms`, `12.3 ms`, `1.24 s`.
pub fn millis(ms: f64) -> String {
    match ms {
        _ if ms >= 1000.0 => format!("{:.2} s", ms / 1000.0),
        _ if ms >= 10.0 => format!("{ms:.1} ms"),
        _ => format!("{ms:.2} ms"),
    }
}

/// A duration in milliseconds, exact to the microsecond.
pub fn as_ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_exact() {
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("1.5MiB"), Ok(3 << 19));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "GiB", "1GB", "1 GiB", "-1MiB", "1.0000001KiB", "99999999TiB", "1e3MiB", "."] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        for wrong in ["", "5", "s", "5h", "-1s", "1e400s", "99999999999999999999999s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_are_bits_or_bytes_a_second() {
        assert_eq!(parse_rate("1Gbit"), Ok(125_000_000));
        assert_eq!(parse_rate("2.5Gbit"), Ok(312_500_000));
        assert_eq!(parse_rate("100MiB"), Ok(100 << 20));
        for wrong in
            ["", "1", "Gbit", "1GB", "-1Gbit", "999Kbit", "0Gbit", "1e9Gbit", "99999999999999999Gbit"]
        {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
        assert_eq!(rate(125_000_000), "1 Gbit/s");
        assert_eq!(rate(312_500_000), "2.5 Gbit/s");
        assert_eq!(rate(100), "0.8 Kbit/s");
    }

    #[test]
    fn numbers_are_shown_short() {
        assert_eq!(bytes(530 << 20), "530.0 MiB");
        assert_eq!(bytes(17), "17 B");
        assert_eq!(round_bytes(1 << 30), "1 GiB");
        assert_eq!(round_bytes(544 << 20), "544 MiB");
        assert_eq!(millis(0.417), "0.42 ms");
        assert_eq!(millis(1240.0), "1.24 s");
        assert_eq!(as_ms(Duration::from_nanos(1_234_567)), 1.234);
    }
}
