//! What is said of several runs: never a mean, which one bad run moves.

use std::fmt;

/// The spread of some values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// How many there are.
    pub count: usize,
    /// The smallest.
    pub min: f64,
    /// The middle one, or halfway between the middle two.
    pub median: f64,
    /// The smallest that is no less than 95 % of them (nearest rank).
    pub p95: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// The spread of the values that are numbers; `None` when there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let count = sorted.len();
        let median = (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0;
        let p95 = sorted[(count * 95).div_ceil(100) - 1];
        Some(Self { count, min, median, p95, max })
    }

    /// `min / median / max` with so many decimals.
    pub fn three(&self, decimals: usize) -> String {
        format!("{:.decimals$} / {:.decimals$} / {:.decimals$}", self.min, self.median, self.max)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.three(f.precision().unwrap_or(2)))
    }
}

/// The smallest of the numbers that is no less than so many percent of them (nearest rank).
pub fn percentile(values: impl IntoIterator<Item = f64>, percent: usize) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// `min / median / max`, or a dash.
pub fn three(values: impl IntoIterator<Item = f64>, decimals: usize) -> String {
    Spread::of(values).map_or_else(|| "-".into(), |s| s.three(decimals))
}

/// The median, or not a number.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(values).map_or(f64::NAN, |s| s.median)
}

/// A value, or a dash where there is none.
pub fn one(value: f64, decimals: usize) -> String {
    if value.is_finite() { format!("{value:.decimals$}") } else { "-".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let odd = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.count, odd.min, odd.median, odd.max), (3, 1.0, 2.0, 3.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([7.0]), 7.0);
    }

    #[test]
    fn p95_is_the_nearest_rank_and_not_the_maximum_of_twenty() {
        let of = |n: u32| Spread::of((1..=n).map(f64::from)).unwrap().p95;
        assert_eq!([of(1), of(7), of(19), of(20), of(21), of(100)], [1.0, 7.0, 19.0, 19.0, 20.0, 95.0]);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let of = |n: u32, percent| percentile((1..=n).map(f64::from), percent);
        assert_eq!([of(200, 1), of(200, 99), of(50, 1), of(50, 99)], [2.0, 198.0, 1.0, 50.0]);
        assert_eq!([of(7, 0), of(7, 50), of(7, 100)], [1.0, 4.0, 7.0]);
        assert!(of(0, 50).is_nan());
    }

    #[test]
    fn nothing_has_no_spread_and_what_is_no_number_does_not_count() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN, 2.0]).unwrap().count, 1);
        assert_eq!((three([], 1), one(median([]), 1), one(1.25, 1)), ("-".into(), "-".into(), "1.2".into()));
        assert_eq!(three([1.0, 2.25], 1), "1.0 / 1.6 / 2.2");
    }
}
