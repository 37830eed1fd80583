//! Numbers that look random and can be told again.

/// A step of splitmix64 (Steele, Lea, Flood 2014): spreads every bit of `x` over the result.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A checksum that a changed, lost or exchanged word changes.
pub(crate) fn checksum(words: &[u64]) -> u64 {
    words
        .iter()
        .fold(0x6d69_6721, |sum: u64, word| (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95))
}

/// A sequence of them.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// Below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).expect("less than a usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_tells_changed_lost_and_exchanged_words() {
        let right = checksum(&[1, 2, 3, 4]);
        for wrong in [&[1, 2, 3, 5][..], &[1, 2, 3], &[2, 1, 3, 4], &[0, 1, 2, 3, 4]] {
            assert_ne!(checksum(wrong), right, "{wrong:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_sequence() {
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        assert!((0..100).all(|_| a.next() == b.next()));
        assert!((0..100).all(|_| a.below(3) < 3));
    }
}
