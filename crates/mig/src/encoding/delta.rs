//! A page as what changed of it: stretches of bytes, and how far they lie apart.
//!
//! ```text
//! stretches x { unchanged length, changed length, changed bytes }
//! ```
//!
//! Lengths are of 1 byte below 128, otherwise of 2: the low 7 bits with the highest bit set, then the bits above. What
//! follows the last stretch is unchanged. Stretches lie at least [`LEAST_GAP`] bytes apart: what lies between nearer
//! ones costs less than two lengths would.

use mig_wire::WireError;
use mig_wire::bytes::Reader;
use mig_wire::pages::{CHECKSUM_BYTES, checksum, split_checksum, verify};

use crate::memory::PAGE;

/// The content of a page.
pub(crate) type Page = [u8; PAGE];

/// What a payload may have at most, for the trouble to be worth it.
pub(crate) const MOST_BYTES: usize = PAGE / 4 * 3;
/// Fewer unchanged bytes between changed ones are sent with them.
const LEAST_GAP: usize = 4;

/// Appends the payload by which a receiver makes `new` of `old`; says whether it is worth it, and appends nothing if
/// not.
pub(crate) fn encode(old: &Page, new: &Page, into: &mut Vec<u8>) -> bool {
    let (start, differing) = (into.len(), Differing::between(old, new));
    let mut at = 0;
    while let Some((first, end)) = differing.stretch(at) {
        put_length(first - at, into);
        put_length(end - first, into);
        if into.len() - start + (end - first) + CHECKSUM_BYTES > MOST_BYTES {
            into.truncate(start);
            return false;
        }
        into.extend_from_slice(&new[first..end]);
        at = end;
    }
    into.extend_from_slice(&checksum(new));
    true
}

/// Makes the new page of the old one in `page`, as a peer's payload says.
///
/// # Errors
/// The payload has no meaning, or was made for another old page. `page` is then of no use.
pub(crate) fn apply(payload: &[u8], page: &mut Page) -> Result<(), WireError> {
    const WHAT: &str = "page delta";
    let (stretches, claimed) = split_checksum(payload)?;
    let mut reader = Reader::new(WHAT, stretches);
    let mut left = &mut page[..];
    while !reader.left().is_empty() {
        let (unchanged, changed) = (length(&mut reader)?, length(&mut reader)?);
        if changed == 0 {
            return Err(WireError::Unknown { what: "changed length of a page delta", value: 0 });
        }
        let needed = unchanged + changed;
        let (part, rest) = std::mem::take(&mut left)
            .split_at_mut_checked(needed)
            .ok_or(WireError::TooMany { what: WHAT, value: needed as u64, limit: PAGE as u64 })?;
        part[unchanged..].copy_from_slice(reader.take(changed)?);
        left = rest;
    }
    verify(page, claimed)
}

fn put_length(length: usize, into: &mut Vec<u8>) {
    let (low, high) = ((length % 128) as u8, (length / 128) as u8);
    if high == 0 {
        into.push(low);
    } else {
        into.extend_from_slice(&[low | 128, high]);
    }
}

/// At most 16383.
fn length(reader: &mut Reader<'_>) -> Result<usize, WireError> {
    let low = reader.u8()?;
    if low < 128 {
        return Ok(usize::from(low));
    }
    match reader.u8()? {
        high @ 1..128 => Ok(usize::from(low % 128) + 128 * usize::from(high)),
        value => Err(WireError::Unknown { what: "length in a page delta", value: u64::from(value) }),
    }
}

/// A bit for each byte of a page: whether it differs.
struct Differing([u64; PAGE / 64]);

impl Differing {
    fn between(old: &Page, new: &Page) -> Self {
        let mut bits = [0; PAGE / 64];
        let lines = old.as_chunks::<64>().0.iter().zip(new.as_chunks::<64>().0);
        for (bits, (old, new)) in bits.iter_mut().zip(lines) {
            if old != new {
                let words = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0).rev();
                *bits = words.fold(0, |bits, (old, new)| {
                    bits << 8 | differing_bytes(u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new))
                });
            }
        }
        Self(bits)
    }

    /// The first stretch at or behind `at`: where it starts, and where it ends.
    fn stretch(&self, at: usize) -> Option<(usize, usize)> {
        let first = self.next(at, 0)?;
        let mut end = self.next(first, !0).unwrap_or(PAGE);
        while let Some(again) = self.next(end, 0).filter(|again| again - end < LEAST_GAP) {
            end = self.next(again, !0).unwrap_or(PAGE);
        }
        Some((first, end))
    }

    /// The first byte from `at` on that differs, or with all bits to `flip`, that does not.
    fn next(&self, at: usize, flip: u64) -> Option<usize> {
        let mut word = at / 64;
        let mut bits = (self.0.get(word)? ^ flip) & !0 << (at % 64);
        while bits == 0 {
            word += 1;
            bits = self.0.get(word)? ^ flip;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }
}

