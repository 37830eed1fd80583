//! What a filled page holds: it follows from the kind and the page's number, so that the host can tell it again.
//!
//! `text` and `heap` are made up so that an encoder finds in them what it finds in the real thing: words that return,
//! and records with counters, pointers, short names, keys without pattern and free space. How well they compress is
//! no more than typical.

use super::Fill;
use super::layout::PAGE_BYTES;

const QUADWORDS: usize = PAGE_BYTES as usize / 8;

/// Common words, the commonest first, as a text has them.
#[rustfmt::skip]
const WORDS: [&str; 128] = [
    "the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are", "as", "with", "they",
    "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when",
    "we", "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each", "about", "how",
    "up", "out", "them", "then", "many", "some", "these", "would", "other", "into", "has", "more", "two", "like",
    "time", "look", "write", "number", "way", "could", "people", "than", "first", "water", "been", "call", "long",
    "find", "day", "come", "made", "part", "over", "sound", "take", "only", "little", "work", "know", "place",
    "year", "live", "back", "give", "most", "very", "after", "thing", "name", "good", "sentence", "great",
    "think", "where", "help", "through", "much", "before", "line", "right", "means", "same", "differ", "turn",
    "cause", "follow", "change", "around", "country", "because", "memory", "another", "against", "machine",
    "something", "migration", "different", "important", "considerable", "understanding", "nevertheless",
    "correspondence", "responsibility",
];

/// The bytes of a page.
pub(super) fn write_page(kind: Fill, page: u64, bytes: &mut [u8; PAGE_BYTES as usize]) {
    let mut state = page << 32;
    match kind {
        Fill::None => bytes.fill(0),
        Fill::Random => random(&mut state, bytes),
        Fill::Text => text(&mut state, bytes),
        Fill::Heap => heap(page, &mut state, bytes),
    }
}

fn random(state: &mut u64, bytes: &mut [u8]) {
    let (quadwords, _) = bytes.as_chunks_mut::<8>();
    for quadword in &mut quadwords[..QUADWORDS] {
        *quadword = split_mix(state).to_le_bytes();
    }
}

/// Words, the common ones more often: a product of two even draws falls towards zero.
fn text(state: &mut u64, bytes: &mut [u8]) {
    let mut at = 0;
    while at < bytes.len() {
        let draw = split_mix(state);
        let (a, b) = (draw & 0xffff, draw >> 16 & 0xffff);
        let word = WORDS[((a * b) >> 25) as usize];
        let end = if draw >> 60 == 0 { ".\n" } else { " " };
        for byte in word.bytes().chain(end.bytes()) {
            let Some(place) = bytes.get_mut(at) else { return };
            *place = byte;
            at += 1;
        }
    }
}

/// A page as a database keeps it: a header, records from the end on, and a fifth to a third left free.
fn heap(page: u64, state: &mut u64, bytes: &mut [u8]) {
    const RECORD_BYTES: usize = 96;
    bytes.fill(0);
    let records = 28 + (split_mix(state) % 6) as usize;
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &page.to_le_bytes());
    put(8, &(records as u32).to_le_bytes());
    for record in 0..records {
        let at = PAGE_BYTES as usize - (record + 1) * RECORD_BYTES;
        put(16 + record * 2, &(at as u16).to_le_bytes());
        let draw = split_mix(state);
        put(at, &(page * 32 + record as u64).to_le_bytes());
        // a pointer into the same few gigabytes, a time of the same year, a small count and some flags
        put(at + 8, &(0x7f3a_0000_0000 | (draw & 0xffff_fff0)).to_le_bytes());
        put(at + 16, &(1_735_689_600_000 + (draw >> 32) * 7).to_le_bytes());
        put(at + 24, &((draw >> 8 & 0xff) as u32).to_le_bytes());
        put(at + 28, &((draw >> 16 & 3) as u32).to_le_bytes());
        // a key without pattern
        put(at + 32, &split_mix(state).to_le_bytes());
        put(at + 40, &split_mix(state).to_le_bytes());
        let name = [WORDS[(draw >> 20 & 127) as usize], "-", WORDS[(draw >> 28 & 127) as usize]].concat();
        put(at + 48, name.as_bytes());
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
pub(super) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn page(kind: Fill, number: u64) -> [u8; PAGE_BYTES as usize] {
        let mut bytes = [0xaa; PAGE_BYTES as usize];
        write_page(kind, number, &mut bytes);
        bytes
    }

    /// Bits a byte, if bytes were drawn by how often each is there.
    fn entropy(bytes: &[u8]) -> f64 {
        let mut counts = [0_u32; 256];
        bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        let share = |count: u32| f64::from(count) / bytes.len() as f64;
        counts.into_iter().filter(|count| *count > 0).map(|count| -share(count) * share(count).log2()).sum()
    }

    #[test]
    fn a_page_is_the_same_again_and_no_other_page_is_like_it() {
        for kind in [Fill::Random, Fill::Text, Fill::Heap] {
            let pages: BTreeSet<_> = (512..812).map(|number| page(kind, number)).collect();
            assert_eq!(pages.len(), 300, "{kind:?}");
            assert_eq!(page(kind, 512), page(kind, 512));
            assert!(pages.iter().all(|page| page.iter().any(|byte| *byte != 0)));
        }
        assert_eq!(page(Fill::None, 512), [0; PAGE_BYTES as usize]);
    }

    #[test]
    fn text_and_heap_lie_between_nothing_and_noise() {
        let of = |kind| (512..532).map(|number| entropy(&page(kind, number))).sum::<f64>() / 20.0;
        let (random, text, heap) = (of(Fill::Random), of(Fill::Text), of(Fill::Heap));
        assert!(
            random > 7.9 && (3.5..4.5).contains(&text) && (3.0..6.5).contains(&heap),
            "{random} {text} {heap}"
        );
    }

    #[test]
    fn text_is_words_to_the_last_byte() {
        let bytes = page(Fill::Text, 700);
        let text = std::str::from_utf8(&bytes).unwrap();
        let (whole, _) = text.rsplit_once([' ', '\n']).unwrap();
        assert!(whole.split_whitespace().all(|word| WORDS.contains(&word.trim_end_matches('.'))), "{text}");
        assert!(text.is_ascii() && text.contains(".\n"));
    }

    #[test]
    fn the_records_of_a_heap_page_lie_where_its_header_says_and_leave_room() {
        for number in 512..562 {
            let bytes = page(Fill::Heap, number);
            let records = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
            let at = |record: usize| {
                usize::from(u16::from_le_bytes(bytes[16 + record * 2..][..2].try_into().unwrap()))
            };
            for record in 0..records {
                let id = u64::from_le_bytes(bytes[at(record)..][..8].try_into().unwrap());
                assert_eq!(id, number * 32 + record as u64);
            }
            let free = &bytes[16 + records * 2..at(records - 1)];
            assert!(free.len() > 800 && free.iter().all(|byte| *byte == 0));
        }
    }
}