/// A bit for each byte that is not zero.
fn differing_bytes(word: u64) -> u64 {
    const LOW_7: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // the highest bit of each byte: no carry leaves a byte, since 0x7f + 0x7f is 0xfe
    let marks = (((word & LOW_7) + LOW_7) | word) & !LOW_7;
    // byte i's mark, at bit 8 i, is to come to bit 56 + i: the multiplier has the bits 56 - 7 i, and no two products
    // of a mark and a bit meet
    (marks >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same payload, a byte at a time.
    fn oracle(old: &Page, new: &Page) -> Option<Vec<u8>> {
        let mut payload = Vec::new();
        let length = |length: usize, payload: &mut Vec<u8>| {
            if length < 128 {
                payload.push(length as u8);
            } else {
                payload.push(128 + (length % 128) as u8);
                payload.push((length / 128) as u8);
            }
        };
        let (mut at, mut behind) = (0, 0);
        while at < PAGE {
            if old[at] == new[at] {
                at += 1;
                continue;
            }
            let (first, mut equal) = (at, 0);
            while at < PAGE && equal < 4 {
                equal = if old[at] == new[at] { equal + 1 } else { 0 };
                at += 1;
            }
            let end = at - equal;
            length(first - behind, &mut payload);
            length(end - first, &mut payload);
            payload.extend_from_slice(&new[first..end]);
            behind = end;
        }
        payload.extend_from_slice(&crc32c_slow(new).to_le_bytes());
        (payload.len() <= 3072).then_some(payload)
    }

    /// CRC32C, a bit at a time.
    fn crc32c_slow(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, byte| {
            (0..8)
                .fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
        })
    }

    /// A page, and what a guest made of it: a few writes of all lengths and distances, or many.
    pub(crate) fn page_and_its_next() -> impl Strategy<Value = (Box<Page>, Box<Page>)> {
        let writes = proptest::collection::vec((0..PAGE, 1..40usize, any::<u8>()), 0..150);
        (any::<u64>(), writes).prop_map(|(seed, writes)| {
            let mut state = seed | 1;
            let mut old = Box::new([0; PAGE]);
            for byte in old.iter_mut() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = (state % 5) as u8;
            }
            let mut new = old.clone();
            for (at, count, value) in writes {
                let end = (at + count * usize::from(value % 7)).min(PAGE);
                new[at..end.max(at + 1)].fill(value);
            }
            (old, new)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_delta_agrees_with_a_slow_one_and_makes_the_new_page((old, new) in page_and_its_next()) {
            let mut payload = vec![0x55];
            let worth_it = encode(&old, &new, &mut payload);
            prop_assert_eq!(worth_it.then(|| payload[1..].to_vec()), oracle(&old, &new));
            prop_assert!(worth_it || payload == [0x55], "nothing is left of one that is not");
            if worth_it {
                let mut page = old.clone();
                apply(&payload[1..], &mut page).unwrap();
                prop_assert!(page == new);
            }
        }

        #[test]
        fn a_delta_of_another_page_is_refused((old, new) in page_and_its_next(), at in 0..PAGE, bit in 0..8u8) {
            let mut payload = Vec::new();
            if encode(&old, &new, &mut payload) {
                let mut other = old.clone();
                other[at] ^= 1 << bit;
                let mut page = other.clone();
                // where what differs is overwritten, it does not matter
                if apply(&payload, &mut page).is_ok() {
                    prop_assert!(page == new);
                }
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600), seal in any::<bool>()) {
            let mut page = Box::new([7; PAGE]);
            let _ = apply(&bytes, &mut page);
            if seal && bytes.len() >= 4 {
                // the same with the checksum of whatever comes out
                let payload = [&bytes[..bytes.len() - 4], &checksum(&page[..])].concat();
                let mut again = Box::new([7; PAGE]);
                let _ = apply(&payload, &mut again);
            }
        }
    }

    #[test]
    fn a_page_that_did_not_change_is_a_checksum() {
        let page = Box::new([9; PAGE]);
        let mut payload = Vec::new();
        assert!(encode(&page, &page, &mut payload));
        assert_eq!(payload, checksum(&page[..]));
        apply(&payload, &mut page.clone()).unwrap();
    }

    #[test]
    fn a_page_of_which_more_than_three_quarters_changed_is_left() {
        let (old, mut new) = (Box::new([0; PAGE]), Box::new([0; PAGE]));
        // two lengths of two bytes, and the checksum
        new[1000..1000 + MOST_BYTES - 8].fill(1);
        let mut payload = Vec::new();
        assert!(encode(&old, &new, &mut payload));
        assert_eq!(payload.len(), MOST_BYTES);
        new[999] = 1;
        assert!(!encode(&old, &new, &mut Vec::new()));
    }

    #[test]
    fn a_delta_that_leaves_the_page_or_says_nothing_is_refused() {
        let refused = |stretches: &[u8]| {
            let mut page = Box::new([0; PAGE]);
            let mut expected = page.clone();
            expected[5] = 1;
            apply(&[stretches, &checksum(&expected[..])].concat(), &mut page).unwrap_err().to_string()
        };
        for (stretches, words) in [
            (&[5, 0][..], "has no meaning with the value 0"),
            (&[0x80, 0, 1, 1], "length in a page delta"),
            (&[0x85, 0x80, 1, 1], "length in a page delta"),
            (&[0x80, 32, 1, 1], "above its limit"),
            (&[0xff, 31, 2, 1, 1], "above its limit"),
            (&[0xff, 0x7f, 0xff, 0x7f], "above its limit"),
            (&[5, 2, 1], "ends early"),
            (&[5], "ends early"),
            (&[5, 0x81], "ends early"),
            (&[4, 1, 1], "decoded pages"),
        ] {
            let error = refused(stretches);
            assert!(error.contains(words), "{stretches:?}: {error}");
        }
        assert!(apply(&[1, 2, 3], &mut Box::new([0; PAGE])).is_err());
        let mut page = Box::new([0; PAGE]);
        let mut expected = page.clone();
        expected[PAGE - 1] = 1;
        apply(&[&[0xff, 31, 1, 1][..], &checksum(&expected[..])].concat(), &mut page).unwrap();
        assert!(page == expected, "the last byte can be reached");
    }
}
